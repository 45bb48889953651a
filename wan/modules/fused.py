"""Elementwise work of the transformer and the VAE in few kernels, where they are compiled for inference on a GPU.

A compiler fuses such work, too, but reads a row two or three times to sum over it (benchmarks/NOTES.md). Each function
is one operation to torch.compile, and has the arithmetic of what it stands for in wan.modules.model,
wan.modules.vae and wan.modules.float8, in float32 from the first to the last.
"""

import torch
from torch import Tensor

from .cudnn_attention import HAS_TRITON

FLOAT8 = torch.float8_e4m3fn


def fuses(x: Tensor) -> bool:
    """Whether code that is being compiled is for inference on a GPU."""
    return torch.compiler.is_compiling() and x.is_cuda and not torch.is_grad_enabled() and HAS_TRITON


@torch.library.custom_op("longtake::normalise", mutates_args=())
def normalise(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    time: Tensor,
    modulation: Tensor,
    gate: int,
    shift: int,
    eps: float,
    float8: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, normed, scales): x + update * gate; the layer norm of that, modulated: norm * (1 + scale) + shift.

    x, update [B, L, C]; weight, bias [C] of the norm; time [B, F, 6, C] float32 and modulation [1, 6, C], which are
    added: `gate` and `shift` say which of the six, the scale is that after the shift; -1: none, a gate of 1.
    float8: normed comes in e4m3, with scales [B L, 1] per token; else they are empty, as the total without update is.
    """
    from . import triton_blocks

    with torch.cuda.device(x.device):  # Triton launches on the current one
        return triton_blocks.normalise(x, update, weight, bias, time, modulation, gate, shift, eps, float8)


@normalise.register_fake
def _(x, update, weight, bias, time, modulation, gate, shift, eps, float8):
    num_rows = x.numel() // x.shape[-1]
    return (
        x.new_empty(0) if update is None else torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(x, dtype=FLOAT8 if float8 else x.dtype, memory_format=torch.contiguous_format),
        x.new_empty((num_rows, 1) if float8 else (0, 1), dtype=torch.float32),
    )


@torch.library.custom_op("longtake::quantise", mutates_args=())
def quantise(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """wan.modules.float8.quantise of rows [R, C] -> e4m3 [R, C] and scales [R, 1]; gelu: of their GELU (tanh)."""
    from . import triton_blocks

    with torch.cuda.device(x.device):
        return triton_blocks.quantise(x, gelu)


@quantise.register_fake
def _(x, gelu):
    return (
        torch.empty_like(x, dtype=FLOAT8, memory_format=torch.contiguous_format),
        x.new_empty(x.shape[0], 1, dtype=torch.float32),
    )


@torch.library.custom_op("longtake::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU (tanh) of a linear layer [..., K] -> [..., N], which cuBLASLt computes before it writes the product."""
    return torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True).unflatten(0, x.shape[:-1])


@linear_gelu.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("longtake::norm_silu", mutates_args=())
def norm_silu(x: Tensor, gamma: Tensor, past: Tensor | None, num_past: int) -> Tensor:
    """What a convolution of the VAE sees: SiLU(RMS norm) of x [B, C, T, H, W] behind the past [B, C, num_past, H, W],
    which is taken as it is (None: zeros) -> [B, C, num_past + T, H, W], channels last. gamma [C, 1, 1, 1].
    """
    from . import triton_blocks

    with torch.cuda.device(x.device):
        return triton_blocks.norm_silu(x, gamma, past, num_past)


@norm_silu.register_fake
def _(x, gamma, past, num_past):
    batch_size, channels, num_frames, height, width = x.shape
    return x.new_empty(batch_size, num_past + num_frames, height, width, channels).movedim(-1, 1)
