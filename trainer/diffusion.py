"""Flow matching on real latents: the many-step causal model, or its bidirectional teacher."""

from torch import Tensor

from model.base import Player
from model.control import ControlledObjective
from model.diffusion import CausalDiffusion
from trainer.latents import LatentTrainer
from utils.flops import pose_flops
from wan.modules.pose import NUM_START_COPIES

# Of a drawn pixel, that the pose network keeps for its backward in bfloat16: 16 channels before and after SiLU of three
# layers, a twelfth of it behind them, and the drawing in float32 and bfloat16.
POSE_BYTES = 230


class DiffusionTrainer(LatentTrainer):
    """Teacher forcing, diffusion forcing or bidirectional, by `causal` and `teacher_forcing`."""

    name = "diffusion"

    @property
    def learns_pose(self) -> bool:
        return not self.config.control.frozen

    def make_players(self) -> list[Player]:
        self.objective = self.make_objective()
        if self.pose_embedding is not None:
            imaged = self.make_objective(image_first=True)
            self.objective = ControlledObjective(self.pose_embedding, self.objective, imaged)
        return [self.student(self.objective.loss)]

    def make_objective(self, *, image_first: bool = False) -> CausalDiffusion:
        config = self.config
        return CausalDiffusion(
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
            image_first=image_first,
        )

    def evaluate(self) -> dict[str, Tensor]:
        """Loss on held-out puppets, beside the samples."""
        return self.held_out(self.objective.loss) | super().evaluate()

    @property
    def num_pictures(self) -> int:
        """Pixel frames of a training clip."""
        return 1 + self.vae.temporal_stride * (self.config.num_training_frames - 1)

    def activation_bytes(self) -> int:
        """The transformer's, and those of the pose network over the clips that have a pose."""
        config, kept = self.config, super().activation_bytes()
        if self.pose_embedding is None:
            return kept
        pixels = (self.num_pictures + NUM_START_COPIES) * config.height * config.width
        return kept + round((1 - config.control.pose_dropout) * config.batch_size * pixels * POSE_BYTES)

    def step_flops(self) -> float:
        config = self.config
        forward = self.clip_flops(self.model_config, is_causal=config.causal, teacher_forcing=config.teacher_forcing)
        if self.pose_embedding is not None:  # a clip with an image is up to a block shorter, and counted as whole
            frames, share = self.num_pictures, 1 - config.control.pose_dropout
            forward += share * pose_flops(frames, config.height, config.width, config.control.pose_dim)
        return self.learning_flops(forward) * config.batch_size * self.num_passes
