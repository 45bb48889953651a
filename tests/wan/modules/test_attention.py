"""wan/modules/attention.py: every name is a kernel that runs here, or is refused with a way out."""

import pytest
import torch

from tests.wan.modules.test_causal_model import toy_model
from wan.modules import attention as module
from wan.modules.attention import BACKENDS, available_backends, check_backend, check_device, masked_attention
from wan.modules.attention_8bit import MIN_KEYS, ROUNDINGS

CPU = torch.device("cpu")


def draw(num_queries: int = 7, num_keys: int = 9, head_dim: int = 64, dtype: torch.dtype = torch.float32):
    return tuple(torch.randn(2, length, 2, head_dim, dtype=dtype) for length in (num_queries, num_keys, num_keys))


@pytest.mark.parametrize("backend", ["auto", "fastest", "sdpa", *ROUNDINGS])
def test_few_keys_are_exact(backend: str):
    q, k, v = draw()
    scores = torch.einsum("bqnd,bknd->bnqk", q, k) / 8
    expected = torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), v)
    torch.testing.assert_close(module.attention(q, k, v, backend), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(masked_attention(q, k, v, None, backend), expected, atol=1e-5, rtol=1e-5)


def test_many_keys_are_rounded_where_that_was_asked_for():
    q, k, v = draw(num_keys=MIN_KEYS)
    exact = module.attention(q, k, v, "sdpa")
    for backend in ROUNDINGS:
        found = module.attention(q, k, v, backend)
        assert 1e-3 < (found - exact).norm() / exact.norm() < 0.1
    assert torch.equal(module.attention(q, k, v, "fastest"), exact)


def test_names_are_known_or_refused():
    for backend in set(BACKENDS) - {"flash", *module.FLASH}:
        check_backend(backend)
    with pytest.raises(ValueError, match="attention_backend 'int4' is unknown; use one of auto, fastest, .*int8"):
        check_backend("int4")
    with pytest.raises(ImportError, match="'flash4' needs flash-attn: pip install flash-attn-4; or use 'auto'"):
        check_backend("flash4")
    for backend in ("flash", "flash2", "flash3"):
        with pytest.raises(ImportError, match=f"'{backend}' needs flash-attn: .*; or use 'auto'"):
            check_backend(backend)


def test_a_cpu_has_one_backend_and_says_so():
    assert available_backends(CPU) == ["sdpa"]
    for backend in ("auto", "fastest", "sdpa"):
        check_device(backend, CPU)
    for backend in ("cudnn", "flash"):
        with pytest.raises(ValueError, match=f"'{backend}' does not run on a CPU; set attention_backend=auto"):
            check_device(backend, CPU)
    with pytest.raises(ValueError, match="'flash' does not run on a CPU; set attention_backend=auto"):
        module.attention(*draw(), "flash")
    for backend in ROUNDINGS:
        with pytest.raises(ValueError, match=r"needs triton and a GPU of compute .*8\.\d or more, this is a CPU; set"):
            check_device(backend, CPU)


def test_old_gpus_are_told_what_they_lack(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match="'int8' needs triton and a GPU of compute capability 8.9 or more, a card has"):
        check_device("int8", gpu)
    with pytest.raises(ValueError, match="'flash2' does not run on a card with 7.5; set attention_backend=auto"):
        check_device("flash2", gpu)
    check_device("cudnn", gpu)


def test_a_models_backend_reaches_its_self_attention():
    """Over a cache; few keys are exact, and the toy has few: its backends agree."""
    flows = []
    for backend in ("auto", "int8"):
        model = toy_model(num_frame_per_block=2)
        model.attention_backend = backend
        torch.manual_seed(1)
        x, context = torch.randn(1, model.config.in_dim, 2, 4, 4), torch.randn(1, 5, model.config.text_dim)
        with torch.no_grad():
            flows.append(model(x, torch.full((1, 2), 500.0), context, kv_cache=model.make_kv_cache(1, 4, 4, 2)))
    assert torch.equal(*flows)


def test_releases_of_flash_attn_have_names_and_an_order(monkeypatch):
    """Two are there: one returns what it sees, the other the log-sum-exp besides."""
    kernels = {"flash3": None, "flash4": lambda q, k, v: (q + 4, None), "flash2": lambda q, k, v: q + 2}
    monkeypatch.setattr(module, "_flash_kernels", kernels)
    monkeypatch.setattr(module, "_flash_releases", {})
    q, k, v = draw()
    assert torch.equal(module.attention(q, k, v, "flash2"), q + 2)
    assert torch.equal(module.attention(q, k, v, "flash4"), q + 4)
    with pytest.raises(ImportError, match="'flash3' needs flash-attn: build flash-attn's hopper folder; or use"):
        check_backend("flash3")
    for major, release in ((7, None), (8, "flash2"), (9, "flash4")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, major=major: (major, 0))
        assert module._flash_release(torch.device("cuda", major)) == release
    assert not torch.equal(module.attention(q, k, v), q + 2)  # not on a CPU
