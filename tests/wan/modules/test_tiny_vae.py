"""The tiny VAE: published figures and names, any chunking = whole, edges, errors."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.golden_data import below, load_golden
from wan.modules.tiny_vae import TinyVAE, load_tiny_vae

TINY = {"latent_channels": 4, "encoder_channels": 4, "decoder_channels": (6, 4, 4, 3)}
CHUNKS = [[5], [1, 1, 1, 1, 1], [3, 2], [1, 4], [2, 1, 2]]


def tiny_vae(**changes) -> TinyVAE:
    torch.manual_seed(0)
    return TinyVAE(**(TINY | changes)).requires_grad_(False)


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, torch.Tensor], TinyVAE]:
    """Inputs and weights to 10 bits: with all 23 the outputs differed by at most 9e-7, but they are 140 kB more."""
    tensors, sizes = load_golden("j_taehv")
    vae = TinyVAE(**sizes)
    vae.load_state_dict(below(tensors, "w"))
    return tensors, vae.requires_grad_(False)


def test_decoder_matches_golden(golden):
    tensors, vae = golden
    latents, expected = tensors["latents"].transpose(1, 2), tensors["decoder_raw_every_third"].transpose(1, 2)
    raw = (vae.decode_frames(latents)[..., ::3, ::3] + 1) / 2  # published in [0, 1]
    torch.testing.assert_close(raw, expected, atol=4e-3, rtol=0)
    shown = (vae.decode(latents)[..., ::3, ::3] + 1) / 2
    torch.testing.assert_close(shown, expected[:, :, 3:], atol=4e-3, rtol=0)


def test_encoder_matches_golden(golden):
    tensors, vae = golden
    latents = vae.encode(tensors["frames"].transpose(1, 2) * 2 - 1)  # 9 frames, filled up to 12
    torch.testing.assert_close(latents, tensors["encoded"].transpose(1, 2), atol=2e-3, rtol=0)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"patch_size": 2, "decoder_space_upscale": (False, True, True)},
        {"decoder_time_upscale": (True, False, True)},
    ],
)
def test_streaming_decode_is_whole_decode(chunks, changes):
    vae = tiny_vae(**changes)
    latents, cache = torch.randn(2, 4, 5, 3, 2), vae.make_cache()
    pieces = [vae.decode(chunk, cache) for chunk in latents.split(chunks, dim=2)]
    assert [piece.shape[2] for piece in pieces] == [4 * n - 3 * (i == 0) for i, n in enumerate(chunks)]
    assert pieces[0].shape[-2:] == (3 * vae.spatial_stride, 2 * vae.spatial_stride) == (24, 16)
    torch.testing.assert_close(torch.cat(pieces, dim=2), vae.decode(latents), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("chunks", [[13], [4, 4, 4, 1], [4, 9], [8, 5]])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_streaming_encode_is_whole_encode(chunks, patch_size):
    vae = tiny_vae(patch_size=patch_size)
    video, cache = torch.rand(2, 3, 13, 32, 16) * 2 - 1, vae.make_cache()
    latents = torch.cat([vae.encode(chunk, cache) for chunk in video.split(chunks, dim=2)], dim=2)
    assert latents.shape == (2, 4, 4, 32 // vae.spatial_stride, 16 // vae.spatial_stride)
    torch.testing.assert_close(latents, vae.encode(video), atol=1e-6, rtol=1e-5)


def test_reset_begins_a_new_video_and_a_batch_does_not_mix():
    vae = tiny_vae()
    latents, cache = torch.randn(2, 4, 3, 2, 2), vae.make_cache()
    first = vae.decode(latents, cache)
    assert vae.decode(latents, cache).shape[2] == 12
    cache.reset()
    assert torch.equal(vae.decode(latents, cache), first)
    torch.testing.assert_close(first[1:], vae.decode(latents[1:]), atol=1e-6, rtol=1e-5)


def test_no_frame_depends_on_the_future():
    vae = tiny_vae()
    latents = torch.randn(1, 4, 4, 2, 2)
    torch.testing.assert_close(vae.decode(latents[:, :, :2]), vae.decode(latents)[:, :, :5], atol=1e-6, rtol=1e-5)


def test_cache_carries_no_gradient_and_owns_its_frames():
    vae = tiny_vae().requires_grad_(True)
    cache = vae.make_cache()
    vae.decode(torch.randn(1, 4, 2, 2, 2), cache).square().mean().backward()
    vae.encode(torch.rand(1, 3, 8, 16, 16), cache).square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in vae.parameters())
    for past in cache.encoder + cache.decoder:
        assert not past.requires_grad
        assert past.untyped_storage().nbytes() == past.numel() * past.element_size()


def test_compiles_without_graph_breaks():
    vae = tiny_vae()
    decode = torch.compile(vae.decode, fullgraph=True, backend="aot_eager", dynamic=False)
    latents, cache = torch.randn(1, 4, 4, 2, 2), vae.make_cache()
    pixels = torch.cat([decode(chunk, cache) for chunk in latents.split([1, 3], dim=2)], dim=2)
    torch.testing.assert_close(pixels, vae.decode(latents), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_loads_what_was_saved(tmp_path, suffix):
    vae = tiny_vae(encoder_channels=None)
    path = tmp_path / f"taew2_1{suffix}"
    torch.save(vae.state_dict(), path) if suffix == ".pth" else save_file(vae.state_dict(), path)
    path.with_suffix(".json").write_text(json.dumps(TINY | {"encoder_channels": None}))
    latents = torch.randn(1, 4, 2, 2, 2)
    torch.testing.assert_close(load_tiny_vae(path).decode(latents), vae.decode(latents), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="no encoder; encode with the full VAE"):
        load_tiny_vae(path).encode(torch.zeros(1, 3, 4, 8, 8))


def test_mistakes_are_told(tmp_path):
    path = tmp_path / "taew2_1.safetensors"
    save_file(tiny_vae().state_dict(), path)
    with pytest.raises(ValueError, match=r"encoder\.0\.weight has \[4, 3, 3, 3\] instead of \[64, 3, 3, 3\]"):
        load_tiny_vae(path)  # no json: the published sizes
    path.with_suffix(".json").write_text(json.dumps(TINY | {"decoder_widths": 8}))
    with pytest.raises(ValueError, match=r"taew2_1\.json.*decoder_widths"):
        load_tiny_vae(path)
    vae, cache = tiny_vae(), tiny_vae().make_cache()
    with pytest.raises(ValueError, match=r"\[1, 2, 4, 2, 2\], expected \[B, 4, F, h, w\]"):
        vae.decode(torch.zeros(1, 2, 4, 2, 2))
    with pytest.raises(ValueError, match=r"\[B, 3, T, H, W\] with T > 0, got \[1, 5, 3, 8, 8\]"):
        vae.encode(torch.zeros(1, 5, 3, 8, 8))
    vae.decode(torch.zeros(1, 4, 1, 2, 2), cache)
    with pytest.raises(ValueError, match="holds a batch of 1 videos, the new chunk has 2"):
        vae.decode(torch.zeros(2, 4, 1, 2, 2), cache)
    with pytest.raises(ValueError, match="4 decoder_channels have 3 steps between them"):
        tiny_vae(decoder_time_upscale=(True, True))
