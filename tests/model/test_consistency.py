"""model/consistency.py: a known flow map is consistent, and what teacher, student and average are shown."""

import pytest
import torch
from torch import Tensor, nn

from model.base import Batch
from model.consistency import ConsistencyDistillation
from utils.conditioning import Conditioning
from utils.distributed import Rngs, SampleRngs
from utils.scheduler import FlowMatchScheduler

SPREAD = 0.5  # standard deviation of the data


class Gaussian(nn.Module):
    """A network for normally distributed data, whose ODE is known: x at sigma has spread s, x0 = x SPREAD / s.

    As a teacher it tells the flow, as a student the end of the trajectory (times `off`); it remembers what it saw.
    Prompts of 0 say that the mean is 0, of -1 that it is -1.
    """

    def __init__(self, is_causal: bool = True, off: float = 1.0):
        super().__init__()
        self.is_causal, self.scheduler = is_causal, FlowMatchScheduler(5.0)
        self.off = nn.Parameter(torch.tensor(off))
        self.seen: list[tuple] = []

    def forward(self, x: Tensor, conditioning: Conditioning, t: Tensor, **past: Tensor):
        self.seen.append((x, conditioning.prompt_embeds, t, past.get("clean_x"), torch.is_grad_enabled()))
        sigma = (t / 1000)[..., None, None, None]
        mean = conditioning.prompt_embeds.mean()
        centred = x - (1 - sigma) * mean
        variance = (1 - sigma) ** 2 * SPREAD**2 + sigma**2
        flow = (sigma - (1 - sigma) * SPREAD**2) / variance * centred - mean
        return flow, torch.where(sigma == 0, x, self.off * SPREAD * centred / variance.sqrt() + mean)


def clips(count: int, frames: int = 6) -> Batch:
    x0 = SPREAD * torch.randn(count, frames, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    return Batch(x0, Conditioning(torch.zeros(count, 1, 1)), Conditioning(torch.full((count, 1, 1), -1.0)))


def rngs(count: int) -> SampleRngs:
    return SampleRngs(Rngs(0, 0, torch.device("cpu")), range(count))


def make(teacher: Gaussian, off: float = 1.0, **options) -> ConsistencyDistillation:
    return ConsistencyDistillation(Gaussian(off=off), Gaussian(off=off), teacher, **{"guidance_scale": 1.0} | options)


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_true_flow_map_is_consistent_and_others_are_not(is_causal: bool):
    batch = clips(64)
    losses = [make(Gaussian(is_causal), steps=steps).loss(batch, rngs(64))[0].item() for steps in (12, 48, 480)]
    assert losses[0] > 10 * losses[1] > 100 * losses[2]  # what is left is the error of the solver's one step
    assert losses[2] < 1e-8
    objective = make(Gaussian(is_causal), off=0.5, steps=12)
    loss, _ = objective.loss(batch, rngs(64))
    loss.backward()
    assert objective.generator.off.grad < 0  # towards 1: the last state, its own end, tells the truth
    assert objective.average.off.grad is None and objective.teacher.off.grad is None


def test_a_causal_teacher_sees_the_students_past_and_blocks_have_their_times():
    objective, batch = make(Gaussian()), clips(64)
    objective.loss(batch, rngs(64))
    (x_t, _, t, past, grad), (x_s, _, s, past_s, grad_s) = objective.generator.seen[0], objective.average.seen[0]
    teacher_x, _, teacher_t, teacher_past, _ = objective.teacher.seen[0]
    assert torch.equal(teacher_x, x_t) and torch.equal(teacher_t, t)
    assert all(torch.equal(clean, batch.clean_latent) for clean in (past, past_s, teacher_past))
    assert grad and not grad_s
    assert torch.equal(t[:, :3], t[:, :1].expand(-1, 3)) and (t[:, 0] != t[:, 3]).float().mean() > 0.8
    places = torch.searchsorted(-objective.grid, -t)
    assert torch.equal(objective.grid[places], t) and torch.equal(objective.grid[places + 1], s)
    flow, _ = Gaussian()(x_t, batch.conditioning, t)
    torch.testing.assert_close(x_s, x_t + ((s - t) / 1000)[..., None, None, None] * flow)


def test_a_bidirectional_teacher_has_one_time_per_clip_and_no_past():
    objective = make(Gaussian(is_causal=False))
    objective.loss(clips(64), rngs(64))
    _, _, t, past, _ = objective.teacher.seen[0]
    assert past is None
    assert torch.equal(t, t[:, :1].expand(-1, 6))
    assert objective.generator.seen[0][3] is not None
    assert len(t.unique()) > 20


def test_the_grid_is_the_one_of_the_few_steps():
    grid = make(Gaussian(), steps=48).grid
    assert len(grid) == 49 and grid[-1] == 0
    torch.testing.assert_close(grid[[0, 12, 24, 36]], FlowMatchScheduler(5.0).warp([1000.0, 750, 500, 250]))


def test_guidance_moves_the_teacher_away_from_the_negative_prompt():
    batch, teacher, t = clips(4), Gaussian(), torch.full((4, 6), 500.0)
    objective = make(teacher, guidance_scale=3.0)
    flow = objective.teacher_flow(batch.clean_latent, t, batch)
    (_, words, _, past, _), (_, negative, _, its_past, _) = teacher.seen
    assert torch.equal(words, batch.conditioning.prompt_embeds)
    assert torch.equal(negative, batch.negative.prompt_embeds)
    assert torch.equal(past, batch.clean_latent) and torch.equal(its_past, batch.clean_latent)
    towards, _ = teacher(batch.clean_latent, batch.conditioning, t)
    away, _ = teacher(batch.clean_latent, batch.negative, t)
    torch.testing.assert_close(flow, away + 3 * (towards - away))


def test_a_first_frame_of_its_own():
    objective = make(Gaussian(), independent_first_frame=True)
    objective.loss(clips(64, frames=7), rngs(64))
    t = objective.generator.seen[0][2]
    assert (t[:, 0] != t[:, 1]).any() and torch.equal(t[:, 1:4], t[:, 1:2].expand(-1, 3))


def test_an_image_in_front_is_shown_to_all_and_not_learned():
    objective = make(Gaussian(), image_first=True)
    error, weight, t = objective.errors(clips(4, frames=7), rngs(4))
    assert error.shape == weight.shape == t.shape == (4, 6)
    with pytest.raises(ValueError, match="set consistency.causal_teacher"):
        make(Gaussian(is_causal=False), image_first=True)
