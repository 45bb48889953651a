"""trainer/consistency.py: the target is the run's average, with either teacher."""

import json
from pathlib import Path

import pytest
import torch

from tests.trainer.toy import make_student
from trainer.consistency import ConsistencyTrainer
from utils.config import ConfigError
from utils.training_state import load_training_state

pytestmark = pytest.mark.usefixtures("toy_sizes")

BIDIRECTIONAL = ["consistency.causal_teacher=false"]


def causal(folders: tuple[Path, Path]) -> list[str]:
    return [f"distillation.real_name={folders[0]}"]


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_student_moves_its_average_follows_and_the_teacher_stays(is_causal: bool, tmp_path: Path, folders):
    trainer = make_student(ConsistencyTrainer, tmp_path, folders, *(causal(folders) if is_causal else BIDIRECTIONAL))
    teacher = trainer.objective.teacher
    assert teacher.is_causal is is_causal
    before = [p.detach().clone() for p in (*trainer.generator.parameters(), *teacher.parameters())]
    trainer.train(save=False, visualize=False)
    after = [p.detach() for p in (*trainer.generator.parameters(), *teacher.parameters())]
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    num_own = len(list(trainer.generator.parameters()))
    assert all(moved[:num_own]) and not any(moved[num_own:])
    ema = trainer.learners[0].ema.average
    for name, parameter in trainer.average.named_parameters():
        assert torch.equal(parameter, ema[f"generator.{name}"])
        assert not parameter.requires_grad
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["student/loss"] < 5 for line in lines)


def test_a_resumed_run_takes_the_average_up_again(tmp_path: Path, folders):
    make_student(ConsistencyTrainer, tmp_path, folders, *causal(folders), "max_steps=2").train(visualize=False)
    trainer = make_student(ConsistencyTrainer, tmp_path, folders, *causal(folders), "max_steps=3")
    trainer.resume()
    trainer.start()
    saved = load_training_state(tmp_path).tensors
    for name, parameter in trainer.average.named_parameters():
        assert torch.equal(parameter, saved[f"student/ema/generator.{name}"])


def test_the_held_out_error_is_told_beside_samples(tmp_path: Path, folders):
    make_student(ConsistencyTrainer, tmp_path, folders, *causal(folders), "max_steps=1").train(save=False)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["eval/loss"] >= 0
    assert (tmp_path / "samples" / "step_000001.png").stat().st_size > 1000


def test_a_config_of_another_stage_is_refused(tmp_path: Path, folders):
    with pytest.raises(ConfigError, match="the consistency trainer makes a causal few-step model; set causal: true"):
        make_student(ConsistencyTrainer, tmp_path, folders, "denoising_step_list=null")
