"""DMD, SiD, the critic, flow matching and a whole self-forcing step against the figures of the public code.

The public code looks times up in tables of 1,000 sigmas, of shift 5 in add_noise and of shift 8 inside the scores; a
stored time is off the second. `SnappingClock` injects the sigma it got. Where the public code leaks gradient from block
to block, the figures are those with its cache detached.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from model.base import Batch
from model.diffusion import CausalDiffusion
from model.dmd import DMD
from model.rollouts import Rollouts
from model.scores import Critic, ScorePair, ScoreTimes
from model.sid import SiD
from pipeline.self_forcing_training import SelfForcingTrainingPipeline, Trajectory
from tests.golden_data import below, load_golden, wan_config
from utils.conditioning import Conditioning
from utils.scheduler import FlowMatchScheduler
from utils.wan_wrapper import WanDiffusionWrapper
from wan.modules.weights import assign_weights

TOLERANCE = 1e-4
GOLDEN, CONFIG = load_golden("i_losses")
CONDITIONING, NEGATIVE = Conditioning(GOLDEN["prompt_embeds"]), Conditioning(GOLDEN["uncond_embeds"])
REMEMBERED = 1e-6  # "time 0" for which the public code still adds the last sigma of its table


@dataclass(frozen=True)
class SnappingClock(FlowMatchScheduler):
    """Sigma of the nearest of 1,000 table times."""

    def table(self) -> Tensor:
        return self.warp(torch.linspace(1000, 0, 1001)[:-1])

    def sigma(self, t, like):
        t = torch.as_tensor(t).float()
        snapped = self.table()[(self.table() - t.reshape(-1, 1)).abs().argmin(1)]
        return super().sigma(snapped.reshape(t.shape), like)


class Draws:
    """Hands out stored numbers in place of random ones: `rand` answers with integers drawn from [low, high)."""

    def __init__(self, case: str, low: float = 0.0, high: float = 1000.0):
        tensors = below(GOLDEN, case)
        drawn = [name for name in sorted(tensors) if name.startswith("draw")]
        self.integers = iter([tensors[name] for name in drawn if name.endswith("randint")])
        self.normals = iter([tensors[name] for name in drawn if "randn" in name])
        self.low, self.high = low, high
        self.device = torch.device("cpu")
        self.shared = None

    def rand(self, count: int) -> Tensor:
        return (next(self.integers).float().reshape(1, -1)[:, :count] - self.low) / (self.high - self.low)

    def randn(self, *shape: int) -> Tensor:
        return next(self.normals).reshape(1, *shape)


def network(case: str, shift: float, **options) -> WanDiffusionWrapper:
    wrapper = WanDiffusionWrapper(
        timestep_shift=shift, from_scratch=True, model_config=wan_config(CONFIG["generator"]), **options
    )
    assign_weights(wrapper.model, below(load_golden(case)[0], "w"), "golden")
    wrapper.scheduler = SnappingClock(shift)
    return wrapper


def make_scores(real_guidance_scale: float = 4.0) -> ScorePair:
    """The public code's guidance scale 3 is 4 here."""
    shift = CONFIG["real_fake_scheduler_shift"]
    return ScorePair(network("b_wan_t2v", shift), network("a_causal_forward", shift), real_guidance_scale)


def make_generator() -> WanDiffusionWrapper:
    return network("a_causal_forward", CONFIG["generator_scheduler_shift"], is_causal=True)


def assert_gradients(module: nn.Module, expected: dict[str, Tensor], norm: Tensor) -> None:
    """Norm over all parameters, and every eighth row of some."""
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    total = torch.linalg.vector_norm(torch.stack([grad.double().norm() for grad in grads.values()]))
    torch.testing.assert_close(total, norm, rtol=TOLERANCE, atol=0)
    for name, rows in expected.items():
        ours = grads[name] if grads[name].shape == rows.shape else grads[name][::8]
        scale = float(rows.abs().max())
        torch.testing.assert_close(
            ours, rows, rtol=TOLERANCE, atol=TOLERANCE * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", ["dmd", "dmd_masked", "dmd_tsschedule", "sid"])
def test_the_generators_loss_and_its_gradient(case: str):
    image = GOLDEN["image"].clone().requires_grad_()
    made = Trajectory(image)
    times = ScoreTimes(SnappingClock(5.0))
    draws = Draws(case)
    if case == "dmd_masked":
        made = Trajectory(image, first_grad_frame=3)
    if case == "dmd_tsschedule":
        made = Trajectory(image, t_from=750, t_to=500)
        times = ScoreTimes(SnappingClock(5.0), ts_schedule=True, ts_schedule_max=True)
        draws = Draws(case, 500, 750)
    objective_class = SiD if case == "sid" else DMD
    objective = objective_class(lambda batch, rngs: made, make_scores(), times)
    loss, details = objective.loss(Batch(None, CONDITIONING, NEGATIVE), draws)
    torch.testing.assert_close(details["timestep"], GOLDEN[f"{case}.timestep"].mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.double(), GOLDEN[f"{case}.loss"], rtol=TOLERANCE, atol=0)
    loss.backward()
    expected = GOLDEN[f"{case}.dloss_dimage"]
    torch.testing.assert_close(image.grad, expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.abs().max()))


