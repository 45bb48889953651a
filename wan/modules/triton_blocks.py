"""What blocks of the transformer and of the VAE do beside their products, in Triton: wan.modules.fused says what it is.

A program has the numbers of one token (of some pixels), reads them once and keeps them in registers.
Shapes: R rows (tokens of all samples), C columns, F frames of all samples, D head size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = tl.constexpr(448.0)  # of e4m3


@triton.jit
def _round_row(value, largest, out, scale_out, row, place, there):
    """A row in e4m3, and the scale that gives its numbers back."""
    scale = tl.maximum(largest, 1e-12) / LARGEST
    rounded = (value / scale).to(tl.float8e4nv, fp_downcast_rounding="rtne")
    tl.store(out + place, rounded, mask=there)
    tl.store(scale_out + row, scale)


@triton.jit
def _normalise(
    x,  # [R, C]
    update,  # [R, C], with HAS_UPDATE
    weight,  # [C], with AFFINE, as bias
    bias,
    time,  # [F, 6, C] float32
    modulation,  # [6, C]
    x_out,  # [R, C], with HAS_UPDATE
    y,  # [R, C]
    scale_out,  # [R], with FLOAT8
    rows_per_frame,
    eps,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    GATE: tl.constexpr,  # which of the six; -1: none
    AFFINE: tl.constexpr,
    SHIFT: tl.constexpr,  # and the scale is the one after it; -1: none
    FLOAT8: tl.constexpr,
):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    there = column < C
    place, frame = row.to(tl.int64) * C + column, row // rows_per_frame
    value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    if HAS_UPDATE:
        added = tl.load(update + place, mask=there, other=0.0).to(tl.float32)
        if GATE >= 0:
            gate = tl.load(modulation + GATE * C + column, mask=there, other=0.0).to(tl.float32)
            added *= gate + tl.load(time + frame * 6 * C + GATE * C + column, mask=there, other=0.0)
        kept = (value + added).to(x_out.dtype.element_ty)
        tl.store(x_out + place, kept, mask=there)
        value = kept.to(tl.float32)
    mean = tl.sum(value, 0) / C
    value = tl.where(there, value - mean, 0.0)
    value *= tl.rsqrt(tl.sum(value * value, 0) / C + eps)
    if AFFINE:
        value = value * tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
        value += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)
    if SHIFT >= 0:
        shift = tl.load(modulation + SHIFT * C + column, mask=there, other=0.0).to(tl.float32)
        shift += tl.load(time + frame * 6 * C + SHIFT * C + column, mask=there, other=0.0)
        scale = tl.load(modulation + (SHIFT + 1) * C + column, mask=there, other=0.0).to(tl.float32)
        scale += tl.load(time + frame * 6 * C + (SHIFT + 1) * C + column, mask=there, other=0.0)
        value = value * (1 + scale) + shift
    if FLOAT8:
        _round_row(value, tl.max(tl.abs(value), 0), y, scale_out, row, place, there)
    else:
        tl.store(y + place, value.to(y.dtype.element_ty), mask=there)


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
    """wan.modules.fused.normalise"""
    columns = x.shape[-1]
    num_rows, num_frames = x.numel() // columns, time.shape[0] * time.shape[1]
    x, time, modulation = x.contiguous(), time.contiguous(), modulation.contiguous()
    x_out = x.new_empty(0) if update is None else torch.empty_like(x)
    y = torch.empty_like(x, dtype=torch.float8_e4m3fn if float8 else x.dtype)
    scales = x.new_empty((num_rows, 1) if float8 else (0, 1), dtype=torch.float32)
    _normalise[(num_rows,)](
        x,
        x if update is None else update.contiguous(),
        x if weight is None else weight,
        x if bias is None else bias,
        time,
        modulation,
        x_out,
        y,
        scales,
        num_rows // num_frames,
        eps,
        C=columns,
        BLOCK=triton.next_power_of_2(columns),
        HAS_UPDATE=update is not None,
        GATE=gate,
        AFFINE=weight is not None,
        SHIFT=shift,
        FLOAT8=float8,
        num_warps=4 if columns <= 2048 else 8,
    )
    return x_out, y, scales


@triton.jit
def _gelu(x):
    """The tanh form: 0.5 x (1 + tanh u) = x sigmoid(2 u)."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _quantise(
    x,  # [R, C]
    out,  # [R, C] e4m3
    scale_out,  # [R]
    C: tl.constexpr,
    FIRST: tl.constexpr,  # columns of a row in two pieces whose lengths are powers of 2, for few idle threads
    REST: tl.constexpr,
    GELU: tl.constexpr,
):
    row = tl.program_id(0)
    start, first = row.to(tl.int64) * C, tl.arange(0, FIRST)
    value = tl.load(x + start + first).to(tl.float32)
    if GELU:
        value = _gelu(value)
    largest = tl.max(tl.abs(value), 0)
    if REST > 0:
        rest = FIRST + tl.arange(0, REST)
        tail = tl.load(x + start + rest, mask=rest < C, other=0.0).to(tl.float32)
        if GELU:
            tail = _gelu(tail)
        largest = tl.maximum(largest, tl.max(tl.abs(tail), 0))
        _round_row(tail, largest, out, scale_out, row, start + rest, rest < C)
    _round_row(value, largest, out, scale_out, row, start + first, first < C)


