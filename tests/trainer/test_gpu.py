"""What only GPUs show.

Compiled blocks, flex-attention and bfloat16 train like eager dense float32 on the CPU; networks cut by NCCL, offloaded
or not, like whole ones; two GPUs like one.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.trainer.toy import make_student
from tests.trainer.two_networks import train, train_on
from trainer.diffusion import DiffusionTrainer
from trainer.distillation import ScoreDistillationTrainer
from trainer.gan import GANTrainer
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


def draw_heads(*networks: nn.Module) -> None:
    """Scores that are far apart: the difference of two that barely learned anything drowns in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    for network in networks:
        weight = network.model.head.head.weight
        weight.data.copy_(0.1 * torch.randn(weight.shape, generator=generator))


STREAMS = "distillation.num_streams=2 num_training_frames=60 distillation.num_grad_frames=6"
CONTROL = "control.pose_dim=8 control.image_dropout=0.5 batch_size=4 total_batch_size=8"


@pytest.mark.parametrize(
    "kind",
    ["diffusion", "diffusion compile=true", f"diffusion {CONTROL}", "dmd", f"dmd {STREAMS}", "sid", "causvid", "gan"],
)
def test_captured_passes_train_like_launched_ones(kind: str, tmp_path: Path, folders):
    """Two passes make a step, so both must add to the same gradients; rollouts leave at either of two steps."""
    name, *more = kind.split()
    trainer = {"diffusion": DiffusionTrainer, "gan": GANTrainer}.get(name, ScoreDistillationTrainer)
    settings = ["batch_size=2", "total_batch_size=4", "max_steps=12", "optimizer.lr=1e-4", *more]
    settings += ["gan.discriminator_warmup_steps=0"]
    settings += [f"distribution_loss={name}"] if trainer is ScoreDistillationTrainer else []
    for graphs in ("true", "false"):
        options = [*settings, f"cuda_graphs={graphs}"]
        run = make_student(trainer, tmp_path / graphs, folders, *options, ranks=Ranks(torch.device("cuda")))
        run.train(save=False, visualize=False)
        assert all(graphed.captured for graphed in run.graphs.values()) and bool(run.graphs) == (graphs == "true")
    for player in run.players:
        for key in (f"{player.name}/loss", f"{player.name}/grad_norm"):
            captured, launched = (losses(tmp_path / graphs, key) for graphs in ("true", "false"))
            assert captured == pytest.approx(launched, rel=1e-2), key  # kernels that add in any order


@pytest.mark.parametrize("loss", ["dmd", "sid", "causvid"])
def test_distillation_in_bfloat16(loss: str, tmp_path: Path, folders, toy_sizes):
    """From the same weights and the same numbers; only the precision differs, and the passes are checkpointed."""
    settings = [f"distribution_loss={loss}", "gradient_checkpointing=true", "optimizer.lr=1e-5", "max_steps=2"]
    for device in ("cuda", "cpu"):
        ranks = Ranks(torch.device(device))
        trainer = make_student(ScoreDistillationTrainer, tmp_path / device, folders, *settings, ranks=ranks)
        draw_heads(trainer.objective.scores.real, trainer.objective.scores.fake)
        trainer.train(save=False, visualize=False)
    for key in ("student/grad_norm", "critic/loss", "critic/grad_norm"):
        gpu, cpu = (losses(tmp_path / device, key) for device in ("cuda", "cpu"))
        assert gpu == pytest.approx(cpu, rel=0.1), key


@pytest.fixture
def group_of_one():
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield Ranks(torch.device("cuda", 0))
    dist.destroy_process_group()


def assert_like(folder: Path, other: Path, tolerance: float) -> None:
    """Losses and gradient norms of every step agree: a step's weights show in the next one's."""
    for name in ("student/loss", "student/grad_norm", "critic/loss", "critic/grad_norm"):
        found, expected = losses(folder, name), losses(other, name)
        assert len(found) == len(expected) >= 2
        assert found == pytest.approx(expected, rel=tolerance), name


def test_a_mesh_of_one_trains_like_the_whole_network(tmp_path: Path, group_of_one: Ranks):
    """Compiled, checkpointed, gathered in bfloat16 against eager autocast; then in float32; then in main memory."""
    common = ["max_steps=3", "batch_size=2"]
    whole, cut = ["sharding_strategy=no_shard"], ["sharding_strategy=hybrid_full", "gradient_checkpointing=true"]
    train(tmp_path / "whole", *common, *whole, ranks=group_of_one)
    train(tmp_path / "cut", *common, *cut, "compile=true", ranks=group_of_one)
    assert_like(tmp_path / "cut", tmp_path / "whole", tolerance=0.1)
    train(tmp_path / "whole32", *common, *whole, "mixed_precision=false", ranks=group_of_one)
    train(tmp_path / "cut32", *common, *cut, "mixed_precision=false", ranks=group_of_one)
    assert_like(tmp_path / "cut32", tmp_path / "whole32", tolerance=0.02)  # TF32 has three digits
    train(tmp_path / "offloaded", *common, *cut, "compile=true", "cpu_offload=true", ranks=group_of_one)
    assert_like(tmp_path / "offloaded", tmp_path / "cut", tolerance=0.02)


def test_sharded_flex_attention_compiled_and_checkpointed(tmp_path: Path, monkeypatch, group_of_one: Ranks):
    sizes = {"dim": 64, "ffn_dim": 128, "num_heads": 2, "num_layers": 2, "in_dim": 4, "out_dim": 4, "freq_dim": 64}
    monkeypatch.setitem(WAN_CONFIGS, "toy", WanConfig(**sizes, text_dim=32, text_len=24))
    monkeypatch.setattr("trainer.vae.STATISTICS_CLIPS", 4)
    make(VAETrainer, tmp_path / "vae", "cuda", *VAE).train(visualize=False)
    options = [*DIT, f"data.vae_folder={tmp_path / 'vae' / 'export'}", "compile=true", "gradient_checkpointing=true"]
    folder = tmp_path / "dit"
    config = load_config(overrides=[*options, "sharding_strategy=full"])
    DiffusionTrainer(config, group_of_one, folder, Tracker(folder)).train()
    assert all(0 < loss < 10 for loss in losses(folder, "student/loss"))
    assert (folder / "export" / "diffusion_pytorch_model.safetensors").is_file()
    assert (folder / "samples" / "step_000003.png").is_file()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("strategy", ["full", "hybrid_full sharding_group_size=1", "no_shard"])
def test_two_gpus_are_one(strategy: str, tmp_path: Path, group_of_one: Ranks):
    train(tmp_path / "one", "max_steps=3", "batch_size=4", "sharding_strategy=no_shard", ranks=group_of_one)
    train_on(2, tmp_path / "two", f"max_steps=3 batch_size=2 device=cuda compile=true sharding_strategy={strategy}")
    assert_like(tmp_path / "two", tmp_path / "one", tolerance=0.1)
