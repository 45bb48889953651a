"""trainer/vae.py: a VAE of a few thousand parameters takes its steps, resumes, and comes back from its export."""

import json
import logging
from pathlib import Path

import pytest
import torch

from trainer.vae import VAETrainer, psnr
from utils.config import load_config
from utils.distributed import Ranks
from utils.tracking import Tracker
from utils.training_state import load_training_state
from wan.modules.vae import load_vae

TINY = [
    "trainer=vae", "sharding_strategy=no_shard", "height=32", "width=32", "batch_size=2", "logging.log_iters=1",
    "vae.dim=4", "vae.z_dim=4", "vae.dim_mult=[1,1,2]", "data.num_frames=5", "data.tail_num_frames=9",
    "data.num_eval_clips=2", "num_training_frames=3", "optimizer.warmup_steps=1", "optimizer.schedule=constant",
]  # fmt: skip


@pytest.fixture(autouse=True)
def few_statistics(monkeypatch):
    monkeypatch.setattr("trainer.vae.STATISTICS_CLIPS", 4)


def make_trainer(folder: Path, *overrides: str) -> VAETrainer:
    return VAETrainer(load_config(overrides=[*TINY, *overrides]), Ranks(torch.device("cpu")), folder, Tracker(folder))


def test_steps_evaluation_and_export(tmp_path: Path):
    trainer = make_trainer(tmp_path, "max_steps=3")
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    assert lines[0]["vae/kl"] > 0
    assert {"eval/psnr", "eval/psnr_puppet", "eval/psnr_first_quarter", "eval/psnr_last_quarter"} < lines[-1].keys()

    vae = load_vae(tmp_path / "export" / "Wan2.1_VAE.safetensors")
    clips = trainer.render(2, 9, 0)
    latents = vae.encode(clips.video)
    assert latents.shape == (2, 4, 3, 4, 4)
    assert vae.decode(latents).shape == clips.video.shape
    assert abs(latents.mean()) < 1  # normalised by measured statistics
    assert 0.3 < latents.std() < 3


def test_the_tail_sees_longer_clips(tmp_path: Path):
    trainer = make_trainer(tmp_path, "max_steps=4", "data.tail_share=0.5")
    lengths = []
    loss = trainer.loss
    trainer.players[0].loss = lambda clips, rngs: (lengths.append(clips.video.shape[2]), loss(clips, rngs))[1]
    trainer.train(save=False, visualize=False)
    assert lengths == [5, 5, 9, 9]


def test_resumed_is_uninterrupted(tmp_path: Path):
    options = ("ema.weight=0.5", "data.tail_share=0")
    make_trainer(tmp_path / "whole", "max_steps=3", *options).train(visualize=False)
    make_trainer(tmp_path / "parts", "max_steps=1", *options).train(visualize=False)
    make_trainer(tmp_path / "parts", "max_steps=3", *options).train(visualize=False)
    whole, parts = (load_training_state(tmp_path / name).tensors for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_loss_falls(tmp_path: Path, caplog):
    caplog.set_level(logging.INFO)
    make_trainer(tmp_path, "max_steps=25", "batch_size=4", "optimizer.lr=3e-3").train(save=False, visualize=False)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["vae/loss"] for line in lines]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:2]) / 2 * 5
    assert "s/step" in caplog.text


def test_psnr_of_known_errors():
    assert psnr(torch.tensor(4.0)) == 0  # an error of the whole range
    torch.testing.assert_close(psnr(torch.tensor(0.04)), torch.tensor(20.0))
