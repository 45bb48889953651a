"""utils/wan_wrapper.py: a streamed video is the whole one, prompts are read once, weights leave a small GPU."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from utils import wan_wrapper
from utils.wan_wrapper import WanTextEncoder, WanVAEWrapper, should_offload

CUDA = torch.device("cuda", 0)


@pytest.fixture(params=["full", "tiny"])
def vae(request, tiny_model_folder) -> WanVAEWrapper:
    return WanVAEWrapper(tiny_model_folder, decoder=request.param)


@pytest.fixture
def text_encoder(tiny_model_folder) -> WanTextEncoder:
    return WanTextEncoder(tiny_model_folder, dtype=torch.float32)


@pytest.mark.parametrize("parts", [[1] * 7, [3, 3, 1], [1, 6]])
@pytest.mark.parametrize("handed_in", [True, False])
def test_streaming_decode_is_the_whole_decode(vae, parts, handed_in):
    latents = torch.randn(2, 7, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    whole = vae.decode_to_pixel(latents)
    assert whole.shape == (2, 25, 3, 32, 48)
    for _ in range(2):  # the second video finds nothing of the first
        vae.reset_cache()
        options = {"cache": vae.make_cache()} if handed_in else {"use_cache": True}
        streamed = [vae.decode_to_pixel(part, **options) for part in latents.split(parts, dim=1)]
        torch.testing.assert_close(torch.cat(streamed, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_what_is_remembered_looks_the_same_after_every_chunk(vae):
    """Strides too: compiled code is made for them, and at full size that takes a minute."""
    cache, seen = vae.make_cache(), set()
    for _ in range(3):
        vae.decode_to_pixel(torch.zeros(1, 3, 16, 4, 6), cache=cache)
        seen.add(tuple((past.shape, past.stride()) for past in cache.decoder))
    assert len(seen) == 1


@pytest.mark.parametrize("compiles", [True, False])
def test_convolutions_are_measured_where_they_are_compiled(compiles, tiny_model_folder, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # trainers leave it on
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    vae = WanVAEWrapper(tiny_model_folder, compile=compiles)
    monkeypatch.setattr(vae, "_decode", lambda *_: seen.append(torch.backends.cudnn.benchmark) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vae.decode_to_pixel(torch.zeros(1, 1, 16, 4, 4))
    assert seen == [compiles] and not torch.backends.cudnn.benchmark


def test_encoding_in_chunks_is_encoding_at_once(vae):
    pixels = torch.rand(1, 25, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    at_once = vae.model.encode(pixels.transpose(1, 2)).transpose(1, 2)
    vae.latents_per_chunk = 2
    torch.testing.assert_close(vae.encode_to_latent(pixels), at_once, atol=1e-5, rtol=1e-5)


def test_pictures_and_latents_come_to_where_the_vae_is(vae):
    """An image is loaded on the CPU, whatever device makes the video; "meta" stands for a GPU here."""
    vae.to("meta")
    assert vae.encode_to_latent(torch.zeros(1, 5, 3, 32, 32)).device.type == "meta"
    assert vae.decode_to_pixel(torch.zeros(1, 2, 16, 4, 4)).device.type == "meta"


def test_the_tiny_decoder_makes_the_pictures_and_the_full_vae_the_latents(tiny_model_folder):
    full, tiny = (WanVAEWrapper(tiny_model_folder, decoder=name) for name in ("full", "tiny"))
    pixels = torch.rand(1, 5, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = full.encode_to_latent(pixels)
    assert torch.equal(tiny.encode_to_latent(pixels), latents)
    pictures = tiny.decode_to_pixel(latents)
    at_once = tiny.tiny.decode(latents.transpose(1, 2)).transpose(1, 2).clamp(-1, 1)
    torch.testing.assert_close(pictures, at_once, atol=1e-5, rtol=1e-5)
    assert pictures.shape == pixels.shape and not torch.equal(pictures, full.decode_to_pixel(latents))


def test_a_tiny_decoder_that_is_missing_or_of_other_latents_is_refused(tiny_model_folder, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(tiny_model_folder, folder)
    sizes = {"encoder_channels": None, "decoder_channels": [4, 4, 4, 4], "decoder_space_upscale": [False, True, True]}
    (folder / "taew2_1.json").write_text(json.dumps(sizes))
    with pytest.raises(
        ValueError, match=r"are \(16, 4, 4\), those of this folder's VAE \(16, 8, 4\); use vae_decoder=full"
    ):
        WanVAEWrapper(folder, decoder="tiny")
    (folder / "taew2_1.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"none of taew2_1\.pth, taew2_1\.safetensors; use vae_decoder=full, or"
    ):
        WanVAEWrapper(folder, decoder="tiny")
    with pytest.raises(ValueError, match="'small' is unknown; use 'full' or 'tiny'"):
        WanVAEWrapper(folder, decoder="small")


def test_prompts_are_read_once_and_the_memory_of_them_has_an_end(text_encoder, monkeypatch):
    read, encode_ids = [], text_encoder.encode_ids
    monkeypatch.setattr(text_encoder, "encode_ids", lambda *ids: read.append(1) or encode_ids(*ids))
    monkeypatch.setattr(wan_wrapper, "MEMO_SIZE", 3)
    first = text_encoder(["a red puppet", "nothing", "a red puppet"])
    assert torch.equal(first[0], first[2]) and len(read) == 2
    for number in range(5):
        text_encoder([f"puppet {number}", "nothing"])
    assert len(read) == 7 and len(text_encoder._memo) == 3  # "nothing", always in use, was read once
    assert text_encoder(["a", "b", "c", "d"]).shape[0] == 4  # a batch may be larger than the memory
    assert torch.equal(text_encoder(["a red puppet"])[0], first[0])


def test_a_prompt_does_not_depend_on_its_neighbours_and_padding_is_zero(text_encoder):
    long, short = "a red puppet waves before a blue wall", "a puppet"
    together, alone = text_encoder([long, short]), text_encoder([short])
    assert torch.equal(together[1], alone[0])
    length = int(text_encoder.tokenize([short])[1].sum())
    assert alone[0, :length].any(dim=1).all() and not alone[0, length:].any()


@pytest.mark.parametrize(
    ("offload", "gigabytes", "leaves"),
    [("auto", 24, True), ("auto", 80, False), ("always", 80, True), ("never", 24, False)],
)
def test_the_text_encoder_leaves_small_gpus(monkeypatch, offload, gigabytes, leaves):
    properties = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert should_offload(offload, CUDA) is leaves
    assert should_offload(offload, torch.device("cpu")) is False
    with pytest.raises(ValueError, match="use 'auto', 'always' or 'never'"):
        should_offload("sometimes", CUDA)


def test_an_offloaded_text_encoder_is_home_before_and_after_reading(tiny_model_folder, monkeypatch):
    monkeypatch.setattr(wan_wrapper, "should_offload", lambda offload, device: True)
    encoder, moves = WanTextEncoder(tiny_model_folder, device="cpu:0"), []  # a "GPU" with a name of its own
    monkeypatch.setattr(encoder.model, "to", lambda device: moves.append(str(device)))
    encoder(["a puppet"])
    encoder(["a puppet"])
    assert moves == ["cpu:0", "cpu"]  # there and back, for the first reading only
