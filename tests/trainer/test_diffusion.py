"""trainer/diffusion.py: a toy model takes its steps in every mode, resumes exactly, and comes back from its export."""

import json
from pathlib import Path

import pytest
import torch

from tests.trainer.toy import ALONE, TOY, make, state
from trainer.diffusion import DiffusionTrainer
from utils.conditioning import Conditioning
from utils.config import ConfigError, load_config
from utils.distributed import Ranks, Rngs, SampleRngs
from utils.wan_wrapper import WanDiffusionWrapper, WanTextEncoder, WanVAEWrapper

pytestmark = pytest.mark.usefixtures("toy_sizes")


def make_trainer(folder: Path, vae_folder: Path, *overrides: str, ranks: Ranks = ALONE) -> DiffusionTrainer:
    return make(DiffusionTrainer, folder, vae_folder, *overrides, ranks=ranks)


@pytest.mark.parametrize(
    "mode",
    [
        ["teacher_forcing=true"],
        ["teacher_forcing=false"],
        ["causal=false", "teacher_forcing=false"],
        ["independent_first_frame=true", "num_training_frames=7", "num_output_frames=7"],
        ["gradient_checkpointing=true", "timestep_sampling=logit_normal", "timestep_weighting=true"],
        ["denoising_loss_type=x0", "noise_augmentation_max_timestep=0"],
    ],
    ids=lambda mode: mode[0],
)
def test_every_mode_learns_something(mode: list[str], tmp_path: Path, vae_folder: Path):
    trainer = make_trainer(tmp_path, vae_folder, "max_steps=2", *mode)
    before = {name: p.detach().clone() for name, p in trainer.players[0].module.named_parameters()}
    trainer.train(save=False, visualize=False)
    unmoved = [name for name, p in trainer.players[0].module.named_parameters() if torch.equal(p, before[name])]
    assert not unmoved
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert 0.1 < lines[-1]["student/loss"] < 10


