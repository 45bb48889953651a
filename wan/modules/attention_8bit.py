"""Softmax attention in 8 bits, for inference: products of rounded queries, keys, weights and values at twice the rate.

After SageAttention (arXiv 2410.02367, 2411.10958). Softmax does not see a vector that is taken off all keys, and its
weights sum to 1, so one that is taken off all values is added to the result again: both are rounded less their mean.

    s[m, n] = q8[m] . k8[n] * scale_q[m] * scale_k[tile of n]        a scale per query, and per tile of keys
    p[m, n] = exp(s[m, n] - max over n)                              rounded too, where values are
    y[m]    = unit_v * sum_n p8[m, n] * v8[n] / sum_n p[m, n] + mean_v             both per channel

Of normally distributed numbers a result is 3.8 % off in "int8", 5.3 % in "float8" and 1.1 % in "int8_scores".
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .cudnn_attention import HAS_TRITON
from .float8 import FLOAT8, LARGEST

MIN_KEYS = 2048  # below, rounding costs more than it saves: a prompt's 512 keys are exact
HEAD_DIMS = (64, 128)


class Rounding(NamedTuple):
    """What is in 8 bits."""

    int8_scores: bool  # queries and keys: int8, or e4m3
    values_8bit: bool  # weights and values: e4m3, or as they come
    min_capability: tuple[int, int]


ROUNDINGS = {
    "int8": Rounding(True, True, (8, 9)),
    "float8": Rounding(False, True, (8, 9)),
    "int8_scores": Rounding(True, False, (8, 0)),
}


def check_8bit(backend: str, device: torch.device) -> None:
    """Raise ValueError where there is no kernel for it: it wants a GPU and Triton."""
    what = "this is a CPU"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= ROUNDINGS[backend].min_capability and HAS_TRITON:
            return
        what = "{} has {}.{}".format(torch.cuda.get_device_name(device), *capability)
        what += "" if HAS_TRITON else " and triton is not installed"
    needed = ".".join(map(str, ROUNDINGS[backend].min_capability))
    raise ValueError(
        f"attention_backend {backend!r} needs triton and a GPU of compute capability {needed} or more, {what}; set "
        "attention_backend=auto"
    )


def attention_8bit(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """q [B, Lq, N, D], k and v [B, Lk, N, D] with any strides -> [B, Lq, N, D]; dtype kept. Without gradient.

    On a CPU the rounded numbers are multiplied in float32: slow, and the measure of what a GPU does.
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError(f"attention_backend {backend!r} has no gradient; set attention_backend=auto for training")
    if q.shape[-1] not in HEAD_DIMS:
        raise ValueError(
            f"attention_backend {backend!r} knows heads of {' and '.join(map(str, HEAD_DIMS))} channels, this model's "
            f"have {q.shape[-1]}; set attention_backend=auto"
        )
    if not q.is_cuda:
        return emulated(q, k, v, ROUNDINGS[backend])
    return _on_gpu(q, k, v, backend)


@torch.library.custom_op("longtake::attention_8bit", mutates_args=())
def _on_gpu(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """One operation to torch.compile, which looks into none of the three kernels."""
    from . import triton_attention

    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    with torch.cuda.device(q.device):  # Triton launches on the current one
        return triton_attention.attention(q, k, v, *ROUNDINGS[backend][:2])


@_on_gpu.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _round(x: Tensor, largest: Tensor, int8: bool) -> tuple[Tensor, Tensor]:
    """x in steps of which the largest number has 127, or in e4m3, where it is 448; as float32, and the scale."""
    scale = largest.clamp_min(1e-12) / (127 if int8 else LARGEST)
    x = x / scale
    return (x + 0.5).floor() if int8 else x.clamp(-LARGEST, LARGEST).to(FLOAT8).float(), scale


def emulated(q: Tensor, k: Tensor, v: Tensor, rounding: Rounding, tile: int = 128) -> Tensor:
    """attention_8bit in float32, anywhere, with all scores in memory; tile: keys that share a scale."""
    query, key, value = (x.float().transpose(1, 2) for x in (q, k, v))
    query, query_scale = _round(query, query.abs().amax(-1, keepdim=True), rounding.int8_scores)
    tiles = (key - key.mean(2, keepdim=True)).split(tile, dim=2)
    tiles = [_round(x, x.abs().amax((2, 3), keepdim=True), rounding.int8_scores) for x in tiles]
    scores = query @ torch.cat([x * scale for x, scale in tiles], dim=2).transpose(2, 3)
    scores = scores * query_scale / q.shape[-1] ** 0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    total = weights.sum(-1, keepdim=True)
    if rounding.values_8bit:
        mean, deviation = value.mean(2, keepdim=True), value.std(2, correction=0, keepdim=True)
        least = deviation.amax(-1, keepdim=True) * 0.1  # a channel that hardly moves
        unit = deviation.maximum(torch.where(least > 0, least, 1.0)) * 4
        value = ((value - mean) / unit).clamp(-LARGEST, LARGEST).to(FLOAT8).float()
        weights = (weights * LARGEST).to(FLOAT8).float() / LARGEST
        out = weights @ value / total * unit + mean
    else:
        out = weights @ value / total
    return out.transpose(1, 2).to(q.dtype)
