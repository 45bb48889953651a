"""From a config to a pipeline: what fits is built, what does not is refused before gigabytes are read."""

import shutil

import pytest
import torch

from pipeline import BidirectionalInferencePipeline, CausalDiffusionInferencePipeline
from pipeline.build import build_pipeline
from utils.config import load_config
from utils.wan_wrapper import CLIPModel

SETTINGS = ["device=cpu", "height=32", "width=32", "num_output_frames=3", "sampling_steps=2"]


def build(folder, *overrides):
    return build_pipeline(load_config(None, [f"model_name={folder}", *SETTINGS, *overrides]))


def test_causal_or_not(tiny_model_folder):
    causal = build(tiny_model_folder, "model_kwargs.local_attn_size=6", "model_kwargs.sink_size=1")
    assert isinstance(causal, CausalDiffusionInferencePipeline)
    assert (causal.generator.model.local_attn_size, causal.generator.model.sink_size) == (6, 1)
    assert isinstance(build(tiny_model_folder, "causal=false"), BidirectionalInferencePipeline)


def test_nothing_learns_and_everything_is_on_the_device(tiny_model_folder):
    pipeline = build(tiny_model_folder)
    assert not any(parameter.requires_grad for parameter in pipeline.generator.parameters())
    assert pipeline.generator.model.dtype == torch.float32 and pipeline.device.type == "cpu"


def test_a_setting_chooses_the_decoder(tiny_model_folder):
    options = {"text_prompts": ["a puppet"], "seeds": [0], "num_frames": 3, "height": 32, "width": 32}
    full, tiny = build(tiny_model_folder), build(tiny_model_folder, "vae_decoder=tiny")
    video, latents = tiny.inference(**options, return_latents=True)
    assert torch.equal(full.inference(**options, return_latents=True)[1], latents)
    assert torch.equal(video, (tiny.vae.decode_to_pixel(latents) + 1) / 2)
    assert torch.equal(torch.cat(list(tiny.stream(**options)), dim=1), video)
    assert not torch.equal(video, (full.vae.decode_to_pixel(latents) + 1) / 2)


def test_the_vae_may_have_a_dtype_of_its_own(tiny_model_folder):
    options = {"text_prompts": ["a puppet"], "seeds": [0], "num_frames": 3, "height": 32, "width": 32}
    exact, coarse = build(tiny_model_folder), build(tiny_model_folder, "vae_dtype=bfloat16")
    assert coarse.generator.model.dtype == torch.float32 and coarse.vae.model.conv2.weight.dtype == torch.bfloat16
    (video, latents), (other, same) = (p.inference(**options, return_latents=True) for p in (exact, coarse))
    assert torch.equal(latents, same)
    assert 0 < (video - other).abs().max() < 0.05 and other.dtype == torch.float32


def test_a_checkpoint_replaces_the_folders_weights(tiny_model_folder, tmp_path):
    plain = build(tiny_model_folder)
    weights = {f"model.{name}": tensor + 1 for name, tensor in plain.generator.model.state_dict().items()}
    torch.save({"generator_ema": weights}, tmp_path / "other.pt")
    loaded = build(tiny_model_folder, f"generator_ckpt={tmp_path}/other.pt", "use_ema=true")
    for name, tensor in plain.generator.model.state_dict().items():
        assert torch.equal(loaded.generator.model.state_dict()[name], tensor + 1), name


def test_an_i2v_folder_brings_its_image_tower(tiny_i2v_folder, tmp_path):
    pipeline = build(tiny_i2v_folder)
    assert isinstance(pipeline.clip, CLIPModel) and pipeline.generator.model.config.in_dim == 36
    assert build(tiny_i2v_folder, "causal=false").clip is not None
    folder = tmp_path / "Wan2.1-I2V-14B-480P"
    shutil.copytree(tiny_i2v_folder, folder, ignore=shutil.ignore_patterns("models_clip*"))
    with pytest.raises(FileNotFoundError, match="none of models_clip.*hf download Wan-AI/Wan2.1-I2V-14B-480P"):
        build(folder)
