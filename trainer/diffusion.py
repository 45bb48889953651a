"""Flow matching on real latents: the many-step causal model, or its bidirectional teacher."""

from torch import Tensor

from model.base import Player
from model.diffusion import CausalDiffusion
from trainer.latents import LatentTrainer


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
        config = self.config
        forward = self.clip_flops(self.model_config, is_causal=config.causal, teacher_forcing=config.teacher_forcing)
        return self.learning_flops(forward) * config.batch_size * self.num_passes
