"""trainer/work.py: the step of the paper; that it counts what runs is shown in tests/benchmarks/test_dmd_step.py."""

import dataclasses

import pytest

from pipeline.rollout import plan_blocks
from trainer.work import DistillationWork
from wan.configs import WAN_CONFIGS

STUDENT, LARGE = WAN_CONFIGS["Wan2.1-T2V-1.3B"], WAN_CONFIGS["Wan2.1-T2V-14B"]
PAPER = DistillationWork(
    STUDENT,
    LARGE,
    STUDENT,
    blocks=list(plan_blocks(21, 3)),
    tokens_per_frame=1560,
    window=21,
    num_steps=4,
    recomputation=True,
)
LAST_CLEAN_PASS = 39e12  # of the last block: nobody looks at it, and we do not make it


def test_a_step_on_paper():
    """1.3B student and critic, 14B teacher: 4.92 PFLOP for the generator, 1.82 for the critic."""
    assert PAPER.mean_generator_step() + LAST_CLEAN_PASS == pytest.approx(4.92e15, rel=0.01)
    assert PAPER.mean_critic_step() + LAST_CLEAN_PASS == pytest.approx(1.82e15, rel=0.01)


def test_what_saves_work():
    def step(**changes) -> float:
        return dataclasses.replace(PAPER, **changes).mean_generator_step()

    whole = step()
    assert whole - step(clean_context=False) == pytest.approx(
        (198e12 - LAST_CLEAN_PASS) * 29 / 30, rel=0.02
    )  # last layer: keys
    assert whole - step(recomputation=False) == pytest.approx(198e12, rel=0.02)
    assert whole - step(real_passes=1) == pytest.approx(1676e12, rel=0.01)
    assert step(num_steps=1) < step(num_steps=2) < whole
    assert step(window=6) < whole < step(through_scores=True)
