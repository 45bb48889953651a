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

from .attention_8bit import MIN_KEYS, ROUNDINGS, attention_8bit, check_8bit
from .cudnn_attention import HALF, cudnn_attention, cudnn_takes, is_hopper

FLASH = {  # the modules of flash-attn's releases, and the major compute capabilities that each is for; the first goes
    "flash3": ("flash_attn_interface", (8, 9)),
    "flash4": ("flash_attn.cute", (9, 10, 11, 12)),
    "flash2": ("flash_attn.flash_attn_interface", (8, 9, 10, 11, 12)),
}
EXACT = ("sdpa", "cudnn", *FLASH)
BACKENDS = ("auto", "fastest", "flash", *EXACT, *ROUNDINGS)

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


# Dictionaries, into which torch.compile sees: it would trace through a cached function to the import.
_flash_kernels: dict[str, Callable | None] = {}
_flash_releases: dict[torch.device, str | None] = {}


def _flash_kernel(release: str) -> Callable | None:
    """That of one of flash-attn's releases, all of which are optional."""
    if release not in _flash_kernels:
        module, _ = FLASH[release]
        there = find_spec(module.split(".")[0]) is not None and find_spec(module) is not None
        _flash_kernels[release] = import_module(module).flash_attn_func if there else None
    return _flash_kernels[release]


def _flash_release(device: torch.device) -> str | None:
    """The one to take on a device."""
    if device not in _flash_releases:
        installed = [release for release in FLASH if _flash_kernel(release)]
        major = torch.cuda.get_device_capability(device)[0] if installed and device.type == "cuda" else None
        _flash_releases[device] = next((release for release in installed if major in FLASH[release][1]), None)
    return _flash_releases[device]


@lru_cache(maxsize=8)
def _sdpa_priority(device: torch.device) -> list[SDPBackend] | None:
    """On Hopper cuDNN's kernel is the fastest, but torch asks flash first; elsewhere torch's order stands."""
    if is_hopper(device):
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
    if backend not in ("flash", *FLASH):
        return
    if not any(_flash_kernel(release) for release in FLASH if backend in ("flash", release)):
        how = {"flash3": "build flash-attn's hopper folder", "flash4": "pip install flash-attn-4"}
        raise ImportError(
            f"attention_backend {backend!r} needs flash-attn: "
            f"{how.get(backend, 'pip install flash-attn --no-build-isolation')}; or use 'auto'"
        )


def check_device(backend: str, device: torch.device) -> None:
    """Raise ValueError if a backend that is installed does not run on that device."""
    if backend in ROUNDINGS:
        check_8bit(backend, device)
    if backend not in ("cudnn", "flash", *FLASH):
        return
    what = "a CPU"
    if device.type == "cuda":
        what = "{} with {}.{}".format(torch.cuda.get_device_name(device), *torch.cuda.get_device_capability(device))
        major, _ = torch.cuda.get_device_capability(device)
        suits = major in FLASH[backend][1] if backend in FLASH else _flash_release(device)
        if backend == "cudnn" or suits:
            return
    raise ValueError(f"attention_backend {backend!r} does not run on {what}; set attention_backend=auto")


def available_backends(device: torch.device) -> list[str]:
    """Backends that can be had on a device, exact ones first; none of them twice under two names."""
    found = []
    for backend in (*EXACT, *ROUNDINGS):
        if backend == "cudnn" and (device.type != "cuda" or _sdpa_priority(device)):
            continue  # sdpa takes it
        try:
            check_backend(backend)
            check_device(backend, device)
        except (ImportError, ValueError):
            continue
        found.append(backend)
    return found


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """Softmax attention without a mask: q [B, Lq, N, D], k and v [B, Lk, N, D] -> [B, Lq, N, D]; dtype kept.

    backend: "auto" takes flash-attn where installed and the tensors are half precision on CUDA, else torch's
    scaled_dot_product_attention (cuDNN first on Hopper). "flash", "flash4", "flash3" and "flash2" insist, "sdpa"
    declines, "cudnn" insists on cuDNN's. "int8", "float8" and "int8_scores" round (wan.modules.attention_8bit), where
    there are many keys. "fastest" is "auto" until a pipeline has measured (pipeline.attention_choice).
    """
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast norms leave them float32, which no half-precision kernel takes
    if backend in ROUNDINGS and k.shape[1] >= MIN_KEYS:
        return attention_8bit(q, k, v, backend)
    release = backend if backend in FLASH else None
    if backend == "flash" or (backend not in EXACT and q.is_cuda and q.dtype in HALF):
        release = _flash_release(q.device)
    if release is None and backend == "flash":
        check_device(backend, q.device)
    kernel = _flash_kernel(release) if release else None
    if kernel is not None:
        out = kernel(q, k, v)
        return out[0] if isinstance(out, tuple) else out  # some releases also return the log-sum-exp
    if cudnn_takes(q, k, v):
        return cudnn_attention(q, k, v)
    priority = None
    if not torch.compiler.is_compiling():
        priority = [SDPBackend.CUDNN_ATTENTION] if backend == "cudnn" else _sdpa_priority(q.device)
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
