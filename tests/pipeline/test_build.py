"""From a config to a pipeline: what fits is built, what does not is refused before gigabytes are read."""

import shutil
from functools import partial

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


OPTIONS = {"text_prompts": ["a puppet"], "seeds": [0], "num_frames": 6, "height": 32, "width": 32}
FEW = ["denoising_step_list=[1000,500]", "model_kwargs.local_attn_size=6"]


@pytest.mark.parametrize(("word", "decoder"), [("default", "tiny"), ("max", "full")])
def test_compiled_is_as_it_comes(word: str, decoder: str, tiny_model_folder, monkeypatch, caplog):
    """All but the code of kernels; on a CPU max is default, and says so."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    settings = [*FEW, f"vae_decoder={decoder}"]
    expected = build(tiny_model_folder, *settings).inference(**OPTIONS)
    with caplog.at_level("INFO", logger="pipeline.build"):
        pipeline = build(tiny_model_folder, *settings, f"compile={word}", "vae_overlap=true")
    notes = [record.message for record in caplog.records if "compile=max records passes" in record.message]
    assert len(notes) == (word == "max")
    torch.testing.assert_close(pipeline.inference(**OPTIONS), expected, atol=1e-5, rtol=1e-5)
    assert list(pipeline.generator.state_dict()) == list(build(tiny_model_folder).generator.state_dict())


def test_a_lora_merges_into_fused_projections(tiny_model_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    plain, fused = (build(tiny_model_folder, *FEW, f"compile={word}") for word in ("off", "default"))
    update = {"blocks.0.self_attn.k.lora_A.weight": torch.randn(2, 32)}
    update["blocks.0.self_attn.k.lora_B.weight"] = torch.randn(32, 2)
    torch.save(update, tmp_path / "lora.pt")
    before = plain.inference(**OPTIONS)
    for pipeline in (plain, fused):
        pipeline.load_unianimate_lora(tmp_path / "lora.pt")
    after = plain.inference(**OPTIONS)
    torch.testing.assert_close(fused.inference(**OPTIONS), after, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, after, atol=1e-3)


def test_what_linear_layers_cannot_be_is_refused(tiny_model_folder):
    with pytest.raises(ValueError, match="linear_dtype=float8 needs a GPU .*, this is a CPU; set linear_dtype=auto"):
        build(tiny_model_folder, "linear_dtype=float8")
    with pytest.raises(ValueError, match=r"linear_dtype is bfloat16, but .* in torch.float32; set dtype=bfloat16"):
        build(tiny_model_folder, "linear_dtype=bfloat16")
    assert build(tiny_model_folder, "linear_dtype=bfloat16", "dtype=bfloat16").generator.model.dtype == torch.bfloat16


def test_the_vae_may_be_elsewhere(tiny_model_folder):
    """The device is looked up as the generator's is; there is no second one here."""
    assert build(tiny_model_folder, "vae_device=cpu").vae.device.type == "cpu"
    with pytest.raises(ValueError, match="device is 'gpu'; use auto, cpu, cuda or cuda:N"):
        build(tiny_model_folder, "vae_device=gpu")


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