def quantise(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """wan.modules.fused.quantise"""
    x = x.contiguous()
    num_rows, columns = x.shape
    out, scales = torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty(num_rows, 1, dtype=torch.float32)
    first = 1 << (columns.bit_length() - 1)
    rest = triton.next_power_of_2(columns - first) if columns > first else 0
    warps = 4 if columns <= 2048 else 8
    _quantise[(num_rows,)](x, out, scales, C=columns, FIRST=first, REST=rest, GELU=gelu, num_warps=warps)
    return out, scales


@triton.jit
def _finish_projection(
    joined,  # [B * L, 3 C]: queries, keys, values
    weight_q,  # [C]
    weight_k,
    cos,  # [L, D / 2] float32
    sin,
    q_out,  # [B * L, C]
    k_out,  # [B, L, C], samples k_batch numbers apart
    v_out,
    k_batch,
    v_batch,
    num_tokens,
    eps,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,  # D / 2
):
    row, part = tl.program_id(0), tl.program_id(1)
    column, sample, token = tl.arange(0, BLOCK), row // num_tokens, row % num_tokens
    there = column < C
    value = tl.load(joined + row.to(tl.int64) * 3 * C + part * C + column, mask=there, other=0.0)
    if part == 2:
        tl.store(v_out + sample.to(tl.int64) * v_batch + token.to(tl.int64) * C + column, value, mask=there)
    else:
        number = value.to(tl.float32)
        number *= tl.rsqrt(tl.sum(number * number, 0) / C + eps)
        if part == 0:
            number *= tl.load(weight_q + column, mask=there, other=0.0).to(tl.float32)
        else:
            number *= tl.load(weight_k + column, mask=there, other=0.0).to(tl.float32)
        pair = tl.arange(0, BLOCK // 2) % PAIRS
        turn_cos, turn_sin = tl.load(cos + token * PAIRS + pair), tl.load(sin + token * PAIRS + pair)
        even, odd = tl.split(tl.reshape(number, [BLOCK // 2, 2]))
        turned = tl.join(even * turn_cos - odd * turn_sin, even * turn_sin + odd * turn_cos)
        turned = tl.reshape(turned, [BLOCK]).to(q_out.dtype.element_ty)
        if part == 0:
            tl.store(q_out + row.to(tl.int64) * C + column, turned, mask=there)
        else:
            tl.store(k_out + sample.to(tl.int64) * k_batch + token.to(tl.int64) * C + column, turned, mask=there)


def finish_projection(
    joined: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    eps: float,
    rope: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """joined [B, L, 3 C] -> queries [B, L, N, D], normalised over C and rotated; so keys, and values as they come, are
    written to where they are kept, [B, L, N, D] each with heads side by side. rope: cosines and sines [L, 1, D / 2].
    """
    batch_size, num_tokens, num_heads, head_dim = keys.shape
    columns = num_heads * head_dim
    joined, q = joined.contiguous(), joined.new_empty(batch_size, num_tokens, num_heads, head_dim)
    with torch.cuda.device(joined.device):  # Triton launches on the current one
        _finish_projection[(batch_size * num_tokens, 3)](
            joined,
            weight_q,
            weight_k,
            *(part.contiguous() for part in rope),
            q,
            keys,
            values,
            keys.stride(0),
            values.stride(0),
            num_tokens,
            eps,
            C=columns,
            BLOCK=triton.next_power_of_2(columns),
            PAIRS=head_dim // 2,
            num_warps=4 if columns <= 2048 else 8,
        )
    return q


@triton.jit
def _norm_silu(
    x,  # [B, T * S, C]
    gamma,  # [C]
    past,  # [B, P * S, C], with HAS_PAST
    out,  # [B, (P + T) * S, C]
    past_batch,  # numbers between samples of the past
    num_pixels,  # T * S
    past_pixels,  # P * S
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_PAST: tl.constexpr,
):
    sample, column = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)[None, :]
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    total = num_pixels + past_pixels
    is_past, there = row < past_pixels, (row < total) & (column < C)
    here = sample * num_pixels * C + (row - past_pixels) * C + column
    value = tl.load(x + here, mask=there & (row >= past_pixels), other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(value * value, 1)), 1e-12)[:, None]
    value *= tl.sqrt(C * 1.0) / length
    value *= tl.load(gamma + column, mask=column < C, other=0.0).to(tl.float32)
    value *= tl.sigmoid(value)
    if HAS_PAST:
        before = tl.load(past + sample * past_batch + row * C + column, mask=there & is_past, other=0.0)
        value = tl.where(is_past, before.to(tl.float32), value)
    tl.store(out + sample * total * C + row * C + column, value.to(out.dtype.element_ty), mask=there)


def norm_silu(x: Tensor, gamma: Tensor, past: Tensor | None, num_past: int) -> Tensor:
    """wan.modules.fused.norm_silu"""
    batch_size, channels, num_frames, height, width = x.shape
    x = x.movedim(1, -1).contiguous()
    out = x.new_empty(batch_size, num_past + num_frames, height, width, channels)
    if past is not None:
        past = past.movedim(1, -1)
        past = past if past[0].is_contiguous() else past.contiguous()
    size, rows = height * width, max(1, 4096 // triton.next_power_of_2(channels))
    _norm_silu[(triton.cdiv((num_past + num_frames) * size, rows), batch_size)](
        x,
        gamma,
        x if past is None else past,
        out,
        0 if past is None else past.stride(0),
        num_frames * size,
        num_past * size,
        C=channels,
        BLOCK=triton.next_power_of_2(channels),
        ROWS=rows,
        HAS_PAST=past is not None,
        num_warps=4,
    )
    return out.movedim(-1, 1)
