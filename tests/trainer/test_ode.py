"""trainer/ode.py: what is learned from whose trajectories, and pairs that are not this run's."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.trainer.toy import make_student
from trainer.ode import ODETrainer
from utils.config import ConfigError

pytestmark = pytest.mark.usefixtures("toy_sizes")


def train(folder: Path, folders: tuple[Path, Path], pairs: Path, *overrides: str) -> ODETrainer:
    trainer = make_student(ODETrainer, folder, folders, "data.kind=ode_pairs", f"data.path={pairs}", *overrides)
    trainer.train(save=False, visualize=False)
    return trainer


@pytest.fixture
def elsewhere(tmp_path: Path, folders) -> str:
    """A student that starts far from its teacher; toys that have just begun hardly move."""
    weights = make_student(ODETrainer, tmp_path, folders, "data.kind=ode_pairs", "data.path=x").generator.state_dict()
    generator = torch.Generator().manual_seed(0)
    moved = {name: w + 0.1 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    torch.save({"generator": moved}, tmp_path / "elsewhere.pt")
    return f"distillation.init_ckpt={tmp_path / 'elsewhere.pt'}"


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_student_learns_from_either_teacher(is_causal: bool, tmp_path: Path, folders, pairs, elsewhere):
    settings = [elsewhere, f"teacher_forcing={str(is_causal).lower()}", "max_steps=60", "optimizer.lr=3e-3"]
    trainer = train(tmp_path, folders, pairs[not is_causal], *settings, "batch_size=4")
    assert trainer.objective.teacher_forcing is is_causal
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["student/loss"] for line in lines]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert {"student/loss_state_0", "student/loss_state_1"} <= lines[-1].keys()
    assert "student/loss_state_2" not in lines[-1]


def test_held_out_trajectories_are_judged(tmp_path: Path, folders, pairs):
    settings = ["data.kind=ode_pairs", f"data.path={pairs[0]}", "data.num_eval_clips=1", "max_steps=1"]
    trainer = make_student(ODETrainer, tmp_path, folders, *settings, "teacher_forcing=true")
    trainer.train(save=False)
    assert (tmp_path / "samples" / "step_000001.png").stat().st_size > 1000


def test_pairs_that_are_not_this_runs(tmp_path: Path, folders, pairs):
    causal, bidirectional = pairs
    with pytest.raises(ConfigError, match="learns from trajectories; set data.kind to ode_pairs"):
        make_student(ODETrainer, tmp_path, folders)
    with pytest.raises(ConfigError, match="the ode trainer makes a causal few-step model; set causal: true"):
        make_student(ODETrainer, tmp_path, folders, "denoising_step_list=null")
    for settings, words in (
        (["timestep_shift=4"], "was made with shift 3.0, this run has 4.0"),
        (["denoising_step_list=[1000,250]"], "was made with timesteps"),
        (["num_frame_per_block=2", "num_output_frames=20"], "was made with num_frame_per_block 3, this run has 2"),
        (["height=48", "width=48"], "was made with height 32, this run has 48"),
        (["num_training_frames=3"], "trajectories of 6 latent frames, training asks for 3"),
        (["teacher_forcing=false"], "trajectories of a causal teacher; set teacher_forcing: true"),
    ):
        with pytest.raises(ValueError, match=words):
            train(tmp_path, folders, causal, "teacher_forcing=true", *settings)
    with pytest.raises(ValueError, match="trajectories of a bidirectional teacher; set teacher_forcing: false"):
        train(tmp_path, folders, bidirectional, "teacher_forcing=true")
    with pytest.raises(FileNotFoundError, match=r"nowhere holds no ode pairs .*how to make them"):
        train(tmp_path, folders, tmp_path / "nowhere", "teacher_forcing=true")


def test_pairs_of_another_text_encoder(tmp_path: Path, folders, pairs):
    copy = tmp_path / "pairs"
    shutil.copytree(pairs[0], copy)
    about = json.loads((copy / "about.json").read_text())
    (copy / "about.json").write_text(json.dumps(about | {"text_encoder": "another"}))
    with pytest.raises(ValueError, match="was made with text_encoder 'another'"):
        train(tmp_path, folders, copy, "teacher_forcing=true")
