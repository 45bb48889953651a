"""Linear layers in float8 (e4m3, 3 bits of mantissa): half the bytes and twice the rate of bfloat16 on newer GPUs.

A row of activations and an output channel of weights have a scale each, so that the largest number of each becomes 448,
float8's largest. Products are summed in float32:

    y[m, n] = scale_x[m] * scale_w[n] * sum_k x8[m, k] * w8[n, k] + bias[n]
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from . import fused
from .fused import FLOAT8, fuses

LARGEST = torch.finfo(FLOAT8).max
MIN_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0
MULTIPLE = 16  # of rows and columns of a weight, which the GPU's kernels want
KEPT_BLOCKS = (0, -1)  # stay as they are: what enters and leaves them is far from what float8 was made for


def check_float8(device: torch.device) -> None:
    """Raise ValueError where the hardware, or torch on it, multiplies no float8 with a scale per row."""
    what, remedy = "this is a CPU", "set linear_dtype=auto"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability == (8, 9) and torch.__version__ < (2, 12):  # row-wise kernels for Ada ran beside their stream
            raise ValueError(
                f"linear_dtype=float8 on {torch.cuda.get_device_name(device)} needs torch 2.12 (pytorch issue 177651), "
                f"here is {torch.__version__}; {remedy}"
            )
        if capability >= MIN_CAPABILITY:
            return
        what = "{} has {}.{}".format(torch.cuda.get_device_name(device), *capability)
    raise ValueError(
        f"linear_dtype=float8 needs a GPU of compute capability {'.'.join(map(str, MIN_CAPABILITY))} or more (Ada, "
        f"Hopper, Blackwell), {what}; {remedy}"
    )


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows x [..., K] in float8, and their scales [..., 1] in float32: x is about their product."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / LARGEST
    return (x / scale).clamp(-LARGEST, LARGEST).to(FLOAT8), scale


class Float8Linear(nn.Module):
    """A linear layer whose weights were rounded to float8 once, and whose input is in every call.

    On a CPU the rounded numbers are multiplied in float32: slow, and the measure of what a GPU does.
    """

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        if weight.shape[0] % MULTIPLE or weight.shape[1] % MULTIPLE:
            raise ValueError(
                f"a weight of {list(weight.shape)} is no multiple of {MULTIPLE} both ways, as float8 needs; set "
                "linear_dtype=auto"
            )
        weight, scale = quantise(weight.detach())
        self.register_buffer("weight", weight)  # [N, K]
        self.register_buffer("scale", scale.t().contiguous())  # [1, N]
        self.register_buffer("bias", bias.detach().to(torch.bfloat16))  # the only one that the kernels take

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N], dtype kept."""
        rows, scale = fused.quantise(x.flatten(0, -2), False) if fuses(x) else quantise(x.flatten(0, -2))
        return self.multiply(rows, scale).to(x.dtype).unflatten(0, x.shape[:-1])

    def multiply(self, rows: Tensor, scale: Tensor) -> Tensor:
        """Rows [M, K] that are rounded already, with their scales [M, 1] -> [M, N] in bfloat16 (on a CPU float32)."""
        product = scaled_product if rows.is_cuda else emulated_product
        return product(rows, scale, self.weight, self.scale, self.bias)


def scaled_product(rows: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """[M, K] times [N, K] -> [M, N] in bfloat16, by the GPU's float8 units."""
    num_rows = rows.shape[0]
    if num_rows % 8:  # cuBLAS refuses odd numbers of rows (pytorch issue 167882)
        row_scale = F.pad(row_scale, (0, 0, 0, -num_rows % 8))
        rows = F.pad(rows.view(torch.uint8), (0, 0, 0, -num_rows % 8)).view(FLOAT8)
    out = torch._scaled_mm(
        rows,
        weight.t(),
        scale_a=row_scale,
        scale_b=scale,
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return out[:num_rows]


def emulated_product(rows: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The same in float32, anywhere."""
    return (rows.float() @ weight.float().t()) * row_scale * scale + bias.float()


@torch.no_grad()
def quantise_linears(model: nn.Module) -> int:
    """Put float8 layers into a WanModel's blocks, all but KEPT_BLOCKS; returns how many. For running, not for saving.

    Kept as they are: embeddings of patches, text, time, image and pose, the head, and the prompt's keys and values,
    which are computed once. Queries, keys and values of self-attention become one layer, also in the blocks kept.
    """
    kept = {index % len(model.blocks) for index in KEPT_BLOCKS}
    count = 0
    for index, block in enumerate(model.blocks):
        attention = block.self_attn
        attention.fuse_projections()
        if index in kept:
            continue
        attention.qkv = Float8Linear(*attention.qkv)
        del attention.q, attention.k, attention.v
        places = [
            (attention, "o"),
            (block.cross_attn, "q"),
            (block.cross_attn, "o"),
            (block.ffn, "0"),
            (block.ffn, "2"),
        ]
        for parent, name in places:
            linear = getattr(parent, name)
            setattr(parent, name, Float8Linear(linear.weight, linear.bias))
        count += 1 + len(places)
    return count
