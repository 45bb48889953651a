"""CausVid's way to clips for the scores (arXiv 2412.07772): real latents, noised, not the model's own context."""

from collections.abc import Sequence

import torch
from torch import nn

from model.base import Batch, block_timesteps
from pipeline.self_forcing_training import Trajectory
from utils.distributed import SampleRngs
from utils.scheduler import FlowMatchScheduler


class NoisyClips:
    """(batch, rngs) -> x0 of real clips noised to one of the sampler's times per block, in one masked pass.

    It takes the place of `Rollouts` in DMD and its critic: a tenth of the work, but the model never meets its own
    context. teacher_forcing: blocks see the clean blocks before them, else those as noisy as they are.
    """

    def __init__(
        self,
        generator: nn.Module,
        scheduler: FlowMatchScheduler,
        *,
        timesteps: Sequence[float],
        teacher_forcing: bool = False,
        num_frame_per_block: int = 3,
        independent_first_frame: bool = False,
    ):
        """timesteps: the sampler's, in [0, 1000], as the network sees them (after the shift)."""
        self.generator = generator
        self.scheduler = scheduler
        self.timesteps = list(timesteps)
        self.teacher_forcing = teacher_forcing
        self.num_frame_per_block = num_frame_per_block
        self.independent_first_frame = independent_first_frame

    def __call__(self, batch: Batch, rngs: SampleRngs) -> Trajectory:
        x0 = batch.clean_latent.float()
        t = block_timesteps(self.timesteps, x0.shape[1], rngs, self.num_frame_per_block, self.independent_first_frame)
        x_t = self.scheduler.add_noise(x0, rngs.randn(*x0.shape[1:]), t)
        _, made = self.generator(x_t, batch.conditioning, t, clean_x=x0 if self.teacher_forcing else None)
        return Trajectory(made)

    def decide(self, shared: torch.Generator) -> None:
        """Nothing: every block draws its time on the device."""
