"""Recipes on the one loop: resumed = uninterrupted, passes = batch, checkpointing on = off, two ranks = one process.

Score distillation has the same tests in test_distillation.py.
"""

from pathlib import Path

import pytest
import torch

from tests import ranks
from tests.trainer.toy import ALONE, DrawnData, make_student, state
from trainer.base import Trainer
from trainer.consistency import ConsistencyTrainer
from trainer.diffusion import DiffusionTrainer
from trainer.gan import GANTrainer
from trainer.ode import ODETrainer
from utils.distributed import Ranks, init_distributed, shutdown

pytestmark = pytest.mark.usefixtures("toy_sizes")

RECIPES: dict[str, tuple[type[Trainer], list[str]]] = {
    "teacher forcing": (DiffusionTrainer, ["data.text_dropout=0.5"]),
    "ode": (ODETrainer, ["teacher_forcing=false", "data.kind=ode_pairs"]),
    "consistency": (ConsistencyTrainer, ["consistency.causal_teacher=false"]),
    "gan": (
        GANTrainer,
        ["gan.r1_weight=0.1", "gan.r2_weight=0.1", "gan.r1_sigma=0.1", "gan.r2_sigma=0.1", "gan.denoising_weight=0.5"],
    ),
}


@pytest.fixture
def models(folders, pairs) -> list[Path]:
    """The causal model, its bidirectional teacher, and the latter's trajectories."""
    return [*folders, pairs[1]]


def make(name: str, folder: Path, models: list[Path], *overrides: str, where: Ranks = ALONE) -> Trainer:
    recipe, settings = RECIPES[name]
    settings = [*settings, f"data.path={models[2]}"] if name == "ode" else settings
    trainer = make_student(recipe, folder, tuple(models[:2]), *settings, *overrides, ranks=where)
    if name == "gan":  # a new head weighs nothing, so nothing before it would learn in the first step
        generator = torch.Generator().manual_seed(0)
        torch.nn.init.normal_(trainer.objective.discriminator.head._cls_pred_branch[-1].weight, generator=generator)
    return trainer


@pytest.mark.parametrize("name", RECIPES)
def test_resumed_is_uninterrupted(name: str, tmp_path: Path, models):
    make(name, tmp_path / "whole", models, "max_steps=4").train(visualize=False)
    make(name, tmp_path / "parts", models, "max_steps=2").train(visualize=False)
    make(name, tmp_path / "parts", models, "max_steps=4").train(visualize=False)
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.parametrize("name", RECIPES)
def test_checkpointing_changes_nothing(name: str, tmp_path: Path, models):
    for checkpointing in ("true", "false"):
        settings = [f"gradient_checkpointing={checkpointing}", "max_steps=2"]
        make(name, tmp_path / checkpointing, models, *settings).train(visualize=False)
    on, off = state(tmp_path / "true"), state(tmp_path / "false")
    assert all(torch.equal(on[key], off[key]) for key in on)


@pytest.mark.parametrize("name", RECIPES)
def test_accumulated_passes_are_one_large_batch(name: str, tmp_path: Path, models):
    make(name, tmp_path / "large", models, "max_steps=1", "batch_size=4").train(visualize=False)
    make(name, tmp_path / "small", models, "max_steps=1", "total_batch_size=4").train(visualize=False)
    same_gradients(state(tmp_path / "large"), state(tmp_path / "small"))


def test_two_ranks_are_one_process(tmp_path: Path, models):
    """Replicated or sharded, each rank with half of the batch."""
    done = ranks.run(__file__, 2, str(tmp_path), *map(str, models), timeout=300)
    assert done.returncode == 0, done.stderr
    for name in RECIPES:
        on_drawn_data(name, tmp_path / name / "one", models, "batch_size=2")
        for strategy in STRATEGIES[name]:
            same_gradients(state(tmp_path / name / "one"), state(tmp_path / name / strategy))


STRATEGIES = {name: ["no_shard", "full"] if name == "gan" else ["full"] for name in RECIPES}


def on_drawn_data(name: str, folder: Path, models: list[Path], *overrides: str, where: Ranks = ALONE) -> None:
    trainer = make(name, folder, models, "max_steps=1", *overrides, where=where)
    trainer.source.open = lambda: DrawnData(3) if name == "ode" else DrawnData()
    trainer.train(visualize=False)


def same_gradients(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """By Adam's first moments, to a ten-thousandth of each tensor's largest: weights would hide it, as Adam turns the
    rounding of tiny gradients into whole steps."""
    assert one.keys() == other.keys()
    moments = [key for key in one if "/exp_avg/" in key]
    assert moments
    for key in moments:
        near = 1e-6 + 1e-4 * one[key].abs().max().item()
        torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=near, msg=lambda m, k=key: f"{k}: {m}")


def on_two_ranks(arguments: list[str]) -> None:
    where = init_distributed("cpu")
    home, *models = map(Path, arguments)
    for name in RECIPES:
        for strategy in STRATEGIES[name]:
            options = ["batch_size=1", f"sharding_strategy={strategy}"]
            on_drawn_data(name, home / name / strategy, models, *options, where=where)
    shutdown()


if __name__ == "__main__":
    ranks.main(on_two_ranks, [ranks.OPTIMIZER, ranks.TEXT_ENCODER])
