"""wan/modules/float8.py: the arithmetic on a CPU, and a GPU's against it."""

from dataclasses import replace

import pytest
import torch
from torch.torch_version import TorchVersion

from tests.wan.modules.test_causal_model import TOY, toy_model
from wan.modules.float8 import FLOAT8, Float8Linear, check_float8, emulated_product, quantise, quantise_linears
from wan.modules.lora import merge_lora

SIZES = replace(TOY, num_layers=4)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def test_rows_of_any_size_use_the_whole_range():
    x = torch.randn(5, 64) * torch.tensor([1e-4, 1.0, 1e4, 0.0, 7.0])[:, None]
    rows, scale = quantise(x)
    assert rows.dtype == FLOAT8 and scale.shape == (5, 1)
    largest = rows.float().abs().amax(-1)
    assert torch.equal(largest, torch.tensor([448.0, 448.0, 448.0, 0.0, 448.0]))
    error = (rows.float() * scale - x).abs()
    assert (error <= x.abs() / 16 + 1e-3 * scale * 448).all()  # 3 bits of mantissa: half a step is 1/16


def test_a_layer_is_near_the_one_it_was_made_of():
    """Two factors, each rounded to 3 bits of mantissa: about 3.7 % of the output."""
    linear = torch.nn.Linear(256, 96)
    layer, x = Float8Linear(linear.weight, linear.bias), torch.randn(2, 7, 256)
    for dtype in (torch.float32, torch.bfloat16):
        out = layer(x.to(dtype))
        assert out.shape == (2, 7, 96) and out.dtype == dtype
        assert 0.01 < relative(out - linear.bias, linear(x) - linear.bias) < 0.05


def test_a_quantised_model_walks_like_the_one_it_was_made_of():
    plain, rounded = (toy_model(config=SIZES, num_frame_per_block=2) for _ in range(2))
    assert quantise_linears(rounded) == 2 * 6
    own = rounded.blocks[1]
    assert own.ffn[0].weight.dtype == own.self_attn.qkv.weight.dtype == FLOAT8
    kept = [rounded.blocks[0].ffn[0], rounded.blocks[3].self_attn.q, own.cross_attn.k, rounded.head.head]
    assert {layer.weight.dtype for layer in kept} == {torch.float32}
    flows = []
    for model in (plain, rounded):
        torch.manual_seed(1)
        cache, context = model.make_kv_cache(1, 4, 4, 4), torch.randn(1, 5, TOY.text_dim)
        with torch.no_grad():
            for x in torch.randn(2, 1, TOY.in_dim, 2, 4, 4):
                flows.append(model(x, torch.full((1, 2), 500.0), context, kv_cache=cache))
                cache.commit(2)
    for expected, found in zip(flows[:2], flows[2:], strict=True):
        assert 0 < relative(found, expected) < 0.1


def test_a_lora_comes_before_rounding():
    model = toy_model(config=SIZES)
    quantise_linears(model)
    update = {"blocks.0.ffn.0.lora_A.weight": torch.zeros(1, 48), "blocks.0.ffn.0.lora_B.weight": torch.zeros(64, 1)}
    with pytest.raises(ValueError, match="cannot be merged into float8 weights; name it in the config"):
        merge_lora(model, update)


def test_what_cannot_multiply_float8_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="compute capability 8.9 or more .*, this is a CPU; set linear_dtype=auto"):
        check_float8(torch.device("cpu"))
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match="a card has 8.0; set linear_dtype=auto"):
        check_float8(gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cu130"))
    with pytest.raises(ValueError, match="on a card needs torch 2.12"):
        check_float8(gpu)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.12.0"))
    check_float8(gpu)
    with pytest.raises(ValueError, match=r"\[24, 16\] is no multiple of 16 both ways"):
        Float8Linear(torch.zeros(24, 16), torch.zeros(24))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(4680, 1536, 1536), (4680, 8960, 1536), (4680, 1536, 8960), (24, 48, 64), (27, 48, 64)]
)
def test_a_gpu_multiplies_as_emulated(shape):
    """bfloat16 results and fast sums: within 1 % of the float32 ones."""
    check_float8(torch.device("cuda", 0))
    tokens, width, out = shape
    generator = torch.Generator("cuda").manual_seed(0)
    x, weight = (torch.randn(n, width, device="cuda", generator=generator) for n in (tokens, out))
    layer = Float8Linear(weight, torch.randn(out, device="cuda", generator=generator))
    rows, scale = quantise(x.bfloat16())
    expected = emulated_product(rows, scale, layer.weight, layer.scale, layer.bias)
    for forward in (layer, torch.compile(layer, dynamic=False)):
        assert relative(forward(x.bfloat16()), expected) < 1e-2
