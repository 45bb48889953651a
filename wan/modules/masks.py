"""Who may look at whom: the block-causal mask, drawn once per frame and used by every attention kernel."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import torch
from torch import Tensor


def block_starts(num_frames: int, num_frame_per_block: int, independent_first_frame: bool = False) -> list[int]:
    """First frame of each block, and num_frames at the end: [0, 3, 6, 9] for 9 frames in blocks of 3.

    With `independent_first_frame` frame 0 is a block of its own: [0, 1, 4, 7] for 7 frames.
    Raises ValueError when the frames do not split into whole blocks.
    """
    if num_frame_per_block < 1 or num_frames < 1:
        raise ValueError(f"{num_frames} latent frames in blocks of {num_frame_per_block}: both must be at least 1")
    first = 1 if independent_first_frame else 0
    whole, rest = divmod(num_frames - first, num_frame_per_block)
    if rest:
        lower, upper = first + whole * num_frame_per_block, first + (whole + 1) * num_frame_per_block
        plus = "1 frame and then blocks" if independent_first_frame else "blocks"
        raise ValueError(
            f"{num_frames} latent frames do not split into {plus} of {num_frame_per_block}; "
            f"use {lower or upper} or {upper} ({upper} latent frames are {4 * upper - 3} pixel frames)"
        )
    return ([0] if first else []) + list(range(first, num_frames + 1, num_frame_per_block))


@dataclass(frozen=True)
class BlockCausalMask:
    """Attention pattern of a whole clip, block by block.

    A block sees itself and every earlier block:             with local_attn_size=4 (frames, counted from the
                                                             block's END) and sink_size=1:
        frames     0 1 2 3 4 5   num_frame_per_block=2           0 1 2 3 4 5
        block 0  0 x x . . . .                                 0 x x . . . .
                 1 x x . . . .                                 1 x x . . . .
        block 1  2 x x x x . .                                 2 x x x x . .
                 3 x x x x . .                                 3 x x x x . .
        block 2  4 x x x x x x                                 4 x . . x x x   sink 0, then the last 3 = 4 - 1 frames
                 5 x x x x x x                                 5 x . . x x x

    The window holds local_attn_size frames in all, the sink included: exactly what a cache of that size holds.
    With `teacher_forcing` the sequence is [clean | noisy]: clean rows are as above; a noisy block sees the clean frames
    before it (same window) and its own noisy frames, never its own clean ones.
    """

    num_frames: int
    frame_seqlen: int = 1
    num_frame_per_block: int = 1
    local_attn_size: int = -1
    sink_size: int = 0
    independent_first_frame: bool = False
    teacher_forcing: bool = False

    def __post_init__(self):
        check_window(self.local_attn_size, self.sink_size, self.num_frame_per_block)
        block_starts(self.num_frames, self.num_frame_per_block, self.independent_first_frame)

    @property
    def num_tokens(self) -> int:
        return self.num_frames * self.frame_seqlen * (2 if self.teacher_forcing else 1)

    @cached_property
    def frame_mask(self) -> Tensor:
        """bool [F, F] (or [2F, 2F] under teacher forcing): may query frame i see key frame j?"""
        starts = block_starts(self.num_frames, self.num_frame_per_block, self.independent_first_frame)
        causal = torch.zeros(self.num_frames, self.num_frames, dtype=torch.bool)
        own = torch.zeros_like(causal)
        for start, stop in pairwise(starts):
            for first, last in visible_ranges(stop, self.local_attn_size, self.sink_size):
                causal[start:stop, first:last] = True
            own[start:stop, start:stop] = True
        if not self.teacher_forcing:
            return causal
        nothing = torch.zeros_like(causal)
        return torch.cat([torch.cat([causal, nothing], 1), torch.cat([causal & ~own, own], 1)], 0)

    def dense(self, device: torch.device | str = "cpu") -> Tensor:
        """bool [num_tokens, num_tokens], for scaled_dot_product_attention."""
        mask = self.frame_mask.to(device)
        return mask.repeat_interleave(self.frame_seqlen, 0).repeat_interleave(self.frame_seqlen, 1)

    def block_mask(self, device: torch.device | str):
        """The same pattern as a flex-attention BlockMask."""
        return _flex_block_mask(self, torch.device(device))

    def prepare(self, device: torch.device | str):
        """What `masked_attention` takes: a flex BlockMask on CUDA, the dense mask elsewhere, made once.

        None where everything sees everything, as in a clip of one block.
        """
        device = torch.device(device)
        if self.frame_mask.all():
            return None
        return self.block_mask(device) if device.type == "cuda" else _dense_mask(self, device)


def check_window(local_attn_size: int, sink_size: int, num_frame_per_block: int) -> None:
    """Refuse a window that cannot hold its sink and one block."""
    if local_attn_size == -1:
        return
    if sink_size < 0 or local_attn_size < sink_size + num_frame_per_block:
        raise ValueError(
            f"local_attn_size {local_attn_size} cannot hold {sink_size} sink frames and a block of "
            f"{num_frame_per_block}; use at least {max(sink_size, 0) + num_frame_per_block}, or -1 for the whole past"
        )


def visible_ranges(stop: int, local_attn_size: int, sink_size: int) -> list[tuple[int, int]]:
    """Frames that a block ending before frame `stop` sees, as half-open ranges: the sink, then the newest frames."""
    if local_attn_size == -1 or stop <= local_attn_size:
        return [(0, stop)]
    newest = (stop - (local_attn_size - sink_size), stop)
    return [(0, sink_size), newest] if sink_size else [newest]


def runs(frames: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Consecutive indices as half-open ranges: [0, 4, 5, 6, 1] -> (0, 1), (4, 7), (1, 2)."""
    start = 0
    for i in range(1, len(frames) + 1):
        if i == len(frames) or frames[i] != frames[i - 1] + 1:
            yield frames[start], frames[i - 1] + 1
            start = i


@lru_cache(maxsize=4)
def _dense_mask(mask: BlockCausalMask, device: torch.device) -> Tensor:
    return mask.dense(device)


@lru_cache(maxsize=16)
def _flex_block_mask(mask: BlockCausalMask, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    frame_mask, frame_seqlen = mask.frame_mask.to(device), mask.frame_seqlen

    def mask_mod(batch, head, query, key):
        return frame_mask[query // frame_seqlen, key // frame_seqlen]

    compile_it = device.type == "cuda"  # eager, the builder would hold a [tokens, tokens] matrix
    length = mask.num_tokens
    return create_block_mask(mask_mod, None, None, length, length, device=device, _compile=compile_it)
