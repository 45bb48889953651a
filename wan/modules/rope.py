"""Rotary positions of video tokens (arXiv 2104.09864, one spectrum per axis as in Wan2.1).

A head of D numbers is D/2 complex pairs: the first part turns with the frame index, the next D/2//3 with the row and
the last D/2//3 with the column (22 + 21 + 21 pairs for D = 128). Angles are computed for the positions asked for, in
float64, so there is no table to outgrow.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .masks import runs

_BASE = 10000.0
Rope = tuple[Tensor, Tensor]  # cosines and sines of tokens, float32 [L, 1, D/2] each


def _axis_angles(positions: Tensor, num_pairs: int) -> Tensor:
    """[len(positions), num_pairs] angles: position * base^(-k/num_pairs)."""
    exponents = torch.arange(num_pairs, dtype=torch.float64, device=positions.device) / num_pairs
    return positions.double()[:, None] * _BASE**-exponents


def rope_frequencies(
    head_dim: int, frames: Sequence[int], height: int, width: int, device: torch.device | str = "cpu"
) -> Rope:
    """Cosines and sines for the tokens of the given frames, ordered frame, row, column.

    frames: absolute latent frame indices (any integers, in any order); height, width: in tokens.
    Returns two float32 tensors [len(frames) * height * width, 1, head_dim / 2].
    """
    num_pairs = head_dim // 2
    spatial = num_pairs // 3
    # Made on the device, run by run: a stream's inner loop copies nothing to it, which would wait for it.
    frame_positions = torch.cat([torch.arange(first, last, device=device) for first, last in runs(frames)])
    num_frames = len(frame_positions)
    time = _axis_angles(frame_positions, num_pairs - 2 * spatial)[:, None, None, :].expand(-1, height, width, -1)
    rows = _axis_angles(torch.arange(height, device=device), spatial)[None, :, None, :].expand(
        num_frames, -1, width, -1
    )
    columns = _axis_angles(torch.arange(width, device=device), spatial)[None, None, :, :].expand(
        num_frames, height, -1, -1
    )
    angles = torch.cat([time, rows, columns], dim=-1).reshape(num_frames * height * width, 1, num_pairs)
    return angles.cos().float(), angles.sin().float()


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotate adjacent pairs of x [B, L, N, D] by rope = (cos, sin), each [L, 1, D/2]; float32 inside, dtype kept."""
    cos, sin = rope
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def remember_rotated(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, rope: Rope) -> None:
    """Write k, rotated, and v, [B, L, N, D] each, to where they are kept."""
    keys.copy_(apply_rope(k, rope))
    values.copy_(v)
