"""ODE regression: a few-step student learns to leap along its teacher's trajectories."""

from torch import Tensor

from model.base import Player
from model.ode_regression import ODERegression
from trainer.data import DataSource
from trainer.few_step import FewStepTrainer
from utils.fingerprint import fingerprint
from wan.configs import TEXT_ENCODER_FILES, find_model_file


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

    def make_source(self) -> DataSource:
        source = super().make_source()
        weights = find_model_file(self.text_encoder_home(), TEXT_ENCODER_FILES)
        source.expected_of_pairs["text_encoder"] = fingerprint(weights)  # words of another mean something else
        return source

    def evaluate(self) -> dict[str, Tensor]:
        """Loss on held-out trajectories, beside the samples."""
        return self.held_out(self.objective.loss) | super().evaluate()
