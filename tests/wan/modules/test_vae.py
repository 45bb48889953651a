"""The VAE: published figures, any chunking = whole, diffusers' implementation, edges, errors."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.golden_data import load_golden
from wan.modules import vae as vae_module
from wan.modules.vae import WAN21_LATENTS_MEAN, WAN21_LATENTS_STD, Strip, WanVAE, load_vae

TINY = {"dim": 4, "z_dim": 4, "dim_mult": (1, 2, 2), "num_res_blocks": 1, "temporal_downsample": (True, True)}
STATISTICS = {"latents_mean": (0.1, -0.2, 0.3, 0.0), "latents_std": (1.0, 2.0, 0.5, 1.5)}


def tiny_vae(**changes) -> WanVAE:
    torch.manual_seed(0)
    vae = WanVAE(**(TINY | STATISTICS | changes))
    for parameter in vae.parameters():  # gammas and biases too: ones and zeros would hide mistakes
        torch.nn.init.uniform_(parameter, -0.4, 0.4)
    return vae.requires_grad_(False)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_golden("c_vae")[0]


@pytest.fixture(scope="module")
def golden_vae(golden) -> WanVAE:
    """The published decoder's weights; the encoder's are random, it is held to diffusers' below."""
    torch.manual_seed(0)
    vae = WanVAE(dim=8, latents_mean=golden["mean"].tolist(), latents_std=golden["std"].tolist())
    for parameter in vae.parameters():  # gammas too: ones would hide mistakes
        parameter.data += 0.05 * torch.randn_like(parameter)
    weights = {name[2:]: tensor.float() for name, tensor in golden.items() if name.startswith("w.")}
    assert not vae.load_state_dict(weights, strict=False).unexpected_keys
    assert {f"decoder.{name}" for name in vae.decoder.state_dict()} | {"conv2.weight", "conv2.bias"} == set(weights)
    return vae.requires_grad_(False)


def decode_in_chunks(vae, latents, chunks):
    cache = vae.make_cache()
    return [vae.decode(chunk, cache) for chunk in latents.split(chunks, dim=2)]


# ------------------------------------------------------------------- the published implementation's numbers


@pytest.mark.parametrize("chunks", [[4], [1, 1, 1, 1], [2, 2], [3, 1], [1, 3]])
def test_decoder_matches_golden(golden, golden_vae, chunks):
    pixels = torch.cat(decode_in_chunks(golden_vae, golden["dec4.latent"], chunks), dim=2)
    torch.testing.assert_close(pixels[..., ::3, ::3], golden["dec4.pixels_every_third"], atol=1e-5, rtol=1e-5)


def test_strips_are_the_whole_decoders():
    """Each with a cache of its own, in two chunks; inner ones are made of 25 columns of 44 latents."""
    vae, latents = tiny_vae(), torch.randn(1, 4, 3, 3, 44)
    whole = torch.cat(decode_in_chunks(vae, latents, [1, 2]), dim=2)
    strips = [Strip.of(rank, 5, 44) for rank in range(5)]
    assert strips[2].window(1, vae.decoder.margins[0]) == (9, 34)
    pieces = []
    for strip in strips:
        cache = vae.make_cache()
        pieces.append(torch.cat([vae.decode(x, cache, strip) for x in latents.split([1, 2], dim=2)], dim=2))
    assert [piece.shape[-1] for piece in pieces] == [32, 36, 36, 36, 36]
    torch.testing.assert_close(torch.cat(pieces, dim=-1), whole, atol=1e-5, rtol=1e-5)