def test_the_critics_loss_and_gradients(monkeypatch):
    """The public code goes from the flow to x0 with one table's sigma and back with the other's."""
    scores, clock = make_scores(), SnappingClock(5.0)
    forward = scores.fake.forward

    def detour(x_t, conditioning, t):
        _, x0 = forward(x_t, conditioning, t)
        return clock.x0_to_flow(x0, x_t, t), x0

    monkeypatch.setattr(scores.fake, "forward", detour)
    critic = Critic(lambda batch, rngs: Trajectory(GOLDEN["image"]), scores.fake, ScoreTimes(clock))
    loss, details = critic.loss(Batch(None, CONDITIONING), Draws("critic"))
    torch.testing.assert_close(details["timestep"], GOLDEN["critic.timestep"].mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(loss, GOLDEN["critic.loss"], rtol=TOLERANCE, atol=0)
    loss.backward()
    assert_gradients(scores.fake.model, below(GOLDEN, "critic.grad"), GOLDEN["critic.grad_norm"])


def test_a_whole_self_forcing_step():
    """Seven blocks of three, exit at the last step, DMD: clip, loss and the parameters' detached gradients."""
    generator, draws = make_generator(), Draws("full")
    pipeline = SelfForcingTrainingPipeline(
        generator, denoising_step_list=[1000, 750, 500, 250], context_noise=REMEMBERED
    )
    next(draws.integers)  # how many blocks
    pipeline.draw_exit_steps = lambda num_blocks, shared: [int(next(draws.integers)[0])] * num_blocks
    made = []

    def generate(batch, rngs):
        rollouts = Rollouts(pipeline, latent_shape=(16, 4, 4), num_frames=21)
        rollouts.draw_num_frames = lambda shared: 21
        made.append(rollouts(batch, rngs))
        made[0].latents.retain_grad()
        next(draws.normals)  # the public code remembers the last block, too
        return made[0]

    objective = DMD(generate, make_scores(), ScoreTimes(SnappingClock(5.0)))
    words, no_words = (Conditioning(GOLDEN[f"full.{name}_embeds"]) for name in ("prompt", "uncond"))
    loss, _ = objective.loss(Batch(None, words, no_words), draws)
    assert [made[0].t_from, made[0].t_to] == GOLDEN["full.denoised_from_to"].tolist()
    latents = made[0].latents
    torch.testing.assert_close(latents[:, :, ::4], GOLDEN["full.pred_image"], rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(loss.double(), GOLDEN["full.loss"], rtol=TOLERANCE, atol=0)
    loss.backward()
    expected = GOLDEN["full.dloss_dimage"]
    torch.testing.assert_close(
        latents.grad[:, :, ::4], expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.abs().max())
    )
    expected, norm = below(GOLDEN, "full.detached_cache.grad"), GOLDEN["full.detached_cache.grad_norm"]
    assert_gradients(generator.model, expected, norm)
    with pytest.raises(StopIteration):
        next(draws.normals)


@pytest.mark.parametrize("case", ["flow_df", "flow_tf", "flow_tf_aug"])
def test_flow_matching(case: str, monkeypatch):
    """One noise for target and context, and times picked from the table by index, as the public code does."""
    draws = Draws(case)
    clock = SnappingClock(5.0)
    noise = next(draws.normals)
    indices = [clock.table()[index][:, ::3].repeat_interleave(3, 1) for index in draws.integers]
    generator = make_generator()
    objective = CausalDiffusion(generator, clock, teacher_forcing=case != "flow_df", timestep_weighting=True)
    monkeypatch.setattr(objective, "timesteps", lambda num_frames, rngs: indices[0])
    if case == "flow_tf_aug":
        context = clock.add_noise(GOLDEN["image"], noise, indices[1])
        monkeypatch.setattr(objective, "context", lambda x0, rngs: (context, indices[1]))
    rngs = SimpleNamespace(randn=lambda *shape: noise)
    loss, _ = objective.loss(Batch(GOLDEN["image"], CONDITIONING), rngs)
    torch.testing.assert_close(loss, GOLDEN[f"{case}.loss"], rtol=TOLERANCE, atol=0)
    loss.backward()
    assert_gradients(generator.model, below(GOLDEN, f"{case}.grad"), GOLDEN[f"{case}.grad_norm"])
