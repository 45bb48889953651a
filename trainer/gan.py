"""Adversarial distillation: a few-step student learns from its own rollouts, judged beside real clips."""

from model.base import Player
from model.gan import GAN, Discriminator
from trainer.few_step import FewStepTrainer
from utils.flops import pass_flops
from wan.modules.discriminator import DiscriminatorHead


class GANTrainer(FewStepTrainer):
    """The discriminator learns in every step, the student in every so many, after the discriminator's warm-up.

    The discriminator is a score network (`distillation.fake_name`) with a new head; both learn, with the settings of
    `critic_optimizer`. Real clips are the run's data, made ones come from the same words.
    """

    name = "gan"

    def make_players(self) -> list[Player]:
        config, settings, gan = self.config, self.config.distillation, self.config.gan
        score = self.build_critic()
        head = DiscriminatorHead(
            score.model.config,
            concat_time_embeddings=gan.concat_time_embeddings,
            attention_backend=config.attention_backend,
        ).to(self.device)
        discriminator = Discriminator(score, head)
        rollouts = self.make_rollouts()
        self.objective = GAN(
            rollouts,
            discriminator,
            self.score_times(),
            relativistic=gan.relativistic,
            g_weight=gan.g_weight,
            d_weight=gan.d_weight,
            r1_weight=gan.r1_weight,
            r2_weight=gan.r2_weight,
            r1_sigma=gan.r1_sigma,
            r2_sigma=gan.r2_sigma,
            denoising_weight=gan.denoising_weight,
            denoising_loss_type=config.denoising_loss_type,
        )
        student = self.student(self.objective.generator_loss)
        student.every, student.start_step = settings.dfake_gen_update_ratio, gan.discriminator_warmup_steps
        student.decide = rollouts.decide
        critic = Player("critic", discriminator, self.objective.critic_loss, decide=rollouts.decide, is_critic=True)
        return [student, critic]

    def step_flops(self) -> float | None:
        """A rollout and the discriminator's passes: back to its input for the student, to its weights for itself."""
        if not self.work_is_counted:
            return None
        config, gan, judge = self.config, self.config.gan, self.objective.discriminator.score.model.config
        pipeline = self.objective.generate.pipeline
        work = self.rollout_work(pipeline, judge, judge, real_passes=0, fake_passes=1, through_scores=True)
        forward = pass_flops(judge, work.num_tokens)
        student = work.mean_generator_step() + (forward if gan.relativistic else 0.0)
        critic = work.mean_critic_step() + (self.num_judgements - 1) * self.learning_flops(forward)
        samples = config.batch_size * self.num_passes
        return samples * (student / config.distillation.dfake_gen_update_ratio + critic)

    @property
    def num_judgements(self) -> int:
        """Passes of a discriminator step: the made clip, the real one, and a nudge of each whose slope counts."""
        return 2 + (self.config.gan.r1_weight > 0) + (self.config.gan.r2_weight > 0)

    def activation_bytes(self) -> int:
        """Of a discriminator step, or of a rollout that is judged, whichever keeps more."""
        judged = self.kept_bytes(self.objective.discriminator.score.model.config)
        return max(self.num_judgements * judged, self.kept_bytes(self.model_config) + self.cache_bytes + judged)
