"""trainer/graphs.py without a GPU: who is refused, and how a batch is walked. Captures run in test_gpu.py."""

from pathlib import Path

import pytest
import torch

from model.base import Batch
from tests.trainer.toy import FEW_STEPS, make, make_student
from trainer.diffusion import DiffusionTrainer
from trainer.distillation import ScoreDistillationTrainer
from trainer.graphs import mapped, tensors
from trainer.vae import VAETrainer
from utils.conditioning import Conditioning
from utils.config import ConfigError
from utils.distributed import Rngs, SampleRngs


def test_without_cuda_nothing_is_captured(tmp_path: Path, vae_folder: Path, folders):
    options = [f"model_name={folders[0]}", *FEW_STEPS[:2], "cuda_graphs=true"]
    assert not make(DiffusionTrainer, tmp_path, vae_folder, *options).graphs


def test_what_cannot_be_captured_is_refused(tmp_path: Path, vae_folder: Path, folders):
    with pytest.raises(ConfigError, match="text encoder that learns .* set cuda_graphs: false"):
        make(DiffusionTrainer, tmp_path, vae_folder, "cuda_graphs=true")
    options = [f"model_name={folders[0]}", *FEW_STEPS[:2], "cuda_graphs=true", "gradient_checkpointing=true"]
    with pytest.raises(ConfigError, match="gradient_checkpointing: false"):
        make(DiffusionTrainer, tmp_path, vae_folder, *options)
    with pytest.raises(ConfigError, match="passes of the vae trainer cannot be captured"):
        make(VAETrainer, tmp_path, vae_folder, "cuda_graphs=true")


def test_what_a_player_decides_is_what_its_pass_does(tmp_path: Path, folders):
    """The exit step is drawn from the same generator when it is asked for and when it is taken."""
    trainer = make_student(ScoreDistillationTrainer, tmp_path, folders)
    taken, rollout = [], trainer.objective.generate.pipeline.rollout
    trainer.objective.generate.pipeline.rollout = lambda *args, **options: (
        taken.append(options["exit_steps"]) or rollout(*args, **options)
    )
    decided = []
    for step in range(6):
        rngs = SampleRngs(Rngs(0, step, torch.device("cpu"), stream=1), range(1))
        decided.append(trainer.players[1].decide(rngs.shared))
        trainer.objective.generate(Batch(None, Conditioning(torch.zeros(1, 3, 16))), rngs)
    assert decided == [(6, exits) for exits in taken]
    assert {exits for _, exits in decided} == {(0, 0), (1, 1)}


def test_a_batch_is_walked_in_the_order_of_its_fields():
    batch = Batch(torch.zeros(1), Conditioning(torch.ones(2)), negative=None)
    assert [len(tensor) for tensor in tensors(batch)] == [1, 2]
    doubled = mapped(lambda tensor: tensor + tensor, batch)
    assert torch.equal(doubled.conditioning.prompt_embeds, torch.full((2,), 2.0))
    assert doubled.negative is None and batch.conditioning.prompt_embeds.sum() == 2
