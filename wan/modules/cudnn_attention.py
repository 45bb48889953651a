"""cuDNN's attention on Hopper, its keys in parts where that fills the GPU better.

A multiprocessor works on a tile of queries from the first key to the last. A block of a stream has few tiles: 12 heads
of 4,680 queries make 444 for 132 multiprocessors, which is 4 rounds, the last of them a third full. With the keys in
two parts there are 888 tiles of half the length: 7 half rounds. What the parts give is then weighed by their sums of
exponentials, which is exact.

    y = sum_p w_p y_p,  w_p = exp(l_p) / sum_p exp(l_p),  l_p = log sum_n exp(score[n]) over the keys of part p
"""

from importlib.util import find_spec

import torch
from torch import Tensor

TILE = 128  # queries that a multiprocessor works on at a time
MAX_PARTS = 3
MIN_KEYS = 4096  # below, weighing costs what is won
MIN_GAIN = 0.03
HEAD_DIMS = (64, 128)
HALF = (torch.float16, torch.bfloat16)

_hopper: dict[torch.device, bool] = {}  # torch.compile sees into a dictionary: what was asked before is not asked by it


def _has_triton() -> bool:
    try:
        return find_spec("triton") is not None
    except ModuleNotFoundError:
        return False


HAS_TRITON = _has_triton()  # a constant, which torch.compile need not ask about


def is_hopper(device: torch.device) -> bool:
    if device not in _hopper:
        _hopper[device] = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return _hopper[device]


def cudnn_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `cudnn_attention` takes them: on Hopper, in half precision, without gradient."""
    if not (q.is_cuda and q.dtype in HALF and q.shape[-1] in HEAD_DIMS and is_hopper(q.device)):
        return False
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return False
    return torch.compiler.is_compiling() or torch.backends.cuda.cudnn_sdp_enabled()


def num_parts(batch_size: int, num_queries: int, num_heads: int, num_keys: int, num_processors: int) -> int:
    """Parts of the keys, of equal length, that leave the fewest multiprocessors idle; 1 unless it is worth it."""
    if batch_size > 1 or num_keys < MIN_KEYS:  # parts take the place of the batch
        return 1
    tiles = num_heads * -(-num_queries // TILE)

    def rounds(parts: int) -> float:
        return -(-tiles * parts // num_processors) / parts

    best = min((parts for parts in range(1, MAX_PARTS + 1) if num_keys % parts == 0), key=rounds)
    return best if rounds(best) < (1 - MIN_GAIN) * rounds(1) else 1


@torch.library.custom_op("longtake::cudnn_attention", mutates_args=())
def cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, Lq, N, D], k and v [B, Lk, N, D] -> [B, Lq, N, D]. One operation to torch.compile."""
    batch_size, num_queries, num_heads, _ = q.shape
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    parts = num_parts(batch_size, num_queries, num_heads, k.shape[1], processors) if HAS_TRITON else 1
    if parts > 1:
        q, k, v = q.expand(parts, -1, -1, -1), *(x[0].unflatten(0, (parts, -1)) for x in (k, v))
    out, sums = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, parts > 1
    )[:2]
    out = out.transpose(1, 2).contiguous()
    if parts == 1:
        return out
    from .triton_attention import weigh_parts

    with torch.cuda.device(q.device):  # Triton launches on the current one
        return weigh_parts(out, sums.reshape(parts, num_heads, num_queries))


@cudnn_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
