"""q, k, v -> output, on whatever hardware there is: the one place where an attention kernel is chosen."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = ("auto", "flash", "sdpa")

# Self-attention of one layer, rotary positions included: (layer, q, k, v), each [B, L, N, D] -> [B, L, N, D].
# Blocks do not know whether there is a mask, a cache, other ranks, or none of them.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@lru_cache(maxsize=1)
def _compiled_flex_attention() -> Callable:
    """Compiled once per process, here: eager flex-attention holds the whole score matrix, and compiling inside forward
    would compile again for every module. No CUDA graphs: the training sequence changes its addresses every step.

    Made at first use: torch.compile alone imports the compiler, two seconds that most starts need not wait for.
    """
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=1)
def _flash_kernel() -> Callable | None:
    """The newest installed flash-attn, which is optional."""
    for module in ("flash_attn_interface", "flash_attn"):  # 3, 2
        if find_spec(module):
            return import_module(module).flash_attn_func
    return None


@lru_cache(maxsize=8)
def _sdpa_priority(device: torch.device) -> list[SDPBackend] | None:
    """On Hopper cuDNN's kernel is the fastest, but torch asks flash first; elsewhere torch's order stands."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        return [
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.MATH,
        ]
    return None


def check_backend(backend: str) -> None:
    """Raise ValueError if `backend` is unknown, ImportError with the install line if it is not installed."""
    if backend not in BACKENDS:
        raise ValueError(f"attention_backend {backend!r} is unknown; use one of {', '.join(BACKENDS)}")
    if backend == "flash" and _flash_kernel() is None:
        raise ImportError(
            "attention_backend 'flash' needs flash-attn: pip install flash-attn --no-build-isolation; or use 'auto'"
        )


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """Softmax attention without a mask: q [B, Lq, N, D], k and v [B, Lk, N, D] -> [B, Lq, N, D]; dtype kept.

    backend: "auto" takes flash-attn 3 or 2 where installed and the tensors are half precision on CUDA, else torch's
    scaled_dot_product_attention (cuDNN first on Hopper). "flash" insists, "sdpa" declines.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast norms leave them float32, which no half-precision kernel takes
    half_on_cuda = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
    kernel = _flash_kernel() if backend == "flash" or (backend == "auto" and half_on_cuda) else None
    if kernel is not None:
        out = kernel(q, k, v)
        return out[0] if isinstance(out, tuple) else out  # some flash-attn 3 releases also return the log-sum-exp
    priority = None if torch.compiler.is_compiling() else _sdpa_priority(q.device)
    with sdpa_kernel(priority, set_priority=True) if priority else nullcontext():
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask, backend: str = "auto") -> Tensor:
    """Attention under a prepared BlockCausalMask (`mask.prepare(device)`), [B, L, N, D] each; dtype kept.

    A flex BlockMask runs in compiled flex-attention; a dense bool [L, L] in SDPA, its twin for the CPU, where
    flex-attention has no backward; None, which masks nothing, as `attention` does.
    """
    if mask is None:
        return attention(q, k, v, backend)
    q, k, v = (x.to(v.dtype).transpose(1, 2) for x in (q, k, v))  # see attention()
    if isinstance(mask, Tensor):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    else:
        out = _compiled_flex_attention()(q, k, v, block_mask=mask)
    return out.transpose(1, 2)
