"""trainer/tiny_vae.py: a small decoder learns the pictures of latents that exist, resumes, and serves the folder."""

import json
import shutil

import pytest
import torch

from trainer.tiny_vae import TinyVAETrainer
from utils.config import ConfigError, load_config
from utils.distributed import Ranks
from utils.tracking import Tracker
from utils.training_state import load_training_state
from utils.wan_wrapper import WanVAEWrapper

TINY = [
    "trainer=tiny_vae", "sharding_strategy=no_shard", "height=32", "width=32", "batch_size=2", "logging.log_iters=1",
    "data.num_frames=5", "data.num_eval_clips=2", "num_training_frames=3", "tiny_vae.decoder_channels=[8,6,4]",
    "optimizer.warmup_steps=1", "optimizer.schedule=constant", "optimizer.lr=3e-3",
]  # fmt: skip


@pytest.fixture
def make_trainer(tiny_model_folder):
    def make(folder, *overrides: str) -> TinyVAETrainer:
        config = load_config(overrides=[*TINY, f"model_name={tiny_model_folder}", *overrides])
        return TinyVAETrainer(config, Ranks(torch.device("cpu")), folder, Tracker(folder))

    return make


def test_loss_falls_and_the_export_decodes_for_its_folder(make_trainer, tiny_model_folder, tmp_path):
    trainer = make_trainer(tmp_path, "max_steps=30", "tiny_vae.steps_per_batch=1000", "ema.weight=0")  # one batch
    trainer.train(visualize=False)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["tiny_vae/loss"] for line in lines]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])

    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    for name in ("taew2_1.safetensors", "taew2_1.json"):
        shutil.copyfile(tmp_path / "export" / name, folder / name)
    clips = trainer.make_clips(1, 9, 0)
    pixels = WanVAEWrapper(folder, decoder="tiny").decode_to_pixel(clips.latents.transpose(1, 2))
    expected = trainer.tiny.decode(clips.latents).detach().transpose(1, 2).clamp(-1, 1)
    assert pixels.shape == (1, 9, 3, 32, 32)
    torch.testing.assert_close(pixels, expected, atol=0.05, rtol=0)  # exported in bfloat16


def test_evaluation_sets_the_tiny_decoder_beside_the_full_one(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, "max_steps=1")
    figures = trainer.evaluate()
    assert all(value.isfinite() for value in figures.values())
    clips = trainer.make_clips(2, 9, 0, split="heldout")
    difference = trainer.tiny.decode(clips.latents).clamp(-1, 1) - clips.target
    torch.testing.assert_close(figures["psnr"], 10 * torch.log10(4 / difference.square().mean()), atol=1e-3, rtol=0)


def test_the_pool_is_renewed_as_told_and_resumed_is_uninterrupted(make_trainer, tmp_path):
    options = ("tiny_vae.pool_batches=2", "tiny_vae.steps_per_batch=2", "ema.weight=0.5")
    whole = make_trainer(tmp_path / "whole", "max_steps=4", *options)
    pools, after_step = [], whole.after_step
    whole.after_step = lambda: (after_step(), pools.append(list(whole.pool)))
    whole.train(visualize=False)
    assert pools == [[0, 1], [1, 2], [1, 2], [2, 3]]
    make_trainer(tmp_path / "parts", "max_steps=3", *options).train(visualize=False)
    make_trainer(tmp_path / "parts", "max_steps=4", *options).train(visualize=False)
    states = [load_training_state(tmp_path / name).tensors for name in ("whole", "parts")]
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


def test_the_teacher_may_set_the_target(make_trainer, tiny_model_folder, tmp_path):
    clips = [make_trainer(tmp_path, f"tiny_vae.teacher_share={share}").make_clips(1, 5, 0) for share in (0, 0.5, 1)]
    truth, half, teacher = (clip.target for clip in clips)
    full = WanVAEWrapper(tiny_model_folder).decode_to_pixel(clips[0].latents.transpose(1, 2))
    torch.testing.assert_close(teacher, full.transpose(1, 2), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(half, (truth + teacher) / 2)


def test_sizes_of_other_latents_are_refused(make_trainer, tmp_path):
    with pytest.raises(ConfigError, match=r"latents of .* \(16, 4, 4\), those of .* are \(16, 8, 4\); change"):
        make_trainer(tmp_path, "tiny_vae.patch_size=1")
    with pytest.raises(ConfigError, match=r"tiny_vae\.teacher_share is 2"):
        make_trainer(tmp_path, "tiny_vae.teacher_share=2")