def test_published_statistics_are_the_golden_ones(golden):
    assert golden["mean"].tolist() == pytest.approx(WAN21_LATENTS_MEAN)
    assert golden["std"].tolist() == pytest.approx(WAN21_LATENTS_STD)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_matches_diffusers(golden_vae, patch_size):
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    vae = golden_vae if patch_size == 1 else WanVAE(dim=8, patch_size=patch_size).requires_grad_(False)
    pixel_dim = 3 * patch_size**2
    sizes = {"patch_size": patch_size, "in_channels": pixel_dim, "out_channels": pixel_dim} if patch_size > 1 else {}
    theirs = AutoencoderKLWan(base_dim=8, **sizes)
    theirs.load_state_dict(convert_wan_vae_to_diffusers({k: v.clone() for k, v in vae.state_dict().items()}))
    generator = torch.Generator().manual_seed(1)
    video = torch.rand(2, 3, 9, 16 * patch_size, 24 * patch_size, generator=generator) * 2 - 1
    latents = torch.randn(2, 16, 3, 2, 3, generator=generator)
    with torch.no_grad():
        posterior = theirs.encode(video).latent_dist
        pixels = theirs.decode(latents * vae.latents_std + vae.latents_mean, return_dict=False)[0]
    mean, log_variance = vae.encode_moments(video)
    torch.testing.assert_close(mean, posterior.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_variance.clamp(-30, 20), posterior.logvar, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vae.decode(latents).clamp(-1, 1), pixels, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------- any chunking = whole


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("temporal_downsample", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("chunks", [[6], [1, 1, 1, 1, 1, 1], [3, 3], [1, 2, 3], [2, 1, 3], [5, 1]])
def test_streaming_decode_is_whole_decode(patch_size, temporal_downsample, chunks):
    vae = tiny_vae(patch_size=patch_size, temporal_downsample=temporal_downsample)
    latents = torch.randn(1, 4, 6, 3, 2)
    pieces = decode_in_chunks(vae, latents, chunks)
    stride = vae.temporal_stride
    assert [piece.shape[2] for piece in pieces] == [stride * n - (stride - 1) * (i == 0) for i, n in enumerate(chunks)]
    assert pieces[0].shape[-2:] == (3 * vae.spatial_stride, 2 * vae.spatial_stride)
    torch.testing.assert_close(torch.cat(pieces, dim=2), vae.decode(latents), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("chunks", [[13], [1, 4, 4, 4], [1, 12], [5, 8], [9, 4]])
def test_streaming_encode_is_whole_encode(patch_size, chunks):
    vae = tiny_vae(patch_size=patch_size)
    video = torch.rand(1, 3, 13, 16, 8) * 2 - 1
    cache = vae.make_cache()
    latents = torch.cat([vae.encode(chunk, cache) for chunk in video.split(chunks, dim=2)], dim=2)
    assert latents.shape == (1, 4, 4, 16 // vae.spatial_stride, 8 // vae.spatial_stride)
    torch.testing.assert_close(latents, vae.encode(video), atol=1e-5, rtol=1e-5)


def test_batch_of_two_is_two_batches_of_one():
    vae = tiny_vae()
    latents = torch.randn(2, 4, 4, 3, 2)
    together = torch.cat(decode_in_chunks(vae, latents, [1, 3]), dim=2)
    alone = [torch.cat(decode_in_chunks(vae, one, [1, 3]), dim=2) for one in latents.split(1)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    video = torch.rand(2, 3, 5, 8, 8) * 2 - 1
    torch.testing.assert_close(vae.encode(video), torch.cat([vae.encode(one) for one in video.split(1)]))


def test_reset_begins_a_new_video():
    vae = tiny_vae()
    latents = torch.randn(1, 4, 3, 2, 2)
    cache = vae.make_cache()
    first = vae.decode(latents, cache)
    assert not torch.allclose(vae.decode(latents, cache)[:, :, -9:], first)
    cache.reset()
    assert torch.equal(vae.decode(latents, cache), first)


def test_no_frame_depends_on_the_future():
    vae = tiny_vae()
    latents = torch.randn(1, 4, 4, 2, 2)
    torch.testing.assert_close(vae.decode(latents[:, :, :2]), vae.decode(latents)[:, :, :5], atol=1e-5, rtol=1e-5)


def test_patches_are_ordered_as_in_wan22():
    from einops import rearrange

    vae = tiny_vae(patch_size=2)
    video = torch.randn(2, 3, 5, 8, 12)
    folded = vae._patchify(video)
    assert torch.equal(folded, rearrange(video, "b c t (h q) (w r) -> b (c r q) t h w", q=2, r=2))
    assert torch.equal(vae._unpatchify(folded), video)


# ---------------------------------------------------------------------- layouts, precision, gradients, compile


def test_small_videos_take_the_same_sum_another_way(monkeypatch):
    vae = tiny_vae()
    latents = torch.randn(1, 4, 3, 2, 2)
    as_images = vae.decode(latents)
    monkeypatch.setattr(vae_module, "NATIVE_CONV3D_LIMIT", 0)
    torch.testing.assert_close(as_images, vae.decode(latents), atol=1e-5, rtol=1e-5)


def test_bfloat16_stays_close():
    vae = tiny_vae()
    latents, video = torch.randn(1, 4, 3, 4, 4), torch.rand(1, 3, 9, 16, 16) * 2 - 1
    pixels, encoded = vae.decode(latents), vae.encode(video)
    vae = vae.to(torch.bfloat16)
    for expected, coarse in ((pixels, vae.decode(latents.bfloat16())), (encoded, vae.encode(video.bfloat16()))):
        assert coarse.dtype == torch.bfloat16
        assert (coarse.float() - expected).abs().mean() < 0.03 * expected.std()


def test_gradients_reach_every_parameter():
    vae = tiny_vae(patch_size=2).requires_grad_(True)
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    mean, log_variance = vae.encode_moments(video)
    latents = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
    (vae.decode(latents) - video).square().mean().backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_gradient_stays_finite_on_a_black_clip():
    vae = tiny_vae().requires_grad_(True)
    video = torch.zeros(1, 3, 5, 8, 8, requires_grad=True)
    vae.encode_moments(video)[0].square().sum().backward()
    assert video.grad.isfinite().all()


def test_cache_carries_no_gradient_and_owns_its_frames():
    vae = tiny_vae().requires_grad_(True)
    cache = vae.make_cache()
    vae.decode(torch.randn(1, 4, 2, 2, 2), cache)
    vae.encode(torch.rand(1, 3, 5, 8, 8), cache)
    for past in cache.encoder + cache.decoder:
        assert not past.requires_grad
        assert past.untyped_storage().nbytes() == past.numel() * past.element_size()


def test_compiles_without_graph_breaks():
    vae = tiny_vae(dim_mult=(1, 2), temporal_downsample=(True,))
    latents, video = torch.randn(1, 4, 4, 4, 4), torch.rand(1, 3, 5, 8, 8) * 2 - 1
    decode = torch.compile(vae.decode, fullgraph=True, backend="aot_eager", dynamic=False)
    encode = torch.compile(vae.encode, fullgraph=True, backend="eager", dynamic=False)
    cache = vae.make_cache()
    pixels = torch.cat([decode(chunk, cache) for chunk in latents.split([1, 3], dim=2)], dim=2)
    torch.testing.assert_close(pixels, vae.decode(latents), atol=1e-5, rtol=1e-5)
    encoded = torch.cat([encode(chunk, cache) for chunk in video.split([1, 4], dim=2)], dim=2)
    torch.testing.assert_close(encoded, vae.encode(video), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------ files and mistakes


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_loads_what_was_saved(tmp_path, suffix):
    vae = tiny_vae(patch_size=2)
    path = tmp_path / f"Wan2.1_VAE{suffix}"
    torch.save(vae.state_dict(), path) if suffix == ".pth" else save_file(vae.state_dict(), path)
    path.with_suffix(".json").write_text(json.dumps(TINY | STATISTICS | {"patch_size": 2}))
    loaded = load_vae(path)
    latents = torch.randn(1, 4, 2, 2, 2)
    torch.testing.assert_close(loaded.decode(latents), vae.decode(latents), atol=1e-5, rtol=1e-5)
    assert load_vae(path, dtype=torch.bfloat16).latents_std.dtype == torch.bfloat16


def test_load_names_what_does_not_fit(tmp_path):
    path = tmp_path / "Wan2.1_VAE.safetensors"
    save_file(tiny_vae().state_dict(), path)
    with pytest.raises(ValueError, match=r"encoder\.downsamples"):  # no json: the published sizes
        load_vae(path)
    path.with_suffix(".json").write_text(json.dumps(TINY | STATISTICS | {"dim": 8}))
    with pytest.raises(ValueError, match=r"encoder\.conv1\.weight has \[4, 3, 3, 3, 3\] instead of \[8, 3, 3, 3, 3\]"):
        load_vae(path)
    path.with_suffix(".json").write_text(json.dumps(TINY | {"dims": 8}))
    with pytest.raises(ValueError, match=r"Wan2\.1_VAE\.json.*dims"):
        load_vae(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_vae(tmp_path / "nowhere.pth")


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (4, None, "4 frames cannot be encoded: a first chunk has 1 \\+ 4n; use 1 or 5"),
        (0, None, "0 frames .* use 1"),
        (1, 5, "5 frames cannot be encoded: a later chunk has 4n, n > 0; use 4 or 8"),
        (5, 1, "1 frames .* use 4"),
    ],
)
def test_encode_says_which_lengths_fit(first, then, message):
    vae = tiny_vae()
    cache = vae.make_cache()
    with pytest.raises(ValueError, match=message):
        for num_frames in (first, then):
            vae.encode(torch.zeros(1, 3, num_frames, 8, 8), cache)


def test_shapes_that_do_not_fit_are_told():
    vae = tiny_vae()
    with pytest.raises(ValueError, match="12x8 pixels do not divide by 8"):
        tiny_vae(patch_size=2).encode(torch.zeros(1, 3, 1, 12, 8))
    with pytest.raises(ValueError, match=r"\[1, 2, 4, 2, 2\], expected \[B, 4, F, h, w\]"):
        vae.decode(torch.zeros(1, 2, 4, 2, 2))
    with pytest.raises(ValueError, match=r"\[B, 3, T, H, W\], got \[1, 5, 3, 8, 8\]"):
        vae.encode(torch.zeros(1, 5, 3, 8, 8))
    cache = vae.make_cache()
    vae.decode(torch.zeros(1, 4, 1, 2, 2), cache)
    with pytest.raises(ValueError, match="holds a batch of 1 videos, the new chunk has 2"):
        vae.decode(torch.zeros(2, 4, 1, 2, 2), cache)
    with pytest.raises(ValueError, match="2 steps between them, but temporal_downsample names 3"):
        tiny_vae(temporal_downsample=(True, True, True))
    with pytest.raises(ValueError, match="16 and latents_std 4 values for 4 channels"):
        tiny_vae(latents_mean=None)
