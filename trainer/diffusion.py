"""Flow matching on real latents: the many-step causal model, or its bidirectional teacher."""

from torch import Tensor

from model.base import Player
from model.diffusion import CausalDiffusion
from trainer.latents import LatentTrainer
from utils.flops import pass_flops
from wan.modules.masks import BlockCausalMask


class DiffusionTrainer(LatentTrainer):
    """Teacher forcing, diffusion forcing or bidirectional, by `causal` and `teacher_forcing`."""

    name = "diffusion"

    def make_players(self) -> list[Player]:
        config = self.config
        self.objective = CausalDiffusion(
            self.generator,
            self.generator.scheduler,
            is_causal=config.causal,
            teacher_forcing=config.teacher_forcing,
            num_frame_per_block=config.num_frame_per_block,
            independent_first_frame=config.independent_first_frame,
            noise_augmentation_max_timestep=config.noise_augmentation_max_timestep,
            denoising_loss_type=config.denoising_loss_type,
            timestep_sampling=config.timestep_sampling,
            timestep_weighting=config.timestep_weighting,
        )
        return [self.student(self.objective.loss)]

    def evaluate(self) -> dict[str, Tensor]:
        """Loss on held-out puppets, beside the samples."""
        return self.held_out(self.objective.loss) | super().evaluate()

    def step_flops(self) -> float:
        """Forward, twice that backward, and forward again where blocks are recomputed."""
        config, sizes = self.config, self.model_config
        per_frame = sizes.tokens_per_frame(
            config.height // self.vae.spatial_stride, config.width // self.vae.spatial_stride
        )
        frames = config.num_training_frames * (2 if config.teacher_forcing else 1)
        seen = frames
        if config.causal:
            seen = (
                BlockCausalMask(
                    config.num_training_frames,
                    1,
                    config.num_frame_per_block,
                    config.model_kwargs.local_attn_size,
                    config.model_kwargs.sink_size,
                    config.independent_first_frame,
                    config.teacher_forcing,
                )
                .frame_mask.sum(1)
                .float()
                .mean()
                .item()
            )
        forward = pass_flops(sizes, frames * per_frame, seen * per_frame)
        return forward * config.batch_size * self.num_passes * (4 if config.gradient_checkpointing else 3)
