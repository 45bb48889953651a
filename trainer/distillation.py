"""Score distillation: a few-step student learns from its own rollouts, judged by a teacher and a critic."""

from model.base import Player
from model.causvid import NoisyClips
from model.dmd import DMD
from model.scores import Critic, Generate, ScorePair
from model.sid import SiD
from trainer.few_step import FewStepTrainer


class ScoreDistillationTrainer(FewStepTrainer):
    """DMD, SiD or CausVid, by `distribution_loss`: the critic learns in every step, the student in every so many.

    The teacher (real score) is a bidirectional model; the critic (fake score) starts as the teacher and learns what the
    student makes.
    """

    name = "score_distillation"

    @property
    def learns_from(self) -> str:
        needs_clips = self.config.distribution_loss == "causvid" or self.config.distillation.num_input_frames > 0
        return "clips" if needs_clips else "words"

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
        self.critic = Critic(generate, fake, times, denoising_loss_type=config.denoising_loss_type)
        student = self.student(self.objective.loss)
        student.every = settings.dfake_gen_update_ratio
        return [student, Player("critic", fake, self.critic.loss, is_critic=True)]

    def make_clips(self) -> Generate:
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
