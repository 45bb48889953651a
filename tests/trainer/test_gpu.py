"""What only a GPU shows: compiled blocks, flex-attention and bfloat16 train like eager dense float32 on the CPU."""

import json
from pathlib import Path

import pytest
import torch

from tests.trainer.toy import make_student
from trainer.diffusion import DiffusionTrainer
from trainer.distillation import ScoreDistillationTrainer
from trainer.vae import VAETrainer
from utils.config import load_config
from utils.distributed import Ranks
from utils.tracking import Tracker
from wan.configs import WAN_CONFIGS, WanConfig

pytestmark = pytest.mark.gpu  # torch.compile with Triton, flex-attention's backward and autocast need CUDA

VAE = ["trainer=vae", "height=128", "width=128", "batch_size=2", "vae.dim=8", "vae.z_dim=4", "vae.dim_mult=[1,1,2]"]
VAE += ["data.num_frames=5", "data.tail_num_frames=9", "num_training_frames=3", "max_steps=4", "logging.log_iters=1"]
DIT = ["model_name=toy", "from_scratch=true", "train_text_encoder=true", "height=128", "width=128", "batch_size=4"]
DIT += ["num_training_frames=6", "data.pool_size=8", "data.min_fill=8", "data.encode_batch_size=4", "max_steps=3"]
DIT += ["logging.log_iters=1", "optimizer.lr=1e-4", "text_encoder.d_model=32", "text_encoder.num_layers=1"]


def losses(folder: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def make(trainer: type, folder: Path, device: str, *overrides: str):
    return trainer(load_config(overrides=list(overrides)), Ranks(torch.device(device)), folder, Tracker(folder))


def test_compiled_training_in_bfloat16(tmp_path: Path, monkeypatch):
    sizes = {"dim": 64, "ffn_dim": 128, "num_heads": 2, "num_layers": 2, "in_dim": 4, "out_dim": 4, "freq_dim": 64}
    monkeypatch.setitem(WAN_CONFIGS, "toy", WanConfig(**sizes, text_dim=32, text_len=24))
    monkeypatch.setattr("trainer.vae.STATISTICS_CLIPS", 4)
    vae = make(VAETrainer, tmp_path / "vae", "cuda", *VAE, "compile=true")
    vae.train()
    assert all(0 < loss < 10 for loss in losses(tmp_path / "vae", "vae/loss"))

    data = f"data.vae_folder={tmp_path / 'vae' / 'export'}"
    make(DiffusionTrainer, tmp_path / "gpu", "cuda", *DIT, data, "compile=true").train()
    make(DiffusionTrainer, tmp_path / "cpu", "cpu", *DIT, data).train(save=False, visualize=False)
    gpu, cpu = (losses(tmp_path / name, "student/loss") for name in ("gpu", "cpu"))
    assert len(gpu) == len(cpu) == 3
    # Weights are drawn per device, so only the size of the loss is comparable.
    assert all(abs(a - b) < 0.5 for a, b in zip(gpu, cpu, strict=True))
    assert (tmp_path / "gpu" / "samples" / "step_000003.png").is_file()


@pytest.mark.parametrize("loss", ["dmd", "sid", "causvid"])
def test_distillation_in_bfloat16(loss: str, tmp_path: Path, folders, toy_sizes):
    """From the same weights and the same numbers; only the precision differs, and the passes are checkpointed."""
    settings = [f"distribution_loss={loss}", "gradient_checkpointing=true", "optimizer.lr=1e-5", "max_steps=2"]
    for device in ("cuda", "cpu"):
        ranks = Ranks(torch.device(device))
        trainer = make_student(ScoreDistillationTrainer, tmp_path / device, folders, *settings, ranks=ranks)
        trainer.train(save=False, visualize=False)
    for key in ("student/grad_norm", "critic/loss", "critic/grad_norm"):
        gpu, cpu = (losses(tmp_path / device, key) for device in ("cuda", "cpu"))
        assert gpu == pytest.approx(cpu, rel=0.1), key
