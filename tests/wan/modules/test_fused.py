"""wan/modules/fused.py on a GPU: each operation is what it stands for, and so are blocks made of them."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.wan.modules.test_causal_model import TOY, toy_model
from wan.modules import fused
from wan.modules.float8 import quantise, quantise_linears
from wan.modules.model import gated, modulate
from wan.modules.rope import apply_rope, rope_frequencies
from wan.modules.vae import RMSNorm, WanVAE

pytestmark = pytest.mark.gpu
FRAMES, TOKENS = 3, 41


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda", dtype=dtype)


def poison(like: Tensor) -> None:
    """Memory that the next tensor of that size is given."""
    del like
    torch.cuda.empty_cache()
    junk = torch.full((2**24,), float("nan"), device="cuda")
    del junk


@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize(
    "gate, shift, updates, affine", [(-1, 0, False, False), (2, -1, True, True), (-1, 3, True, False)]
)
@pytest.mark.parametrize("width", [96, 1536, 5120])
def test_norms(width: int, gate: int, shift: int, updates: bool, affine: bool, float8: bool):
    """bfloat16: 3e-3, one rounding; e4m3: 3 %, what it is without fusing."""
    x = draw(2, FRAMES * TOKENS, width)
    update = draw(2, FRAMES * TOKENS, width, seed=1) if updates else None
    weight, bias = (draw(width, seed=2), draw(width, seed=3)) if affine else (None, None)
    time, modulation = draw(2, FRAMES, 6, width, dtype=torch.float32, seed=4), draw(1, 6, width, seed=5)
    poison(x)
    total, normed, scales = fused.normalise(x, update, weight, bias, time, modulation, gate, shift, 1e-6, float8)
    six = (modulation.float() + time).unbind(2)
    expected = x
    if updates:
        expected = x + update if gate < 0 else gated(x, update, six[gate])
        assert relative(total, expected) < 1e-3
    expected = F.layer_norm(
        expected.float(), (width,), *(None if p is None else p.float() for p in (weight, bias)), 1e-6
    )
    if shift >= 0:
        expected = modulate(expected, six[shift], six[shift + 1])
    if float8:
        normed = normed.float() * scales.view(2, -1, 1)
    assert normed.isfinite().all() and relative(normed, expected) < (0.03 if float8 else 3e-3)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("width", [96, 1536, 4096, 8960, 13824])
def test_rows_in_float8(width: int, gelu: bool):
    x = draw(77, width) * 3
    poison(x)
    found, scales = fused.quantise(x, gelu)
    rounded, expected = quantise(F.gelu(x.float(), approximate="tanh") if gelu else x)
    torch.testing.assert_close(scales, expected, atol=0, rtol=1e-5)
    # the same numbers, but for some that lie half-way between two
    assert relative(found.float() * scales, rounded.float() * expected) < 5e-3


def test_a_linear_layer_and_its_gelu():
    x, weight, bias = draw(2, 300, 256), draw(512, 256, seed=1) / 16, draw(512, seed=2)
    expected = F.gelu(F.linear(x.float(), weight.float(), bias.float()), approximate="tanh")
    assert relative(fused.linear_gelu(x, weight, bias), expected) < 3e-3


@pytest.mark.parametrize("heads, head_dim", [(12, 128), (3, 64), (40, 128)])
def test_a_projection_is_finished_where_its_keys_are_kept(heads: int, head_dim: int):
    from wan.modules.triton_blocks import finish_projection

    width, rows = heads * head_dim, FRAMES * TOKENS
    joined, weights = draw(2, rows, 3 * width), draw(2, width, seed=1)
    rope = rope_frequencies(head_dim, range(5, 5 + FRAMES), 1, TOKENS, device="cuda")
    slabs = [
        torch.full((2, 2 * rows, heads, head_dim), float("nan"), device="cuda", dtype=x.dtype) for x in (joined,) * 2
    ]
    keys, values = (slab[:, TOKENS : TOKENS + rows] for slab in slabs)
    poison(joined)
    found = finish_projection(joined, *weights, 1e-6, rope, keys, values)
    q, k, v = (part.unflatten(-1, (heads, head_dim)) for part in joined.chunk(3, dim=-1))
    for x, weight, out in ((q, weights[0], found), (k, weights[1], keys)):
        normed = F.rms_norm(x.flatten(2).float(), (width,), weight.float(), 1e-6)
        assert relative(out, apply_rope(normed.view_as(x), rope)) < 3e-3
    assert torch.equal(values, v)
    assert all(slab[:, :TOKENS].isnan().all() and slab[:, TOKENS + rows :].isnan().all() for slab in slabs)


@pytest.mark.parametrize("channels", [40, 96, 192, 384])
def test_what_a_convolution_of_the_vae_sees(channels: int):
    norm = RMSNorm(channels).to("cuda", torch.bfloat16)
    norm.gamma.data = draw(channels, 1, 1, 1)
    x = draw(2, channels, 3, 5, 7).to(memory_format=torch.channels_last_3d)
    past = draw(2, channels, 4, 5, 7, seed=1).to(memory_format=torch.channels_last_3d)[:, :, 1:3]
    with torch.no_grad():
        expected = F.silu(norm(x.float()))
        for before in (past, None):
            poison(x)
            found = fused.norm_silu(x, norm.gamma, before, 2)
            assert found.is_contiguous(memory_format=torch.channels_last_3d)
            assert torch.equal(found[:, :, :2], torch.zeros_like(past) if before is None else past)
            assert relative(found[:, :, 2:], expected) < 4e-3


@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_compiled_blocks_over_a_cache_are_the_plain_ones(batch_size: int, float8: bool):
    """Bfloat16 against float32 of the same weights: no farther than a half more than as launched; the keys, too.

    In float8 against the same rounding as launched: what is rounded differs in its last bits, and then by an eighth.
    """
    torch._dynamo.reset()
    config = replace(TOY, dim=256, ffn_dim=1024, num_heads=4, num_layers=4)

    def walk(dtype: torch.dtype, compiles: bool) -> list[Tensor]:
        model = toy_model(config=config, num_frame_per_block=2, local_attn_size=6, sink_size=2).to("cuda", dtype)
        if float8 and dtype == torch.bfloat16:
            quantise_linears(model)
        if compiles:
            model.fuse_projections()
            model.compile_blocks()
        cache, flows = model.make_kv_cache(batch_size, 8, 8, None), []
        for block in range(5):
            x, text = draw(batch_size, config.in_dim, 2, 8, 8, seed=block), draw(batch_size, 5, config.text_dim, seed=9)
            with torch.no_grad():
                flows.append(
                    model(x.to(dtype), torch.full((batch_size, 2), 700.0, device="cuda"), text, kv_cache=cache)
                )
            cache.commit(2)
        return [torch.stack(flows), *(torch.stack(slabs) for slabs in (cache.keys, cache.values))]

    exact, plain, fast = walk(torch.float32, False), walk(torch.bfloat16, False), walk(torch.bfloat16, True)
    for found, launched, truth in zip(fast, plain, exact, strict=True):
        assert relative(found, truth) < 1.5 * relative(launched, truth)


def test_a_compiled_decoder_is_the_plain_one():
    torch._dynamo.reset()
    torch.manual_seed(0)
    vae = WanVAE(dim=32, dim_mult=(1, 2, 2), temporal_downsample=(True, True), num_res_blocks=1).to("cuda").eval()
    latents = draw(1, 16, 7, 8, 12, dtype=torch.float32)

    @torch.no_grad()
    def video(decode, dtype: torch.dtype) -> Tensor:
        cache = vae.make_cache()
        return torch.cat([decode(part.to(dtype), cache) for part in latents.split((1, 3, 3), dim=2)], dim=2)

    exact = video(vae.decode, torch.float32)
    vae.bfloat16()
    plain = video(vae.decode, torch.bfloat16)
    fast = video(torch.compile(vae.decode, dynamic=False, fullgraph=True), torch.bfloat16)
    assert relative(fast, exact) < 1.2 * relative(plain, exact)
