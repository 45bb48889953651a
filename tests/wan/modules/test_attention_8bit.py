"""wan/modules/attention_8bit.py: the arithmetic on a CPU against float64, and the kernels against both on a GPU."""

from functools import partial

import pytest
import torch
from torch import Tensor

from tests.wan.modules.recording import check_compiled_and_recorded
from wan.modules.attention import attention
from wan.modules.attention_8bit import MIN_KEYS, ROUNDINGS, attention_8bit, emulated

# What rounding to 8 bits costs of normally distributed numbers: e4m3 has 3 bits of mantissa, int8 127 steps.
ERRORS = {"int8": (0.03, 0.045), "float8": (0.045, 0.065), "int8_scores": (0.008, 0.015)}


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def draw(num_queries: int, num_keys: int, head_dim: int, device: str = "cpu", dtype: torch.dtype = torch.float32):
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device}
    lengths = (num_queries, num_keys, num_keys)
    return tuple(torch.randn(2, length, 3, head_dim, **options).to(dtype) for length in lengths)


@pytest.mark.parametrize("backend", ROUNDINGS)
@pytest.mark.parametrize(("num_keys", "head_dim"), [(300, 64), (256, 128), (1, 64)])
def test_rounding_costs_what_8_bits_cost(backend: str, num_keys: int, head_dim: int):
    q, k, v = draw(50, num_keys, head_dim)
    found = attention_8bit(q, k, v, backend)
    low, high = ERRORS[backend] if num_keys > 1 else (-1, 1e-6)  # one value is its own mean
    assert low < relative(found, exact(q, k, v)) < high
    assert found.dtype == torch.float32
    assert attention_8bit(q.half(), k.half(), v.half(), backend).dtype == torch.float16


@pytest.mark.parametrize("backend", ROUNDINGS)
def test_offsets_of_keys_and_values_cost_nothing(backend: str):
    """Keys all far from zero, as those of real layers are, would fill int8's steps with what softmax does not see."""
    q, k, v = draw(50, 300, 64)
    plain = emulated(q, k, v, ROUNDINGS[backend])
    moved = emulated(q, k + 20 * torch.randn(2, 1, 3, 64), v + 5, ROUNDINGS[backend])
    assert relative(moved - 5, plain) < 0.03  # sums of another order decide which way some numbers are rounded


def test_what_it_cannot_do_is_refused():
    q, k, v = draw(5, MIN_KEYS, 64)
    with pytest.raises(ValueError, match="'int8' has no gradient; set attention_backend=auto for training"):
        attention(q.requires_grad_(), k, v, "int8")
    with torch.no_grad():
        attention(q, k, v, "int8")
    with pytest.raises(ValueError, match="heads of 64 and 128 channels, this model's have 32; set .*=auto"):
        attention_8bit(*draw(5, 9, 32), "int8")


# ------------------------------------------------------------------------------------------------ on a GPU

SHAPES = [(4680, 9360, 128), (130, 2049, 128), (1, 2500, 64), (128, 4096, 64)]


def cached(num_queries: int, num_keys: int, head_dim: int, dtype: torch.dtype = torch.bfloat16):
    """Queries that are a third of a wider tensor; keys and values the first tokens of a slab whose rest is NaN."""
    q, k, v = draw(num_queries, num_keys, head_dim, "cuda", dtype)
    wide = torch.cat([q, q + 1, q + 2], dim=2)
    slabs = [torch.full((2, num_keys + 100, 3, head_dim), float("nan"), device="cuda", dtype=dtype) for _ in range(2)]
    for slab, x in zip(slabs, (k + torch.randn(2, 1, 3, head_dim, device="cuda").to(dtype), v), strict=True):
        slab[:, :num_keys] = x
    return wide[:, :, :3], slabs[0][:, :num_keys], slabs[1][:, :num_keys]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ROUNDINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_gpu_computes_as_emulated(backend: str, shape: tuple[int, int, int]):
    """As far from the truth, not the same numbers: offsets of sampled keys and running maxima move what is rounded."""
    q, k, v = cached(*shape)
    poison = torch.full_like(q, float("nan"), memory_format=torch.contiguous_format)
    del poison  # the next empty tensor of that size lies there
    found = attention_8bit(q, k, v, backend)
    some = slice(None, None, max(1, shape[0] // 200))
    truth, rounded = exact(q[:, some], k, v), emulated(q[:, some], k, v, ROUNDINGS[backend])
    assert found.shape == q.shape and found.dtype == q.dtype and found.isfinite().all()
    assert relative(found[:, some], truth) == pytest.approx(relative(rounded, truth), rel=0.25)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ROUNDINGS)
def test_one_stream_on_a_gpu_has_its_keys_in_parts(backend: str):
    """Which is as far from the truth as all at once."""
    q, k, v = (x[:1] for x in cached(1300, 9360, 128))
    found, some = attention_8bit(q, k, v, backend), slice(None, None, 7)
    truth, rounded = exact(q[:, some], k, v), emulated(q[:, some], k, v, ROUNDINGS[backend])
    assert found.shape == q.shape and found.isfinite().all()
    assert relative(found[:, some], truth) == pytest.approx(relative(rounded, truth), rel=0.25)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ROUNDINGS)
def test_large_scores_stay_finite(backend: str):
    """One key per query that takes all of its weight, scores of 900: the value of that key comes out."""
    q, k, v = draw(300, 2500, 128, "cuda", torch.bfloat16)
    q = k[:, :300] * 80
    found = attention_8bit(q, k, v, backend)
    assert relative(found, v[:, :300]) < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ROUNDINGS)
def test_values_that_no_sample_saw_are_not_cut_off(backend: str):
    """One key of 2,500 has a value, but for a channel that moves; only some keys are looked at for their range."""
    q, k, v = draw(300, 2500, 128, "cuda", torch.bfloat16)
    q = k[:, 600:900] * 4
    v = torch.cat([v[..., :1], torch.zeros_like(v[..., 1:])], dim=-1)
    v[:, 777] = 3
    found, truth = attention_8bit(q, k, v, backend), exact(q, k, v)
    assert relative(found[:, 177], truth[:, 177]) < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["int8", "int8_scores"])
def test_inside_compiled_code_and_cuda_graphs(backend: str):
    check_compiled_and_recorded(partial(attention, backend=backend), *cached(130, 2500, 128))


@pytest.mark.gpu
def test_the_operation_is_one_that_torch_knows():
    from wan.modules.attention_8bit import _on_gpu

    q, k, v = cached(5, 300, 64)
    torch.library.opcheck(_on_gpu, (q, k, v, "int8"), test_utils=("test_schema", "test_faketensor"))
