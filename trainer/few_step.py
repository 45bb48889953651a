"""What recipes for a few-step student share: networks that help it learn, guidance, and the walk of inference."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from model.base import Batch, Player
from model.rollouts import Rollouts
from model.scores import ScoreTimes
from pipeline.build import generator_options
from pipeline.samplers import few_step_times
from pipeline.self_forcing_training import SelfForcingTrainingPipeline
from trainer.data import text_encoder_home
from trainer.latents import LatentTrainer
from trainer.plan import activation_bytes
from trainer.work import DistillationWork
from utils.conditioning import Conditioning
from utils.config import ConfigError
from utils.dataset import Samples
from utils.distributed import SampleRngs
from utils.fingerprint import fingerprint
from utils.wan_wrapper import WanDiffusionWrapper
from wan.configs import TEXT_ENCODER_FILES, WanConfig, find_model_folder, pose_file

LATENTS_BEHIND = 8  # decoded to see the last picture of a clip: on the puppet VAE 54 dB from decoding all of it


class FewStepTrainer(LatentTrainer):
    """A recipe whose student is causal and sampled in few steps, by the section `distillation`.

    Student and helpers read the same latents and the same embeddings of words, which therefore do not change.
    """

    @property
    def starting_point(self) -> str | None:
        return self.config.distillation.init_ckpt or super().starting_point

    @property
    def num_sample_frames(self) -> int:
        return self.config.num_training_frames - self.config.distillation.num_input_frames

    def build(self) -> list[Player]:
        self.check()
        return super().build()

    def check(self) -> None:
        """Refuse the config of another stage."""
        config = self.config
        if not config.causal or not config.denoising_step_list:
            raise ConfigError(
                f"the {self.name} trainer makes a causal few-step model; set causal: true and denoising_step_list, "
                "e.g. [1000, 750, 500, 250]"
            )
        if config.train_text_encoder:
            raise ConfigError(
                "teacher and student read the same prompt embeddings, so the text encoder cannot learn; set "
                "train_text_encoder: false"
            )

    @torch.no_grad()
    def open_data(self) -> None:
        super().open_data()
        self.negative = self.embed_words(self.negative_words)

    def prepare(self, rngs: SampleRngs) -> Batch:
        return self.batch(self.data.draw(rngs))  # prompts are never dropped

    @torch.no_grad()
    def batch(self, drawn: Samples, dropped: Tensor | None = None) -> Batch:
        """Words and no words, embedded without gradient."""
        batch = super().batch(drawn, dropped)
        negative = self.negative.expand(len(batch.conditioning.prompt_embeds), -1, -1)
        return replace(batch, negative=Conditioning(negative))

    @property
    def timesteps(self) -> list[float]:
        """The few steps in [0, 1000], as the network sees them."""
        config = self.config
        return few_step_times(config.denoising_step_list, self.generator.scheduler, warp=config.warp_denoising_step)

    # --- networks that help ---

    def build_teacher(self, *, is_causal: bool = False) -> WanDiffusionWrapper:
        """The model that is never changed and may be larger than the student, frozen."""
        settings, dtype = self.config.distillation, self.sharding.compute_dtype or torch.float32
        name = settings.real_name or self.config.model_name
        return self.freeze(self.build_helper(name, settings.real_ckpt, dtype=dtype, is_causal=is_causal))

    def build_critic(self) -> WanDiffusionWrapper:
        """The bidirectional network that learns what the student makes; it starts as the teacher."""
        settings = self.config.distillation
        name, checkpoint = settings.fake_name or settings.real_name or self.config.model_name, settings.fake_ckpt
        if settings.fake_name is None and checkpoint is None:
            checkpoint = settings.real_ckpt
        return self.build_helper(name, checkpoint)

    def build_helper(
        self,
        model_name: str,
        checkpoint: str | None,
        *,
        dtype: torch.dtype = torch.float32,
        is_causal: bool = False,
    ) -> WanDiffusionWrapper:
        """A network on the student's latents, words and clock; a causal one has the student's blocks and window."""
        theirs, ours = WanConfig.from_folder(find_model_folder(model_name)), self.model_config
        if (theirs.in_dim, theirs.out_dim, theirs.text_dim) != (ours.in_dim, ours.out_dim, ours.text_dim):
            raise ConfigError(
                f"{model_name} takes {theirs.in_dim} latent channels and words of width {theirs.text_dim}, the student "
                f"{self.config.model_name} takes {ours.in_dim} and {ours.text_dim}; use a teacher of the same VAE and "
                "text encoder"
            )
        files = [
            find_text_encoder(folder) for folder in (find_model_folder(model_name), text_encoder_home(self.config))
        ]
        if all(files) and fingerprint(files[0]) != fingerprint(files[1]):
            raise ConfigError(
                f"{model_name} was trained with another text encoder ({files[0]}) than the student ({files[1]}); train "
                "the teacher with data.text_encoder_folder set to the student's folder"
            )
        if self.pose_embedding is not None:
            theirs, ours = pose_file(model_name), pose_file(self.config.model_name)
            if theirs is None or fingerprint(theirs) != fingerprint(ours):
                raise ConfigError(
                    f"{model_name} was not trained with the pose networks of {self.config.model_name}; train it from "
                    "there with control.frozen: true"
                )
        options = {**generator_options(self.config), "is_causal": is_causal}
        return self.build_network(model_name, checkpoint, dtype=dtype, **options)

    # --- what scores are asked, and when ---

    def score_times(self) -> ScoreTimes:
        settings = self.config.distillation
        return ScoreTimes(
            self.generator.scheduler,
            min_timestep=settings.min_score_timestep,
            lowest=settings.min_step,
            highest=settings.max_step,
            ts_schedule=settings.ts_schedule,
            ts_schedule_max=settings.ts_schedule_max,
        )

    def make_rollouts(self) -> Rollouts:
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
        stride, streams = self.vae.spatial_stride, settings.num_streams > 0
        return Rollouts(
            pipeline,
            latent_shape=(self.model_config.out_dim, config.height // stride, config.width // stride),
            num_frames=settings.num_grad_frames if streams else config.num_training_frames,
            num_input_frames=settings.num_input_frames,
            first_latent=self.first_latent,
            window=self.window_frames if streams else 0,
            sink=min(config.model_kwargs.sink_size, self.window_frames),
        )

    @property
    def window_frames(self) -> int:
        """Latents of a stream that its next block can see, in whole blocks, and no more than a judged clip has."""
        window, block = self.config.model_kwargs.local_attn_size, self.config.num_frame_per_block
        judged = self.config.distillation.num_grad_frames
        return judged if window == -1 else min(judged, -(-window // block) * block)

    @property
    def rollout_frames(self) -> int:
        """Latents of the longest rollout that a step makes, those included that it goes on from."""
        settings = self.config.distillation
        goes_on = settings.num_grad_frames + self.window_frames
        return goes_on if settings.num_streams else self.config.num_training_frames

    # --- what a step of rollouts takes ---

    @property
    def work_is_counted(self) -> bool:
        """Nobody has counted rollouts that go on from given frames, or whose end alone is judged."""
        settings = self.config.distillation
        return self.config.num_training_frames <= settings.num_grad_frames and not settings.num_input_frames

    def rollout_work(
        self, pipeline: SelfForcingTrainingPipeline, real: WanConfig, fake: WanConfig, **passes
    ) -> DistillationWork:
        """passes: DistillationWork's numbers of the scores' passes. Of rollouts of many lengths the longest counts."""
        config, window = self.config, self.config.model_kwargs.local_attn_size
        return DistillationWork(
            self.model_config,
            real,
            fake,
            blocks=pipeline.plan(self.rollout_frames),
            tokens_per_frame=self.tokens_per_frame,
            window=self.rollout_frames if window == -1 else window,
            num_steps=len(pipeline.timesteps),
            clean_context=config.clean_context,
            recomputation=config.gradient_checkpointing,
            **passes,
        )

    def kept_bytes(self, sizes: WanConfig) -> int:
        """What a pass of a network over whole clips keeps for its backward."""
        tokens = self.config.batch_size * self.rollout_frames * self.tokens_per_frame
        return activation_bytes(sizes, tokens, checkpointing=self.config.gradient_checkpointing)

    @property
    def cache_bytes(self) -> int:
        """Keys and values of a rollout."""
        tokens = self.config.batch_size * self.rollout_frames * self.tokens_per_frame
        dtype = self.sharding.compute_dtype or torch.float32
        return 2 * self.model_config.num_layers * tokens * self.model_config.dim * dtype.itemsize

    @torch.no_grad()
    def first_latent(self, clip: Tensor) -> Tensor:
        """The last picture of a clip [B, n, C, H, W], encoded as the first of a new one: [B, 1, C, H, W].

        Only the clip's end is decoded: the decoder's memory fades within a few latents.
        """
        pixels = self.vae.decode(clip[:, -LATENTS_BEHIND:].transpose(1, 2).to(self.latent_dtype))
        return self.vae.encode(pixels[:, :, -1:].clamp(-1, 1)).transpose(1, 2)


def find_text_encoder(folder: Path) -> Path | None:
    """The text encoder of a model folder, if it has one."""
    return next((folder / name for name in TEXT_ENCODER_FILES if (folder / name).is_file()), None)
