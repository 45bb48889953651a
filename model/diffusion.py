"""Flow matching on real latents: bidirectional, diffusion forcing or teacher forcing."""

from typing import Literal

import torch
from torch import Tensor, nn

from model.base import Batch, block_values, num_blocks
from utils.distributed import SampleRngs
from utils.loss import DENOISING_LOSSES
from utils.scheduler import FlowMatchScheduler


class CausalDiffusion:
    """E |flow(x_t, t) - (eps - x0)|^2 with one t per block.

    bidirectional (is_causal False)   one t for the clip, everything sees everything
    diffusion forcing                 blocks see the noisy blocks before them (arXiv 2407.01392)
    teacher forcing                   blocks see the clean blocks before them: the network gets [clean | noisy]

    Teacher forcing meets perfect context in training and its own at inference. noise_augmentation_max_timestep narrows
    that gap: half of the clips get a context noised to a level drawn in [0, max], which the network is told (aug_t).
    """

    def __init__(
        self,
        generator: nn.Module,
        scheduler: FlowMatchScheduler,
        *,
        is_causal: bool = True,
        teacher_forcing: bool = True,
        num_frame_per_block: int = 3,
        independent_first_frame: bool = False,
        noise_augmentation_max_timestep: float = 0.0,
        denoising_loss_type: str = "flow",
        timestep_sampling: Literal["uniform", "logit_normal"] = "uniform",
        timestep_weighting: bool = False,
        image_first: bool = False,
    ):
        """image_first (teacher forcing): frame 0 is a given image, seen clean by all that follow and not learned."""
        if teacher_forcing and not is_causal:
            raise ValueError("a bidirectional model has no context to force; set teacher_forcing: false")
        self.generator = generator
        self.scheduler = scheduler
        self.is_causal = is_causal
        self.teacher_forcing = teacher_forcing
        self.num_frame_per_block = num_frame_per_block
        self.independent_first_frame = independent_first_frame or image_first
        self.image_first = image_first
        self.noise_augmentation_max_timestep = noise_augmentation_max_timestep
        self.denoising_loss = DENOISING_LOSSES[denoising_loss_type]
        self.timestep_sampling = timestep_sampling
        self.timestep_weighting = timestep_weighting

    def loss(self, batch: Batch, rngs: SampleRngs) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of a batch, and how it splits over low, middle and high noise."""
        error, weight, t = self.errors(batch, rngs)
        return (weight * error).mean(), self.details(error.detach(), t)

    def errors(self, batch: Batch, rngs: SampleRngs) -> tuple[Tensor, Tensor, Tensor]:
        """Squared error, its weight, and the time it was made at, of every frame that is learned: [B, F] each."""
        x0 = batch.clean_latent.float()
        t = self.timesteps(x0.shape[1], rngs)
        noise = rngs.randn(*x0.shape[1:])
        x_t = self.scheduler.add_noise(x0, noise, t)
        clean_x, aug_t = self.context(x0, rngs) if self.teacher_forcing else (None, None)
        options = {"image_first": True} if self.image_first else {}
        flow_pred, _ = self.generator(x_t, batch.conditioning, t, clean_x=clean_x, aug_t=aug_t, **options)
        error = self.denoising_loss(flow_pred, x0, noise, x_t, t)
        weight = self.scheduler.training_weight(t) if self.timestep_weighting else torch.ones_like(t)
        learned = slice(int(self.image_first), None)
        return error[:, learned], weight[:, learned], t[:, learned]

    def details(self, error: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Mean error of frames with t in the lower, middle and upper third; 0 where there are none."""
        third = (t / 1000 * 3).long().clamp(0, 2)
        return {
            f"loss_{name}_noise": (error * (third == i)).sum() / (third == i).sum().clamp(min=1)
            for i, name in enumerate(("low", "middle", "high"))
        }

    def timesteps(self, num_frames: int, rngs: SampleRngs) -> Tensor:
        """Shifted times [B, F] in [0, 1000]: one draw per block, or per clip when bidirectional."""
        blocks = 1
        if self.is_causal:
            blocks = num_blocks(num_frames, self.num_frame_per_block, self.independent_first_frame)
        draw = rngs.randn(blocks).sigmoid() if self.timestep_sampling == "logit_normal" else rngs.rand(blocks)
        t = self.scheduler.warp(draw * self.scheduler.num_train_timesteps)
        if not self.is_causal:
            return t.expand(-1, num_frames)
        return block_values(t, self.num_frame_per_block, self.independent_first_frame)

    def context(self, x0: Tensor, rngs: SampleRngs) -> tuple[Tensor, Tensor]:
        """The clean half as the network sees it, and its noise level aug_t [B, F]; its noise is its own."""
        aug_t = torch.zeros(x0.shape[:2], device=x0.device)
        if self.noise_augmentation_max_timestep == 0:
            return x0, aug_t
        level, coin = rngs.rand(2).unbind(1)
        aug_t = aug_t + (self.noise_augmentation_max_timestep * level * (coin < 0.5))[:, None]
        if self.image_first:
            aug_t[:, 0] = 0
        return self.scheduler.add_noise(x0, rngs.randn(*x0.shape[1:]), aug_t), aug_t
