"""wan/modules/cudnn_attention.py: parts of the keys give what all of them give."""

import pytest
import torch
from torch import Tensor

from tests.wan.modules.recording import check_compiled_and_recorded
from wan.modules.attention import attention
from wan.modules.cudnn_attention import cudnn_attention, cudnn_takes, num_parts


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((1, 4680, 12, 18720), 2),  # 444 tiles: 4 rounds, or 7 halves
        ((1, 4680, 12, 32760), 2),
        ((1, 4680, 12, 4680), 2),
        ((1, 14040, 12, 18720), 1),  # 1,320 tiles: 10 rounds, all full
        ((1, 4680, 40, 18720), 3),  # of 14B: 12 rounds, or 34 thirds
        ((1, 4680, 12, 18721), 1),  # which no number divides
        ((1, 4680, 12, 512), 1),  # a prompt
        ((2, 4680, 12, 18720), 1),
        ((1, 192, 4, 16383), 3),  # far fewer tiles than multiprocessors
    ],
)
def test_keys_are_parted_where_multiprocessors_would_idle(shape: tuple[int, int, int, int], expected: int):
    assert num_parts(*shape, num_processors=132) == expected


def test_a_cpu_is_left_alone():
    q, k, v = (torch.randn(1, length, 2, 64, dtype=torch.bfloat16) for length in (5, 7, 7))
    assert not cudnn_takes(q, k, v)


# ------------------------------------------------------------------------------------------------ on a GPU


def draw(num_queries: int, num_keys: int, batch_size: int = 1, dtype: torch.dtype = torch.bfloat16):
    """Queries that are a third of a wider tensor; keys and values the first tokens of a slab whose rest is NaN."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(length: int, heads: int) -> Tensor:
        return torch.randn(batch_size, length, heads, 128, generator=generator, device="cuda", dtype=dtype)

    slabs = [torch.full((batch_size, num_keys + 64, 12, 128), float("nan"), device="cuda", dtype=dtype) for _ in "kv"]
    for slab in slabs:
        slab[:, :num_keys] = normal(num_keys, 12)
    return normal(num_queries, 36)[:, :, :12] * 2, slabs[0][:, :num_keys], slabs[1][:, :num_keys]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4680, 18720), (4680, 4680), (4680, 18721), (130, 9362), (4680, 512)], ids=str)
def test_as_exact_as_all_keys_at_once(shape: tuple[int, int]):
    """2.5e-3 from float32, where all keys at once are 2.0e-3: what each part gives is rounded to bfloat16."""
    q, k, v = draw(*shape)
    if not cudnn_takes(q, k, v):
        pytest.skip("no Hopper")
    poison = torch.full_like(q, float("nan"), memory_format=torch.contiguous_format)
    del poison  # the next empty tensor of that size lies there
    found = cudnn_attention(q, k, v)
    whole = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    some = slice(None, None, max(1, shape[0] // 500))
    truth = attention(q[:, some].float(), k.float(), v.float(), "sdpa")
    assert found.shape == q.shape and found.is_contiguous() and found.isfinite().all()
    assert relative(found[:, some], truth) < min(4e-3, 1.4 * relative(whole[:, some], truth))


@pytest.mark.gpu
def test_what_wants_a_gradient_goes_torchs_way():
    q, k, v = draw(64, 96)
    with torch.enable_grad():
        assert not cudnn_takes(q.requires_grad_(), k, v)
        attention(q, k, v).sum().backward()
    assert q.grad is not None


@pytest.mark.gpu
def test_inside_compiled_code_and_cuda_graphs():
    q, k, v = draw(1300, 9360)
    if not cudnn_takes(q, k, v):
        pytest.skip("no Hopper")
    check_compiled_and_recorded(attention, q, k, v)


@pytest.mark.gpu
def test_the_operation_is_one_that_torch_knows():
    q, k, v = draw(5, 300)
    if cudnn_takes(q, k, v):
        torch.library.opcheck(cudnn_attention, (q, k, v), test_utils=("test_schema", "test_faketensor"))
