"""Causal consistency distillation: from a many-step teacher to a few-step student, on clean clips alone."""

import torch
from torch import Tensor

from model.base import Player
from model.consistency import ConsistencyDistillation
from model.control import ControlledObjective
from trainer.few_step import FewStepTrainer
from utils.sharding import local


class ConsistencyTrainer(FewStepTrainer):
    """The student learns; its target is its own average; the teacher takes one solver step.

    The average is the run's EMA (`ema.weight`), which checkpoints hold anyway: a third network, but no third state.
    """

    name = "consistency"

    def make_players(self) -> list[Player]:
        settings = self.config.consistency
        self.average = self.freeze(self.build_generator())
        self.teacher = self.build_teacher(is_causal=settings.causal_teacher)
        self.objective = self.make_objective()
        if self.pose_embedding is not None:
            imaged = self.make_objective(image_first=True)
            self.objective = ControlledObjective(self.pose_embedding, self.objective, imaged)
        return [self.student(self.objective.loss)]

    def make_objective(self, *, image_first: bool = False) -> ConsistencyDistillation:
        config = self.config
        return ConsistencyDistillation(
            self.generator,
            self.average,
            self.teacher,
            guidance_scale=config.distillation.real_guidance_scale,
            steps=config.consistency.solver_steps,
            num_frame_per_block=config.num_frame_per_block,
            independent_first_frame=config.independent_first_frame,
            image_first=image_first,
        )

    def start(self) -> None:
        super().start()
        self.follow()

    def after_step(self) -> None:
        super().after_step()
        self.follow()

    @torch.no_grad()
    def follow(self) -> None:
        """Bring the average to where the run's EMA is."""
        averages = self.learners[0].ema.average
        for name, parameter in self.average.named_parameters():
            local(parameter).copy_(averages[f"generator.{name}"])

    def evaluate(self) -> dict[str, Tensor]:
        """Loss on held-out clips, beside the samples."""
        return self.held_out(self.objective.loss) | super().evaluate()

    def step_flops(self) -> float:
        """The student's pass, its average's, and the teacher's with and without words."""
        own = self.clip_flops(self.model_config, is_causal=True, teacher_forcing=True)
        teacher, guided = self.teacher, self.config.distillation.real_guidance_scale != 1
        theirs = self.clip_flops(
            teacher.model.config, is_causal=teacher.is_causal, teacher_forcing=teacher.is_causal
        ) * (2 if guided else 1)
        return (self.learning_flops(own) + own + theirs) * self.config.batch_size * self.num_passes

    def activation_bytes(self) -> int:
        """Of the student's pass over a clip and its clean copy."""
        return 2 * self.kept_bytes(self.model_config)
