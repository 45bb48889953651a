"""Score distillation: a few-step student learns from its own rollouts, judged by a teacher and a critic."""

from pathlib import Path

import torch
from torch import Tensor

from model.base import Batch, Player
from model.causvid import NoisyClips
from model.dmd import DMD
from model.rollouts import Rollouts
from model.scores import Critic, Generate, ScorePair, ScoreTimes
from model.sid import SiD
from pipeline.samplers import few_step_times
from pipeline.self_forcing_training import SelfForcingTrainingPipeline
from trainer.latents import LatentTrainer
from utils.conditioning import Conditioning
from utils.config import ConfigError
from utils.distributed import SampleRngs
from utils.fingerprint import fingerprint
from utils.wan_wrapper import WanDiffusionWrapper
from wan.configs import TEXT_ENCODER_FILES, WanConfig, find_model_folder

PICTURES_BEHIND = 4  # latents decoded to see the last picture of a long rollout


class ScoreDistillationTrainer(LatentTrainer):
    """DMD, SiD or CausVid, by `distribution_loss`: the critic learns in every step, the student in every so many.

    The teacher (real score) is a bidirectional model that is never changed and may be larger than the student; the
    critic (fake score) starts as the teacher and learns what the student makes.
    """

    name = "score_distillation"

    @property
    def starting_point(self) -> str | None:
        return self.config.distillation.init_ckpt or super().starting_point

    @property
    def num_sample_frames(self) -> int:
        return self.config.num_training_frames - self.config.distillation.num_input_frames

    @property
    def learns_from(self) -> str:
        needs_clips = self.config.distribution_loss == "causvid" or self.config.distillation.num_input_frames > 0
        return "clips" if needs_clips else "words"

    def make_players(self) -> list[Player]:
        config, settings = self.config, self.config.distillation
        self._check()
        real_name = settings.real_name or config.model_name
        fake_name, fake_ckpt = settings.fake_name or real_name, settings.fake_ckpt
        if settings.fake_name is None and fake_ckpt is None:
            fake_ckpt = settings.real_ckpt
        frozen_dtype = self.sharding.compute_dtype or torch.float32
        real = self.freeze(self.build_score(real_name, settings.real_ckpt, frozen_dtype))
        fake = self.build_score(fake_name, fake_ckpt, torch.float32)
        scores = ScorePair(real, fake, settings.real_guidance_scale, settings.fake_guidance_scale)
        generate = self.make_clips() if config.distribution_loss == "causvid" else self.make_rollouts()
        times = ScoreTimes(
            self.generator.scheduler,
            min_timestep=settings.min_score_timestep,
            lowest=settings.min_step,
            highest=settings.max_step,
            ts_schedule=settings.ts_schedule,
            ts_schedule_max=settings.ts_schedule_max,
        )
        if config.distribution_loss == "sid":
            self.objective = SiD(generate, scores, times, sid_alpha=settings.sid_alpha)
        else:
            self.objective = DMD(generate, scores, times)
        self.critic = Critic(generate, fake, times, denoising_loss_type=config.denoising_loss_type)
        student = self.student(self.objective.loss)
        student.every = settings.dfake_gen_update_ratio
        return [student, Player("critic", fake, self.critic.loss, is_critic=True)]

    def _check(self) -> None:
        config = self.config
        if not config.causal or not config.denoising_step_list:
            raise ConfigError(
                "score distillation makes a causal few-step model; set causal: true and denoising_step_list, e.g. "
                "[1000, 750, 500, 250]"
            )
        if config.train_text_encoder:
            raise ConfigError(
                "teacher and student read the same prompt embeddings, so the text encoder cannot learn; set "
                "train_text_encoder: false"
            )

    def build_score(self, model_name: str, checkpoint: str | None, dtype: torch.dtype) -> WanDiffusionWrapper:
        """A bidirectional network on the student's latents and words."""
        theirs, ours = WanConfig.from_folder(find_model_folder(model_name)), self.model_config
        if (theirs.in_dim, theirs.out_dim, theirs.text_dim) != (ours.in_dim, ours.out_dim, ours.text_dim):
            raise ConfigError(
                f"{model_name} takes {theirs.in_dim} latent channels and words of width {theirs.text_dim}, the student "
                f"{self.config.model_name} takes {ours.in_dim} and {ours.text_dim}; use a teacher of the same VAE and "
                "text encoder"
            )
        files = [find_text_encoder(folder) for folder in (find_model_folder(model_name), self.text_encoder_home())]
        if all(files) and fingerprint(files[0]) != fingerprint(files[1]):
            raise ConfigError(
                f"{model_name} was trained with another text encoder ({files[0]}) than the student ({files[1]}); train "
                "the teacher with data.text_encoder_folder set to the student's folder"
            )
        return self.build_network(
            model_name,
            checkpoint,
            dtype=dtype,
            timestep_shift=self.config.timestep_shift,
            attention_backend=self.config.attention_backend,
        )

    def make_rollouts(self) -> Generate:
        """Clips from words alone, by the walk of inference."""
        config, settings = self.config, self.config.distillation
        pipeline = SelfForcingTrainingPipeline(
            self.generator,
            denoising_step_list=config.denoising_step_list,
            warp_denoising_step=config.warp_denoising_step,
            num_frame_per_block=config.num_frame_per_block,
            independent_first_frame=config.independent_first_frame,
            context_noise=config.context_noise,
            clean_context=config.clean_context,
            same_step_across_blocks=settings.same_step_across_blocks,
            last_step_only=settings.last_step_only,
            num_grad_frames=settings.num_grad_frames,
            cache_dtype=self.sharding.compute_dtype,
        )
        stride = self.vae.spatial_stride
        return Rollouts(
            pipeline,
            latent_shape=(self.model_config.out_dim, config.height // stride, config.width // stride),
            num_frames=config.num_training_frames,
            num_input_frames=settings.num_input_frames,
            first_latent=self.first_latent,
        )

    def make_clips(self) -> Generate:
        """Real clips, noised and denoised once."""
        config = self.config
        return NoisyClips(
            self.generator,
            self.generator.scheduler,
            timesteps=few_step_times(
                config.denoising_step_list, self.generator.scheduler, warp=config.warp_denoising_step
            ),
            teacher_forcing=config.teacher_forcing,
            num_frame_per_block=config.num_frame_per_block,
            independent_first_frame=config.independent_first_frame,
        )

    @torch.no_grad()
    def first_latent(self, clip: Tensor) -> Tensor:
        """The last picture of a clip [B, n, C, H, W], encoded as the first of a new one: [B, 1, C, H, W].

        Only the clip's end is decoded: the decoder's memory fades within a few latents.
        """
        pixels = self.vae.decode(clip[:, -PICTURES_BEHIND:].transpose(1, 2).to(self.latent_dtype))
        return self.vae.encode(pixels[:, :, -1:].clamp(-1, 1)).transpose(1, 2)

    @torch.no_grad()
    def open_data(self) -> None:
        super().open_data()
        self.negative = self.embed_words(self.negative_words)

    @torch.no_grad()
    def prepare(self, rngs: SampleRngs) -> Batch:
        """Words and no words, embedded without gradient; prompts are never dropped."""
        drawn = self.data.draw(rngs)
        words = self.embed_words(drawn)
        return Batch(drawn.latents, Conditioning(words), Conditioning(self.negative.expand(len(words), -1, -1)))


def find_text_encoder(folder: Path) -> Path | None:
    """The text encoder of a model folder, if it has one."""
    return next((folder / name for name in TEXT_ENCODER_FILES if (folder / name).is_file()), None)
