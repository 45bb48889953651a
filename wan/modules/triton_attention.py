"""Attention in 8 bits for GPUs, in Triton, which this file alone imports: wan.modules.attention_8bit says what it does.

Three kernels, one after the other: means and units of keys and values, their rounding, and attention itself.
Queries are rounded where they are read. A fourth weighs what parts of the keys gave (wan.modules.cudnn_attention).

Shapes: B batch, Lq queries, Lk keys, N heads, D head size, T = ceil(Lk / BLOCK_N) tiles of keys, P parts of them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cudnn_attention import num_parts

LOG2_E = 1.4426950408889634
NUM_SAMPLES = 256  # keys that means and units are taken from


class Tile(NamedTuple):
    """Queries and keys that one program looks at together, and how it is laid out on the GPU."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int  # tiles of keys in shared memory at a time: less than the 99 kB of cards for desks in either case


TILES = {True: Tile(64, 128, 4, 3), False: Tile(64, 64, 4, 3)}  # for values in 8 bits, and as they come

LENGTHS = ["num_queries", "num_keys", "num_tiles"]  # one code for all of them


@triton.jit(do_not_specialize=LENGTHS)
def _statistics(
    k,
    v,
    statistics,  # [3, B * N, D] float32: mean of keys, mean and unit of values
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    num_keys,
    num_heads,
    D: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """Over SAMPLES keys spread over all of them."""
    batch_head, rows = tl.program_id(0), tl.num_programs(0)
    batch, head = (batch_head // num_heads).to(tl.int64), batch_head % num_heads
    count = tl.minimum(num_keys, SAMPLES)
    sample = tl.arange(0, SAMPLES)
    token = ((sample * (num_keys // count)) % num_keys).to(tl.int64)
    there, channel = (sample < count)[:, None], tl.arange(0, D)
    key = tl.load(k + batch * k_batch + head * k_head + token[:, None] * k_token + channel, mask=there, other=0.0)
    value = tl.load(v + batch * v_batch + head * v_head + token[:, None] * v_token + channel, mask=there, other=0.0)
    value = value.to(tl.float32)
    mean = tl.sum(value, 0) / count
    away = tl.where(there, value - mean, 0.0)
    deviation = tl.sqrt(tl.sum(away * away, 0) / count)
    least = tl.max(deviation, 0) * 0.1  # a channel that hardly moves among the samples may elsewhere
    unit = tl.maximum(deviation, tl.where(least > 0, least, 1.0)) * 4
    tl.store(statistics + batch_head * D + channel, tl.sum(key.to(tl.float32), 0) / count)
    tl.store(statistics + (rows + batch_head) * D + channel, mean)
    tl.store(statistics + (2 * rows + batch_head) * D + channel, unit)


@triton.jit
def _value_order(row):
    """Which value stands in which row of a tile, so that weights are multiplied by the threads that computed them.

    Of 16 neighbouring scores a thread has 2 and 2 more, 8 further on; of 16 factors in 8 bits it is to have 4 in a row:

        score    0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15        thread  0 0 1 1 2 2 3 3 0 0 1 1 2 2 3 3
        factor   0  1  8  9  2  3 10 11  4  5 12 13  6  7 14 15                0 0 0 0 1 1 1 1 2 2 2 2 3 3 3 3
    """
    return (row // 16) * 16 + (row // 2 % 2) * 8 + (row // 4 % 4) * 2 + row % 2


@triton.jit(do_not_specialize=LENGTHS)
def _round_keys(
    k,
    v,
    statistics,
    k8,  # [B * N, T * BLOCK_N, D]
    v8,  # [B * N, D, T * BLOCK_N]: the products of 8 bits want what they sum over to lie side by side
    scales,  # [B * N, T] float32
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    num_keys,
    num_heads,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INT8: tl.constexpr,
    VALUES: tl.constexpr,
):
    """One tile of keys, and with VALUES of values; what lies behind the last key becomes 0.

    The largest number of a tile of keys is 127 in int8, 448 in e4m3. The unit of values is 4 of their deviations: those
    1,792 deviations away are still within e4m3, and those 1/16 of one away have all of its bits.
    """
    tile, batch_head, num_tiles, rows = tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1)
    batch, head = (batch_head // num_heads).to(tl.int64), batch_head % num_heads
    row, channel = tl.arange(0, BLOCK_N), tl.arange(0, D)
    token = (tile * BLOCK_N + row).to(tl.int64)
    there = (token < num_keys)[:, None]
    first = batch_head.to(tl.int64) * num_tiles + tile  # of all tiles

    mean = tl.load(statistics + batch_head * D + channel)
    key = tl.load(k + batch * k_batch + head * k_head + token[:, None] * k_token + channel, mask=there, other=0.0)
    key = tl.where(there, key.to(tl.float32) - mean, 0.0)
    largest = tl.maximum(tl.max(tl.max(tl.abs(key), 1), 0), 1e-12)
    if INT8:
        rounded, scale = tl.floor(key * (127.0 / largest) + 0.5).to(tl.int8), largest / 127.0
    else:
        rounded, scale = (key * (448.0 / largest)).to(tl.float8e4nv, fp_downcast_rounding="rtne"), largest / 448.0
    tl.store(k8 + first * BLOCK_N * D + row[:, None] * D + channel, rounded)
    tl.store(scales + first, scale)
    if VALUES:
        token = (tile * BLOCK_N + _value_order(row)).to(tl.int64)
        there = (token < num_keys)[:, None]
        mean = tl.load(statistics + (rows + batch_head) * D + channel)
        unit = tl.load(statistics + (2 * rows + batch_head) * D + channel)
        value = tl.load(v + batch * v_batch + head * v_head + token[:, None] * v_token + channel, mask=there, other=0.0)
        value = tl.where(there, (value.to(tl.float32) - mean) / unit, 0.0)
        length = num_tiles * BLOCK_N
        v8 += batch_head.to(tl.int64) * D * length + tile * BLOCK_N
        rounded = tl.trans(value.to(tl.float8e4nv, fp_downcast_rounding="rtne"))
        tl.store(v8 + channel[:, None] * length + row, rounded)


@triton.jit
def _attend_tile(
    acc,
    total,
    top,
    query,
    query_scale,
    k8,
    v,
    scales,
    v_token,
    tile,
    num_keys,
    length,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INT8: tl.constexpr,
    VALUES_8BIT: tl.constexpr,
    LAST: tl.constexpr,
):
    """One tile of keys: (sum of weighted values, sum of weights, largest score so far), scores in powers of 2."""
    row, channel = tl.arange(0, BLOCK_N), tl.arange(0, D)
    first = tile * BLOCK_N
    key = tl.load(k8 + first * D + row * D + channel[:, None])
    score = tl.dot(query, key)
    shift = 0.0
    if INT8:
        # Below 2^22 an integer is the mantissa of 3 * 2^22 + itself: an addition, where a conversion takes longer. The
        # shift is taken off again with the largest score.
        shift = 12582912.0
        score = (score + 0x4B400000).to(tl.float32, bitcast=True)
    if LAST:
        score = tl.where(first + row < num_keys, score, float("-inf"))
    scale = query_scale * tl.load(scales + tile)
    new_top = tl.maximum(top, (tl.max(score, 1) - shift) * scale)
    rescale = tl.exp2(top - new_top)
    base = new_top + shift * scale
    if VALUES_8BIT:
        # The largest weight is e4m3's largest number, 448 = 2^8.807.
        weight = tl.exp2(score * scale[:, None] - (base - 8.807354922057604)[:, None])
        value = tl.load(v + first + channel * length + row[:, None])
        # A sum of its own for each tile: that of the tensor cores keeps 14 bits, too few for thousands of keys.
        weight8 = tl.reshape(weight.to(tl.float8e4nv, fp_downcast_rounding="rtne"), [BLOCK_M, BLOCK_N // 16, 2, 4, 2])
        weight8 = tl.reshape(tl.permute(weight8, [0, 1, 3, 2, 4]), [BLOCK_M, BLOCK_N])  # see _value_order
        acc = acc * rescale[:, None] + tl.dot(weight8, value)
    else:
        weight = tl.exp2(score * scale[:, None] - base[:, None])
        values = v + first.to(tl.int64) * v_token + row[:, None] * v_token + channel
        if LAST:  # memory behind the last key may hold anything, and 0 times NaN is NaN
            value = tl.load(values, mask=(first + row < num_keys)[:, None], other=0.0)
        else:
            value = tl.load(values)
        acc = tl.dot(weight.to(value.dtype), value, acc * rescale[:, None])
    return acc, total * rescale + tl.sum(weight, 1), new_top


@triton.jit(do_not_specialize=LENGTHS)
def _attend(
    q,
    k8,
    v,  # [B * N, D, T * BLOCK_N] in e4m3, or the values as they are
    scales,
    statistics,
    out,  # [B, Lq, N, D]; of PARTS > 1, B = 1, [P, Lq, N, D]
    sums,  # [P, N, Lq] float32: logarithms of the sums of exponentials, of PARTS > 1
    q_batch,
    q_token,
    q_head,
    v_batch,
    v_token,
    v_head,
    out_batch,
    out_token,
    out_head,
    num_queries,
    num_keys,
    num_heads,
    num_tiles,
    score_scale,  # log2(e) / sqrt(D)
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INT8: tl.constexpr,
    VALUES_8BIT: tl.constexpr,
    PARTS: tl.constexpr,
):
    batch_head, rows = tl.program_id(1), tl.num_programs(1)
    batch, head = (batch_head // num_heads).to(tl.int64), batch_head % num_heads
    token, channel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, D)
    there = (token < num_queries)[:, None]
    length = num_tiles * BLOCK_N

    queries = q + batch * q_batch + head * q_head + token.to(tl.int64)[:, None] * q_token + channel
    query = tl.load(queries, mask=there, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(query), 1), 1e-12)
    if INT8:
        query = tl.floor(query * (127.0 / largest)[:, None] + 0.5).to(tl.int8)
        query_scale = largest * (score_scale / 127.0)
    else:
        query = (query * (448.0 / largest)[:, None]).to(tl.float8e4nv, fp_downcast_rounding="rtne")
        query_scale = largest * (score_scale / 448.0)

    k8 += batch_head.to(tl.int64) * length * D
    scales += batch_head * num_tiles
    if VALUES_8BIT:
        v += batch_head.to(tl.int64) * D * length
    else:
        v += batch * v_batch + head * v_head

    acc = tl.zeros([BLOCK_M, D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    part = tl.program_id(2)
    last = num_tiles * (part + 1) // PARTS - 1
    for tile in range(num_tiles * part // PARTS, last):
        acc, total, top = _attend_tile(
            acc, total, top, query, query_scale, k8, v, scales, v_token, tile, num_keys, length,
            D, BLOCK_M, BLOCK_N, INT8, VALUES_8BIT, False,
        )  # fmt: skip
    acc, total, top = _attend_tile(
        acc, total, top, query, query_scale, k8, v, scales, v_token, last, num_keys, length,
        D, BLOCK_M, BLOCK_N, INT8, VALUES_8BIT, True,
    )  # fmt: skip
    acc = acc / total[:, None]
    if VALUES_8BIT:
        mean = tl.load(statistics + (rows + batch_head) * D + channel)
        acc = acc * tl.load(statistics + (2 * rows + batch_head) * D + channel) + mean
    outs = out + (batch + part) * out_batch + head * out_head + token.to(tl.int64)[:, None] * out_token + channel
    tl.store(outs, acc.to(out.dtype.element_ty), mask=there)
    if PARTS > 1:
        sum_of_token = sums + (part * num_heads + head) * num_queries + token
        tl.store(sum_of_token, (top + tl.log2(total)) * 0.6931471805599453, mask=token < num_queries)


@triton.jit(do_not_specialize=["num_queries"])
def _weigh_parts(
    parts,  # [P, Lq, N, D]
    sums,  # [P, N, Lq] float32
    out,  # [1, Lq, N, D]
    num_queries,
    num_heads,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PARTS: tl.constexpr,
):
    head, token, channel = tl.program_id(1), tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, D)
    there = token < num_queries
    place = (token.to(tl.int64)[:, None] * num_heads + head) * D + channel
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for part in tl.static_range(PARTS):
        top = tl.maximum(top, tl.load(sums + (part * num_heads + head) * num_queries + token, mask=there, other=0.0))
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for part in tl.static_range(PARTS):
        weight = tl.exp(tl.load(sums + (part * num_heads + head) * num_queries + token, mask=there, other=0.0) - top)
        first = (num_queries * num_heads).to(tl.int64) * D * part
        acc += tl.load(parts + first + place, mask=there[:, None], other=0.0).to(tl.float32) * weight[:, None]
        total += weight
    tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), mask=there[:, None])


def weigh_parts(parts: Tensor, sums: Tensor) -> Tensor:
    """What P parts of the keys gave, [P, Lq, N, D], by their sums of exponentials, [P, N, Lq] -> [1, Lq, N, D]."""
    count, num_queries, num_heads, head_dim = parts.shape
    parts, sums, out = parts.contiguous(), sums.contiguous(), parts.new_empty(1, num_queries, num_heads, head_dim)
    grid = triton.cdiv(num_queries, 32), num_heads
    _weigh_parts[grid](parts, sums, out, num_queries, num_heads, D=head_dim, BLOCK_M=32, PARTS=count, num_warps=4)
    return out


class RoundedKeys(NamedTuple):
    """Keys and values in 8 bits, with what gives their numbers back."""

    keys: Tensor  # [B * N, T * BLOCK_N, D] int8 or e4m3
    values: Tensor  # [B * N, D, T * BLOCK_N] e4m3; empty where values stay as they are
    scales: Tensor  # [B * N, T] float32, of tiles of keys
    statistics: Tensor  # [3, B * N, D] float32: mean of keys, mean and unit of values


def round_keys(k: Tensor, v: Tensor, *, int8_scores: bool, values_8bit: bool, tile: Tile) -> RoundedKeys:
    """k, v [B, Lk, N, D] with channels side by side and any other strides."""
    batch_size, num_keys, num_heads, head_dim = k.shape
    rows, num_tiles = batch_size * num_heads, triton.cdiv(num_keys, tile.keys)
    length = num_tiles * tile.keys
    statistics = k.new_empty(3, rows, head_dim, dtype=torch.float32)
    k8 = k.new_empty(rows, length, head_dim, dtype=torch.int8 if int8_scores else torch.float8_e4m3fn)
    v8 = k.new_empty(rows, head_dim, length, dtype=torch.float8_e4m3fn) if values_8bit else k8.new_empty(0)
    scales = k.new_empty(rows, num_tiles, dtype=torch.float32)
    sizes = (*k.stride()[:3], *v.stride()[:3], num_keys, num_heads)
    _statistics[(rows,)](k, v, statistics, *sizes, D=head_dim, SAMPLES=NUM_SAMPLES, num_warps=8)
    options = {"BLOCK_N": tile.keys, "INT8": int8_scores, "VALUES": values_8bit, "num_warps": 8}
    _round_keys[(num_tiles, rows)](k, v, statistics, k8, v8, scales, *sizes, D=head_dim, **options)
    return RoundedKeys(k8, v8, scales, statistics)


def attend(q: Tensor, v: Tensor, rounded: RoundedKeys, *, int8_scores: bool, values_8bit: bool, tile: Tile) -> Tensor:
    """q [B, Lq, N, D], v [B, Lk, N, D], and the keys (and values) of `round_keys` with the same choices."""
    batch_size, num_queries, num_heads, head_dim = q.shape
    num_keys, num_tiles = v.shape[1], rounded.scales.shape[1]
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    parts = num_parts(batch_size, num_queries, num_heads, num_keys, processors)
    out = q.new_empty(batch_size * parts, *q.shape[1:])
    sums = q.new_empty(parts, num_heads, num_queries, dtype=torch.float32)
    _attend[(triton.cdiv(num_queries, tile.queries), batch_size * num_heads, parts)](
        q,
        rounded.keys,
        rounded.values if values_8bit else v,
        rounded.scales,
        rounded.statistics,
        out,
        sums,
        *q.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:3],
        num_queries,
        num_keys,
        num_heads,
        num_tiles,
        LOG2_E / head_dim**0.5,
        D=head_dim,
        BLOCK_M=tile.queries,
        BLOCK_N=tile.keys,
        INT8=int8_scores,
        VALUES_8BIT=values_8bit,
        PARTS=parts,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )
    return out if parts == 1 else weigh_parts(out, sums)


def attention(
    q: Tensor, k: Tensor, v: Tensor, int8_scores: bool, values_8bit: bool, tile: Tile | None = None
) -> Tensor:
    """wan.modules.attention_8bit.attention_8bit on a GPU; the last stride of each is 1."""
    options = {"int8_scores": int8_scores, "values_8bit": values_8bit, "tile": tile or TILES[values_8bit]}
    return attend(q, v, round_keys(k, v, **options), **options)
