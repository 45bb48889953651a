"""Score distillation: a few-step student learns from its own rollouts, judged by a teacher and a critic."""

from dataclasses import replace

import torch
from torch import Tensor

from model.base import Batch, Player
from model.causvid import NoisyClips
from model.control import pose_tokens
from model.dmd import DMD
from model.scores import Critic, ScorePair
from model.sid import SiD
from trainer.few_step import FewStepTrainer
from trainer.learner import Learner
from trainer.state import OWN
from trainer.streams import Streams
from trainer.work import DistillationWork
from utils.dataset import Samples
from utils.distributed import SampleRngs
from utils.training_state import StoredState


class ScoreDistillationTrainer(FewStepTrainer):
    """DMD, SiD or CausVid, by `distribution_loss`: the critic learns in every step, the student in every so many.

    The teacher (real score) is a bidirectional model; the critic (fake score) starts as the teacher and learns what the
    student makes.
    """

    name = "score_distillation"
    streams: Streams | None = None  # only where rollouts go on

    @property
    def learns_from(self) -> str:
        config = self.config
        needs_clips = config.distribution_loss == "causvid" or config.distillation.num_input_frames > 0
        return "clips" if needs_clips or config.control.pose_dim else "words"  # a pose belongs to a clip

    @torch.no_grad()
    def batch(self, drawn: Samples, dropped: Tensor | None = None) -> Batch:
        """With poses, which student, teacher and critic are all shown; the unguided side has none."""
        batch = super().batch(drawn, dropped)
        if batch.controls is None:
            return batch
        pose = pose_tokens(self.pose_embedding, batch)
        return replace(batch, conditioning=replace(batch.conditioning, pose=pose), controls=None)

    def prepare(self, rngs: SampleRngs) -> Batch:
        batch = super().prepare(rngs)
        return batch if self.streams is None else self.streams.go_on(batch, rngs)

    def after_pass(self, learner: Learner, batch: Batch, rngs: SampleRngs) -> None:
        """The critic's clips, one in every step, carry the streams on; those that went all the way, as in inference."""
        if self.streams is None or not learner.player.is_critic:
            return
        generate = self.objective.generate
        _, exit_steps = generate.decide(rngs.shared)
        if set(exit_steps) == {len(generate.pipeline.timesteps) - 1}:
            self.streams.keep(batch, generate.end, rngs)

    def after_step(self) -> None:
        super().after_step()
        if self.streams is not None:
            self.streams.advance(self.step - 1)

    def own_state(self) -> dict[str, Tensor]:
        return {} if self.streams is None else self.streams.state(self.ranks.is_main)

    def restore_own(self, stored: StoredState) -> None:
        if self.streams is not None:
            self.streams.restore(stored, OWN, self.device)

    def make_players(self) -> list[Player]:
        config, settings = self.config, self.config.distillation
        real, fake = self.build_teacher(), self.build_critic()
        scores = ScorePair(real, fake, settings.real_guidance_scale, settings.fake_guidance_scale)
        generate = self.make_clips() if config.distribution_loss == "causvid" else self.make_rollouts()
        times = self.score_times()
        if config.distribution_loss == "sid":
            self.objective = SiD(generate, scores, times, sid_alpha=settings.sid_alpha)
        else:
            self.objective = DMD(generate, scores, times)
        if settings.num_streams:
            max_clips = config.num_training_frames // settings.num_grad_frames
            batch_size = config.batch_size * self.num_passes * self.ranks.size
            self.streams = Streams(settings.num_streams, max_clips, self.passes(), batch_size, config.seed)
        self.critic = Critic(generate, fake, times, denoising_loss_type=config.denoising_loss_type)
        student = self.student(self.objective.loss)
        student.every, student.decide = settings.dfake_gen_update_ratio, generate.decide
        return [student, Player("critic", fake, self.critic.loss, decide=generate.decide, is_critic=True)]

    def work(self) -> DistillationWork:
        scores = self.objective.scores
        return self.rollout_work(
            self.objective.generate.pipeline,
            scores.real.model.config,
            scores.fake.model.config,
            real_passes=1 if scores.real_guidance_scale == 1 else 2,
            fake_passes=1 if scores.fake_guidance_scale == 1 else 2,
            through_scores=self.config.distribution_loss == "sid",
        )

    def step_flops(self) -> float | None:
        if self.config.distribution_loss == "causvid" or not self.work_is_counted:
            return None
        work, samples = self.work(), self.config.batch_size * self.num_passes
        every = self.config.distillation.dfake_gen_update_ratio
        return samples * (work.mean_generator_step() / every + work.mean_critic_step())

    def activation_bytes(self) -> int:
        """Of a clip's passes with gradient, and the cache that its rollout reads."""
        kept = self.kept_bytes(self.model_config)
        if self.config.distribution_loss == "causvid":
            return kept * (2 if self.config.teacher_forcing else 1)
        return kept + self.cache_bytes

    def make_clips(self) -> NoisyClips:
        """Real clips, noised and denoised once."""
        config = self.config
        return NoisyClips(
            self.generator,
            self.generator.scheduler,
            timesteps=self.timesteps,
            teacher_forcing=config.teacher_forcing,
            num_frame_per_block=config.num_frame_per_block,
            independent_first_frame=config.independent_first_frame,
        )
