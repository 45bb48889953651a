"""Two scores of the same noisy clip: the teacher's, of real video, and the critic's, of what the generator makes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.base import Batch
from pipeline.samplers import guide
from pipeline.self_forcing_training import Trajectory
from utils.distributed import SampleRngs
from utils.loss import DENOISING_LOSSES
from utils.scheduler import FlowMatchScheduler

# (batch, rngs) -> generated clips. Under torch.no_grad() they carry no gradient.
Generate = Callable[[Batch, SampleRngs], Trajectory]


@dataclass(frozen=True)
class ScoreTimes:
    """How noisy a clip is when the scores look at it: one time per clip.

    u is uniform in [min_timestep, 1000) on the unshifted grid, then shifted by the scheduler and held in
    [lowest, highest], where scores are reliable. ts_schedule: u starts where the exit step left off (t_to), so that
    the scores judge no noise that later steps will still remove. ts_schedule_max: u ends where that step began.
    """

    scheduler: FlowMatchScheduler
    min_timestep: float = 0.0
    lowest: float = 20.0
    highest: float = 980.0
    ts_schedule: bool = False
    ts_schedule_max: bool = False

    def draw(self, made: Trajectory, rngs: SampleRngs) -> Tensor:
        """Times [B, F] in [0, 1000], one draw per clip."""
        low, high = self.min_timestep, float(self.scheduler.num_train_timesteps)
        if self.ts_schedule and made.t_to is not None:
            low = made.t_to
        if self.ts_schedule_max and made.t_from is not None:
            high = made.t_from
        u = low + (high - low) * rngs.rand(1)
        t = self.scheduler.warp(u).clamp(self.lowest, self.highest)
        return t.expand(-1, made.latents.shape[1])


@dataclass(frozen=True)
class ScorePair:
    """real: the frozen bidirectional teacher; fake: the critic. Networks as WanDiffusionWrapper.

    Guidance scales are w in  uncond + w (cond - uncond);  1 saves the unguided pass. (The Self-Forcing code writes
    cond + s (cond - uncond), so its real_guidance_scale 3 is 4 here, and its fake_guidance_scale 0 is 1.)
    """

    real: nn.Module
    fake: nn.Module
    real_guidance_scale: float = 4.0
    fake_guidance_scale: float = 1.0

    def __call__(self, x_t: Tensor, t: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the real and the fake score take the clean clip to be: float32 [B, F, C, H, W] each."""
        real = guided_x0(self.real, x_t, t, batch, self.real_guidance_scale)
        fake = guided_x0(self.fake, x_t, t, batch, self.fake_guidance_scale)
        return real, fake


def guided_x0(network: nn.Module, x_t: Tensor, t: Tensor, batch: Batch, guidance_scale: float) -> Tensor:
    """x0 [B, F, C, H, W] of a bidirectional network with classifier-free guidance against batch.negative."""
    _, x0 = network(x_t, batch.conditioning, t)
    if guidance_scale == 1:
        return x0
    _, unguided = network(x_t, batch.negative, t)
    return guide(x0, unguided, guidance_scale)


class Critic:
    """The fake score learns what the generator makes: flow matching on its clips, as they are now.

    The loss compares the flow itself, in float32: a detour over x0 would divide its rounding by sigma. Prompts are
    never dropped, because the fake score is asked without guidance.
    """

    def __init__(
        self,
        generate: Generate,
        fake: nn.Module,
        times: ScoreTimes,
        *,
        denoising_loss_type: str = "flow",
    ):
        self.generate = generate
        self.fake = fake
        self.times = times
        self.denoising_loss = DENOISING_LOSSES[denoising_loss_type]

    def loss(self, batch: Batch, rngs: SampleRngs) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            made = self.generate(batch, rngs)
        x0 = made.latents
        t = self.times.draw(made, rngs)
        noise = rngs.randn(*x0.shape[1:])
        x_t = self.times.scheduler.add_noise(x0, noise, t)
        flow_pred, _ = self.fake(x_t, batch.conditioning, t)
        return self.denoising_loss(flow_pred, x0, noise, x_t, t).mean(), {"timestep": t.mean()}
