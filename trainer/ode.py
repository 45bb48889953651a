"""ODE regression: a few-step student learns to leap along its teacher's trajectories."""

from torch import Tensor

from model.base import Player
from model.ode_regression import ODERegression
from trainer.few_step import FewStepTrainer


class ODETrainer(FewStepTrainer):
    """The student alone learns, from pairs that `scripts/generate_ode_pairs.py` made with its steps, shift and size.

    teacher_forcing: the pairs are a causal teacher's, and the student is given their clean past.
    """

    name = "ode"

    @property
    def learns_from(self) -> str:
        return "trajectories"

    def make_players(self) -> list[Player]:
        config = self.config
        self.objective = ODERegression(
            self.generator,
            timesteps=self.timesteps,
            teacher_forcing=config.teacher_forcing,
            num_frame_per_block=config.num_frame_per_block,
            independent_first_frame=config.independent_first_frame,
        )
        return [self.student(self.objective.loss)]

    def evaluate(self) -> dict[str, Tensor]:
        """Loss on held-out trajectories, beside the samples."""
        return self.held_out(self.objective.loss) | super().evaluate()

    def step_flops(self) -> float:
        config = self.config
        forward = self.clip_flops(self.model_config, is_causal=True, teacher_forcing=config.teacher_forcing)
        return self.learning_flops(forward) * config.batch_size * self.num_passes