def test_resumed_is_uninterrupted(tmp_path: Path, vae_folder: Path):
    make_trainer(tmp_path / "whole", vae_folder, "max_steps=4").train(visualize=False)
    make_trainer(tmp_path / "parts", vae_folder, "max_steps=2").train(visualize=False)
    make_trainer(tmp_path / "parts", vae_folder, "max_steps=4").train(visualize=False)
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_accumulated_passes_are_one_large_batch(tmp_path: Path, vae_folder: Path):
    make_trainer(tmp_path / "large", vae_folder, "max_steps=2", "batch_size=4").train(visualize=False)
    make_trainer(tmp_path / "small", vae_folder, "max_steps=2", "total_batch_size=4").train(visualize=False)
    large, small = state(tmp_path / "large"), state(tmp_path / "small")
    for name, tensor in large.items():
        if "/exp_avg/" in name:  # the gradients; Adam turns rounding in tiny ones into whole steps
            torch.testing.assert_close(tensor, small[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_evaluation_leaves_a_contact_sheet(tmp_path: Path, vae_folder: Path):
    make_trainer(tmp_path, vae_folder, "max_steps=1").train(save=False)
    assert (tmp_path / "samples" / "step_000001.png").stat().st_size > 1000
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["eval/loss"] > 0


def test_export_is_a_model_folder(tmp_path: Path, vae_folder: Path):
    trainer = make_trainer(tmp_path, vae_folder, "max_steps=2", "ema.weight=0")
    trainer.train(visualize=False)
    folder = str(tmp_path / "export")
    options = {"is_causal": True, "local_attn_size": 6, "timestep_shift": 3.0}
    generator = WanDiffusionWrapper(folder, dtype=torch.float32, **options)
    text_encoder = WanTextEncoder(folder, dtype=torch.float32)
    vae = WanVAEWrapper(folder)

    prompt = ["a red puppet waves"]
    embeds = text_encoder(prompt)
    torch.testing.assert_close(embeds, trainer.embed(prompt).detach(), rtol=0.05, atol=0.05)  # bfloat16 on disk
    x, t = torch.randn(1, 6, 4, 4, 4), torch.full((1, 6), 500.0)
    with torch.no_grad():
        flow, _ = generator(x, Conditioning(embeds), t)
        expected, _ = trainer.generator(x, Conditioning(trainer.embed(prompt)), t)
    torch.testing.assert_close(flow, expected, rtol=0.05, atol=0.02)
    assert vae.decode_to_pixel(x).shape == (1, 21, 3, 32, 32)


def test_an_exported_model_is_trained_further(tmp_path: Path, vae_folder: Path):
    make_trainer(tmp_path / "first", vae_folder, "max_steps=1").train(visualize=False)
    more = ["from_scratch=false", f"model_name={tmp_path / 'first' / 'export'}", "max_steps=1"]
    config = load_config(overrides=[*TOY, *more])
    DiffusionTrainer(config, ALONE, tmp_path / "second").train(visualize=False)
    frozen = load_config(overrides=[*TOY, *more, "train_text_encoder=false"])
    trainer = DiffusionTrainer(frozen, ALONE, tmp_path / "third")
    trainer.train(visualize=False)
    assert not any("text_encoder" in name for name in state(tmp_path / "third"))
    assert WanTextEncoder(str(tmp_path / "third" / "export"))(["a puppet"]).shape == (1, 24, 16)


def test_a_kill_while_the_tokenizer_is_copied_leaves_no_torn_one(tmp_path: Path, vae_folder: Path):
    (tmp_path / "export" / "tokenizer").mkdir(parents=True)  # as far as the copy came
    trainer = make_trainer(tmp_path, vae_folder, "max_steps=1")
    assert trainer.tokenizer(["a puppet"])[1].sum() == 3


def test_evaluation_has_the_shape_and_the_gradient_of_training(tmp_path: Path, vae_folder: Path, monkeypatch):
    """Else torch.compile would compile again, or flex-attention run eagerly and hold every score."""
    monkeypatch.setattr("trainer.latents.NUM_EVAL_SAMPLES", 3)
    trainer = make_trainer(tmp_path, vae_folder, "max_steps=1")
    seen = []
    loss = trainer.objective.loss

    def spy(batch, rngs):
        embeds = batch.conditioning.prompt_embeds
        seen.append((batch.clean_latent.shape, embeds.requires_grad, torch.is_grad_enabled()))
        return loss(batch, rngs)

    trainer.objective.loss = trainer.players[0].loss = spy
    trainer.train(save=False)
    assert len(seen) == 3 and len(set(seen)) == 1  # one training pass; two batches of 2 hold the 3 held-out samples


def test_dropped_prompts_are_the_negative_prompt(tmp_path: Path, vae_folder: Path):
    trainer = make_trainer(tmp_path, vae_folder, "max_steps=1", "data.text_dropout=1", "negative_prompt=nothing")
    trainer.start()
    batch = trainer.prepare(SampleRngs(Rngs(0, 0, torch.device("cpu")), range(2)))
    expected = trainer.embed(["nothing", "nothing"])
    torch.testing.assert_close(batch.conditioning.prompt_embeds, expected)


def test_settings_that_cannot_work(tmp_path: Path, vae_folder: Path):
    with pytest.raises(ConfigError, match="set train_text_encoder: true"):
        make_trainer(tmp_path, vae_folder, "max_steps=1", "train_text_encoder=false")
    with pytest.raises(ConfigError, match="square"):
        make_trainer(tmp_path, vae_folder, "max_steps=1", "width=48")
    with pytest.raises(ValueError, match="no multiple"):
        make_trainer(tmp_path, vae_folder, "max_steps=1", "data.pool_size=7").start()
    with pytest.raises(ValueError, match="teacher_forcing: false"):
        make_trainer(tmp_path, vae_folder, "max_steps=1", "causal=false")


@pytest.mark.parametrize("mode", ["teacher_forcing=true", "teacher_forcing=false", "causal=false"])
def test_checkpointing_changes_nothing(mode: str, tmp_path: Path, vae_folder: Path):
    forced = "teacher_forcing=true" if mode == "teacher_forcing=true" else "teacher_forcing=false"
    for checkpointing in ("true", "false"):
        settings = [f"gradient_checkpointing={checkpointing}", "max_steps=2", forced, mode]
        make(DiffusionTrainer, tmp_path / checkpointing, vae_folder, *settings).train(visualize=False)
    on, off = state(tmp_path / "true"), state(tmp_path / "false")
    assert all(torch.equal(on[name], off[name]) for name in on)
