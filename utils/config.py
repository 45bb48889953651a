"""Every knob of the project, typed, on one page; and the road from YAML to it.

A run's settings are: the defaults of this page, then ``configs/default_config.yaml``, then the file of the run, then
``key=value`` from the command line. An unknown key, a wrong type or two settings that exclude each other stop the run
with one sentence. Only entrances, trainers and ``pipeline/build.py`` read a ``Config``.
"""

import dataclasses
import difflib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_CONFIG = ROOT / "configs" / "default_config.yaml"


class ConfigError(ValueError):
    """A setting that cannot be; the message names file, key and remedy."""


@dataclass
class ModelKwargs:
    """How far the generator looks back, in latent frames."""

    local_attn_size: int = 15  # frames a token sees, its own block included; -1: all of them
    sink_size: int = 0  # first frames that stay visible after they left the window


@dataclass
class OptimizerConfig:
    """AdamW and its learning rate over the run."""

    lr: float = 5e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 100
    schedule: Literal["cosine", "constant"] = "cosine"  # over max_steps or max_seconds, whichever ends first
    final_lr_ratio: float = 0.05  # learning rate at the end, as a share of lr
    max_grad_norm: float = 1.0


@dataclass
class CriticOptimizerConfig:
    """Where the optimizer of a critic (fake score, discriminator) differs from `optimizer`; None: it does not."""

    lr: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    weight_decay: float | None = None
    warmup_steps: int | None = None
    schedule: Literal["cosine", "constant"] | None = None
    final_lr_ratio: float | None = None
    max_grad_norm: float | None = None


@dataclass
class EmaConfig:
    """Exponential moving average of the weights; what gets exported."""

    weight: float = 0.998  # share of the old average kept each step; 0 turns it off
    start_step: int = 0  # before this step the average is a copy of the weights


@dataclass
class DataConfig:
    """What is learned from (docs/training_data.md)."""

    kind: Literal["puppet", "prompts", "videos", "latents", "ode_pairs"] = "puppet"
    path: str | None = None  # prompts: a text file; videos: a folder with captions; others: a folder a script filled
    extended_path: str | None = None  # prompts: file whose line n is learned in place of line n
    latent_cache: str | None = None  # videos: folder of their latents, filled as needed; None: <path>/latents
    skip_broken: bool = True  # videos: leave out what cannot be used, with a word; False: stop
    text_cache: str | None = None  # folder of prompt embeddings, filled as needed; None: the text encoder stays loaded
    sample_prompts: str | None = None  # file of the prompts on contact sheets; None: held-out puppets, or the data's
    # puppet clips, rendered and encoded while training (utils/puppet_latents.py)
    vae_folder: str | None = None  # model folder whose VAE makes the latents; None: the folder of model_name
    tokenizer_folder: str | None = None  # tokenizer of a new text encoder; None: one made from the world's captions
    text_encoder_folder: str | None = None  # from_scratch: text encoder (and tokenizer) to start from; None: a new one
    pool_size: int = 16384  # encoded clips kept per rank
    min_fill: int = 2048  # training starts with this many
    refresh_per_step: int = 16  # clips replaced by new ones after each step
    encode_batch_size: int = 16  # clips rendered and encoded at a time
    text_dropout: float = 0.1  # share of prompts replaced by negative_prompt, for guidance
    num_frames: int = 17  # pixels frames of a VAE training clip (1 + a multiple of 4)
    tail_num_frames: int = 33  # length of VAE clips in the last part of the run
    tail_share: float = 0.25  # of the run, trained on tail_num_frames
    num_eval_clips: int = 16  # held-out clips of the VAE's PSNR; held-out videos (or pairs), at most one in ten


@dataclass
class VaeConfig:
    """Sizes and losses of a VAE trained from scratch (the generator's trainer ignores this section)."""

    dim: int = 40
    z_dim: int = 16
    dim_mult: list[int] = field(default_factory=lambda: [1, 2, 2])
    num_res_blocks: int = 1
    temporal_downsample: list[bool] = field(default_factory=lambda: [True, True])
    patch_size: int = 2  # pixels folded into channels before the first convolution
    l1_weight: float = 1.0
    mse_weight: float = 2.0
    gradient_weight: float = 0.5  # L1 between horizontal and vertical pixel differences
    kl_weight: float = 1e-5
    puppet_weight: float = 5.0  # of pixels on the puppet and its prop, against 1 for the rest


@dataclass
class TinyVaeConfig:
    """A small decoder (TAEHV layout) for the latents of data.vae_folder; the losses are weighted as in `vae`."""

    decoder_channels: list[int] = field(default_factory=lambda: [48, 32, 16])  # by size, smallest pictures first
    decoder_space_upscale: list[bool] = field(default_factory=lambda: [True, True])
    decoder_time_upscale: list[bool] = field(default_factory=lambda: [True, True])
    patch_size: int = 2  # pixels that the last convolution makes at once, per side
    teacher_share: float = 0.0  # of the picture to learn that is the full decoder's; the rest is the truth
    pool_batches: int = 1  # encoded batches that steps draw from
    steps_per_batch: int = 1  # steps between new batches in the pool; more where encoding is slow


@dataclass
class TextEncoderConfig:
    """Sizes of a text encoder trained from scratch (umT5 layout)."""

    d_model: int = 192
    num_layers: int = 3
    num_heads: int = 4
    d_kv: int = 48
    d_ff: int = 384


@dataclass
class ControlConfig:
    """Pose and image learned with the generator; how many samples are steered, and by what.

    Words that say something else and hidden joints are puppets' only: videos have what stands beside them.
    """

    pose_dim: int = 0  # width of the pose tokens; 64 holds all that the pose networks can say; 0: neither is learned
    frozen: bool = False  # pose networks stay as they are, pose_proj learns: for a student's teacher
    # Shares in [0, 1]:
    pose_dropout: float = 0.5  # samples without a pose
    image_dropout: float = 0.8  # samples without an image
    first_frame: float = 0.5  # images that are the clip's own first frame; the others show the puppet at another moment
    reference_pose_dropout: float = 0.5  # of those others: without their own skeleton, where the clip has a pose
    wrong_action: float = 0.3  # samples with a pose whose words tell of another action
    hidden_joints: float = 0.2  # clips whose skeleton lacks joints, as those that a detector finds may
    unsaid_looks: float = 0.5  # samples with an image whose words tell of the action only


@dataclass
class DistillationConfig:
    """A few-step student, its frozen teacher (real score), and a critic (fake score) that learns what it makes."""

    init_ckpt: str | None = None  # generator that training starts from; None: generator_ckpt
    real_name: str | None = None  # model folder of the bidirectional teacher; None: that of model_name
    real_ckpt: str | None = None  # .pt or .safetensors over that folder's weights
    fake_name: str | None = None  # model folder that the critic starts from; None: the teacher's
    fake_ckpt: str | None = None
    real_guidance_scale: float = 4.0  # w in uncond + w (cond - uncond); Self-Forcing's 3, which counts from cond, is 4
    fake_guidance_scale: float = 1.0
    dfake_gen_update_ratio: int = 5  # the critic learns in every step, the generator in every so many
    min_score_timestep: float = 0.0  # times of the scores start here, on the unshifted 0-1000 grid ...
    ts_schedule: bool = False  # ... or where the rollout's exit step left off
    ts_schedule_max: bool = False  # and end where that step began, not at 1000
    min_step: float = 20.0  # lowest and highest time at which scores are asked, after the shift
    max_step: float = 980.0
    sid_alpha: float = 1.0
    same_step_across_blocks: bool = True  # all blocks of a rollout leave at the same denoising step
    last_step_only: bool = False  # which is always the last
    num_grad_frames: int = 21  # latents the scores see: the last ones of longer rollouts (num_training_frames)
    num_input_frames: int = 0  # latents of a real clip that rollouts go on from; 1: image to video
    num_streams: int = 0  # streams of up to num_training_frames that take turns in going on; 0: rollouts begin anew


@dataclass
class ConsistencyConfig:
    """Causal consistency distillation; its teacher is distillation.real_name."""

    causal_teacher: bool = True  # the teacher looks back only, as the student; False: it is bidirectional
    solver_steps: int = 48  # of the teacher from noise to clean: the student's neighbours lie one of them apart


@dataclass
class GanConfig:
    """Adversarial distillation; its discriminator starts as distillation.fake_name."""

    relativistic: bool = True  # judge pairs of a real and a made clip by their difference
    g_weight: float = 1e-2  # of the generator's loss
    d_weight: float = 1e-2  # of the discriminator's
    r1_weight: float = 0.0  # of half the discriminator's squared slope at real clips
    r2_weight: float = 0.0  # ... and at made ones
    r1_sigma: float = 0.01  # length of the step that measures the slope; at least 0.1 in bfloat16
    r2_sigma: float = 0.01
    denoising_weight: float = 0.0  # of the critic's own denoising loss on made clips; 0: it only judges
    concat_time_embeddings: bool = False  # the head is told the noise level
    discriminator_warmup_steps: int = 0  # steps before the generator starts to learn


@dataclass
class CheckpointConfig:
    """Training state on disk."""

    every_seconds: float = 600.0
    every_steps: int | None = None  # beside every_seconds: whichever comes first
    keep_last: int = 2
    max_file_mb: int = 2000  # a larger compact state is split over several files
    compact: bool = False  # only step, weights and EMA, in bfloat16: small, but a resumed run restarts Adam's moments


@dataclass
class LoggingConfig:
    """What is told, and how often."""

    log_iters: int = 20  # steps between lines in metrics.jsonl
    sample_iters: int = 0  # steps between sample videos or evaluations; 0: only at the end
    wandb: bool = False
    wandb_project: str = "longtake"
    wandb_entity: str | None = None
    wandb_mode: Literal["online", "offline"] = "online"


@dataclass
class Config:
    """The page. Defaults are those of the embedded puppet model."""

    # --- who ---
    trainer: Literal["vae", "tiny_vae", "text", "diffusion", "ode", "consistency", "score_distillation", "gan"] = (
        "diffusion"
    )
    distribution_loss: Literal["dmd", "sid", "causvid"] = "dmd"  # read by score distillation only
    model_name: str = "puppet-tiny"  # a folder in wan_models/ and a key of WAN_CONFIGS
    model_kwargs: ModelKwargs = field(default_factory=ModelKwargs)
    generator_ckpt: str | None = None  # .pt or .safetensors loaded over the model folder's weights
    use_ema: bool = False  # take generator_ema from generator_ckpt
    causal: bool = True  # False: bidirectional attention, the undistilled teacher

    # --- the walk ---
    num_frame_per_block: int = 3  # latent frames denoised together
    independent_first_frame: bool = False  # the first latent frame is a block of its own
    denoising_step_list: list[float] | None = None  # few-step sampling on the unshifted 0-1000 grid; None: many steps
    warp_denoising_step: bool = True  # apply timestep_shift to denoising_step_list
    context_noise: float = 0.0  # timestep in [0, 1000] of the frames that later blocks look at
    clean_context: bool = True  # False: no clean pass, context is what the last denoising step left (train so, too)
    rope_base: Literal["absolute", "window"] = "absolute"  # window: time positions relative to the window, for streams
    timestep_shift: float = 3.0  # the one shift: training, sampling and warping
    guidance_scale: float = 3.0  # classifier-free guidance w in  uncond + w (cond - uncond); 1 turns it off
    guidance_passes: Literal["auto", "one", "two"] = "auto"  # one: both sides together; auto: on a GPU with room
    sampling_steps: int = 16
    solver: Literal["unipc", "dpm++", "euler"] = "unipc"
    teacache: float = 0.0  # change per left-out denoising step that is put up with, e.g. 0.1; 0: every step is computed
    negative_prompt: str = ""
    image_mode: Literal["auto", "context", "concat", "ref_sink"] = "auto"  # how an image steers, see docs/control.md
    lora_ckpt: str | None = None  # low-rank update merged into the weights: a file, or one of the model folder's
    lora_scale: float = 1.0  # how much of it
    pose_ckpt: str | None = None  # pose networks (and LoRA): UniAnimate's checkpoint, or one in its layout
    pose_lora: bool = True  # merge the LoRA of pose_ckpt, where it has one, into the generator
    # of keypoint files (utils/pose/draw.py); auto: legacy (UniAnimate's) for a pose_ckpt, else body (puppets')
    pose_drawing: Literal["auto", "legacy", "native", "body"] = "auto"
    pose_strength: float = 1.0  # factor on the pose, in [0, 2]; 1 is as trained
    pose_guidance_scale: float | None = None  # above 1: away from what no pose would give, for one more pass a step
    strength: float = 0.6  # video to video: share of the denoising steps taken; 1 ignores the driving video

    # --- the video ---
    height: int = 128  # pixels, a multiple of 16
    width: int = 128
    num_output_frames: int = 21  # latent frames; 1 + 4 (n - 1) pixel frames
    fps: int = 16

    # --- the machine ---
    sequence_parallel: int = 1  # inference: processes of torchrun that make a video together; a divisor of the heads
    guidance_parallel: bool = False  # inference: the two sides of guidance on two processes (each sequence_parallel)
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on CUDA, float32 elsewhere
    # fastest: measured when inference starts; int8, float8 and int8_scores round, see docs/realtime.md
    attention_backend: Literal[
        "auto", "fastest", "sdpa", "cudnn", "flash", "flash2", "flash3", "flash4", "int8", "float8", "int8_scores"
    ] = "auto"
    attention_gate: float = 0.05  # relative error up to which inference takes what fastest measured, or what rounds
    compile: Literal["off", "default", "max"] = "off"  # default (or true): blocks; max: inference in CUDA graphs, too
    linear_dtype: Literal["auto", "bfloat16", "float8"] = "auto"  # of inference's linear layers; auto: as dtype
    vae_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: as dtype
    vae_device: str = "auto"  # where pictures are made: auto (as device), or another GPU, which decodes meanwhile
    vae_overlap: bool = False  # a block is decoded while the next one is denoised; a live driver comes a block earlier
    vae_decoder: Literal["full", "tiny"] = "full"  # tiny: the folder's taew2_1 makes the pictures, softer and faster

    # --- training ---
    max_steps: int | None = None  # optimizer steps; None: no limit
    max_seconds: float | None = None  # seconds of the whole run, resumed sessions added up; then save and stop
    session_seconds: float | None = None  # seconds of this process; then save and stop, to be resumed
    batch_size: int = 1  # samples per GPU and pass
    total_batch_size: int | None = None  # samples per optimizer step on all GPUs (accumulated); None: one pass
    from_scratch: bool = False  # random weights instead of the model folder's
    train_text_encoder: bool = False  # the text encoder learns with the generator
    num_training_frames: int = 21  # latent frames of a training clip
    teacher_forcing: bool = True  # context is clean; False: diffusion forcing, context as noisy as it comes
    noise_augmentation_max_timestep: float = 0.0  # teacher forcing: noise up to this on half of the clean contexts
    denoising_loss_type: Literal["flow", "x0", "noise"] = "flow"
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"  # before the shift
    timestep_weighting: bool = False  # weight the loss by FlowMatchScheduler.training_weight
    mixed_precision: bool = True  # bfloat16 autocast on CUDA; parameters, gradients and moments stay float32
    gradient_checkpointing: bool = False
    cuda_graphs: bool = False  # replay each pass as one CUDA graph: for small networks, which the host cannot keep fed
    sharding_strategy: Literal["hybrid_full", "full", "no_shard"] = "hybrid_full"  # hybrid: copies per group of GPUs
    sharding_group_size: int | None = None  # hybrid_full: GPUs that hold one copy together; None: those of a node
    heartbeat_seconds: float = 45.0  # a rank silent for so long is taken for dead and the others stop; 0: they wait
    cpu_offload: bool = False  # sharded weights, gradients and moments lie in main memory
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    critic_optimizer: CriticOptimizerConfig = field(default_factory=CriticOptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    data: DataConfig = field(default_factory=DataConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    tiny_vae: TinyVaeConfig = field(default_factory=TinyVaeConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    gan: GanConfig = field(default_factory=GanConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def compiles(self) -> bool:
        """Whether torch.compile is wanted."""
        return self.compile != "off"

    @property
    def drawing_profile(self) -> str:
        """How keypoint files are drawn, a profile of utils.pose.draw."""
        if self.pose_drawing != "auto":
            return self.pose_drawing
        return "legacy" if self.pose_ckpt else "body"

    def check(self) -> None:
        """Refuse values and pairs of values that cannot work, each with a way out."""
        for name in ("height", "width"):
            value = getattr(self, name)
            if value < 16 or value % 16:
                low = max(16, value // 16 * 16)
                choice = f"{low} or {low + 16}" if value > 16 else "16"
                raise ConfigError(f"{name} is {value}; pixels come in multiples of 16: use {choice}")
        if self.num_frame_per_block < 1:
            raise ConfigError(f"num_frame_per_block is {self.num_frame_per_block}; a block has at least 1 latent frame")
        for name in ("num_output_frames", "num_training_frames"):
            self._check_blocks(name)
        self._check_window()
        if self.denoising_step_list is not None:
            steps = list(self.denoising_step_list)
            if not steps or sorted(set(steps), reverse=True) != steps or steps[0] > 1000 or steps[-1] <= 0:
                raise ConfigError(
                    f"denoising_step_list is {steps}; it holds descending timesteps in (0, 1000], "
                    "e.g. [1000, 750, 500, 250]"
                )
            if not self.causal:
                raise ConfigError("causal is false but denoising_step_list is set; few steps need a causal model")
        for name in ("context_noise", "noise_augmentation_max_timestep"):
            if not 0 <= getattr(self, name) <= 1000:
                raise ConfigError(f"{name} is {getattr(self, name)}; a timestep lies in [0, 1000]")
        for name in ("timestep_shift", "fps", "sampling_steps", "batch_size"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be positive")
        self._check_parallel()
        if self.attention_gate <= 0:
            raise ConfigError(f"attention_gate is {self.attention_gate}; it is a relative error above 0, e.g. 0.05")
        if self.teacache < 0 or (self.teacache and self.denoising_step_list is not None):
            raise ConfigError(f"teacache is {self.teacache}; it is 0 for few-step models and at least 0 for many steps")
        if not 0 <= self.pose_strength <= 2:
            raise ConfigError(f"pose_strength is {self.pose_strength}; it lies in [0, 2]: 0 ignores the pose")
        if self.pose_guidance_scale is not None and self.pose_guidance_scale < 0:
            raise ConfigError(
                f"pose_guidance_scale is {self.pose_guidance_scale}; 0 ignores the pose, 1 is as without it, "
                "more holds on to the pose"
            )
        if self.pose_ckpt is not None and not self.causal:
            raise ConfigError("causal is false but pose_ckpt is set; only a causal model follows a pose here")
        if not 0 < self.strength <= 1:
            raise ConfigError(f"strength is {self.strength}; it lies in (0, 1]: little keeps the driving video")
        if self.total_batch_size is not None and self.total_batch_size % self.batch_size:
            raise ConfigError(
                f"total_batch_size {self.total_batch_size} is no multiple of batch_size {self.batch_size}; "
                f"use {max(1, self.total_batch_size // self.batch_size) * self.batch_size}"
            )
        for name, value in (
            ("sharding_group_size", self.sharding_group_size),
            ("checkpoint.every_steps", self.checkpoint.every_steps),
            ("checkpoint.keep_last", self.checkpoint.keep_last),
            ("tiny_vae.pool_batches", self.tiny_vae.pool_batches),
            ("tiny_vae.steps_per_batch", self.tiny_vae.steps_per_batch),
            ("distillation.dfake_gen_update_ratio", self.distillation.dfake_gen_update_ratio),
            ("consistency.solver_steps", self.consistency.solver_steps),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it is at least 1")
        for name in ("r1_sigma", "r2_sigma"):
            if getattr(self.gan, name) <= 0:
                raise ConfigError(f"gan.{name} is {getattr(self.gan, name)}; it is a length above 0, e.g. 0.1")
        self._check_data()
        self._check_control()
        self._check_streams()
        if not 0 <= self.tiny_vae.teacher_share <= 1:
            raise ConfigError(f"tiny_vae.teacher_share is {self.tiny_vae.teacher_share}; a share lies in [0, 1]")
        if not 0 <= self.ema.weight < 1:
            raise ConfigError(f"ema.weight is {self.ema.weight}; it is the share of the old average kept, in [0, 1)")

    def _check_parallel(self) -> None:
        if self.sequence_parallel < 1:
            raise ConfigError(f"sequence_parallel is {self.sequence_parallel}; a video is made by at least 1 process")
        if self.vae_device != "auto" and (self.sequence_parallel > 1 or self.guidance_parallel):
            raise ConfigError(
                f"vae_device is {self.vae_device}, but ranks that make a video together decode it together, on their "
                "own GPUs; leave vae_device out"
            )
        if not self.guidance_parallel:
            return
        if self.denoising_step_list is not None or self.guidance_scale == 1:
            why = "few steps have none" if self.denoising_step_list is not None else "guidance_scale 1 turns it off"
            raise ConfigError(f"guidance_parallel is true, but there is no guidance to share: {why}; leave it out")
        if self.guidance_passes == "one":
            raise ConfigError(
                "guidance_passes is one and guidance_parallel is true, but sides on two processes cannot go through "
                "the network together; set one of them"
            )

    def _check_data(self) -> None:
        data = self.data
        if data.kind != "puppet" and self.trainer in ("vae", "tiny_vae", "text"):
            raise ConfigError(f"data.kind is {data.kind}, but trainer {self.trainer} learns from puppets; leave it out")
        if data.kind != "puppet" and data.path is None:
            raise ConfigError(f"data.kind is {data.kind}, but data.path does not say where they are; set data.path")
        if data.kind == "puppet" and data.path is not None:
            raise ConfigError(
                f"data.path is {data.path}, but data.kind is puppet, which reads no files; set data.kind to prompts, "
                "videos, latents or ode_pairs"
            )
        if data.text_cache and data.kind == "puppet":
            raise ConfigError(
                "data.text_cache is set, but data.kind is puppet, whose captions are new in every step; leave it out"
            )
        if data.text_cache and self.train_text_encoder:
            raise ConfigError(
                "data.text_cache is set and train_text_encoder is true, but a cache knows the encoder as it was; "
                "set one of them"
            )

    def _check_control(self) -> None:
        if self.control.pose_dim < 0:
            raise ConfigError(f"control.pose_dim is {self.control.pose_dim}; it is a width, e.g. 64, or 0 for no pose")
        if not self.control.pose_dim:
            return
        for name, value in vars(self.control).items():
            if name not in ("pose_dim", "frozen") and not 0 <= value <= 1:
                raise ConfigError(f"control.{name} is {value}; a share lies in [0, 1]")
        if self.trainer not in ("diffusion", "consistency", "score_distillation"):
            raise ConfigError(
                f"control.pose_dim is {self.control.pose_dim}, but the {self.trainer} trainer knows neither pose nor "
                "image; set trainer: diffusion, consistency or score_distillation, or control.pose_dim: 0"
            )
        if self.data.kind not in ("puppet", "videos"):
            raise ConfigError(
                f"control.pose_dim is {self.control.pose_dim}, but data.kind is {self.data.kind}, which has no "
                "skeletons; set data.kind: videos (keypoint files stand beside the videos) or puppet, or "
                "control.pose_dim: 0"
            )
        if self.data.kind == "videos" and (self.drawing_profile == "legacy" or self.cuda_graphs):
            raise ConfigError(
                "control.pose_dim is set: on videos poses are drawn in the video's size, and not every clip has one; "
                "set pose_drawing: native or body, and cuda_graphs: false"
            )
        wanted = {}
        if self.control.image_dropout < 1:  # an image stands before the clip, seen by causal networks that are shown it
            if self.trainer == "score_distillation" or not self.causal:
                raise ConfigError(
                    "control.pose_dim is set: a bidirectional network, and what is distilled from one, learns poses "
                    "but no images; set control.image_dropout: 1"
                )
            wanted |= {
                "teacher_forcing": (self.teacher_forcing, True),
                "independent_first_frame": (self.independent_first_frame, False),
                "rope_base": (self.rope_base, "absolute"),
                "consistency.causal_teacher": (self.consistency.causal_teacher, True),
            }
        if self.trainer == "score_distillation":
            wanted["distillation.num_input_frames"] = (self.distillation.num_input_frames, 0)
        for name, (value, needed) in wanted.items():
            if value != needed:
                raise ConfigError(
                    f"control.pose_dim is {self.control.pose_dim}, but {name} is {value}; pose and image are learned "
                    f"with {name}: {str(needed).lower()}; set it, or control.pose_dim: 0"
                )
        if self.trainer == "score_distillation" and self.num_training_frames > self.distillation.num_grad_frames:
            raise ConfigError(
                f"control.pose_dim is set: poses belong to whole clips, but of {self.num_training_frames} latents "
                f"(num_training_frames) only {self.distillation.num_grad_frames} are judged; make them equal"
            )
        window, block = self.model_kwargs.local_attn_size, self.num_frame_per_block
        if self.control.image_dropout < 1 and (self.num_training_frames <= block or window in range(block + 1)):
            raise ConfigError(
                f"control.pose_dim is set: an image and a block of {block} must fit into a clip and into the window; "
                f"num_training_frames is {self.num_training_frames}, model_kwargs.local_attn_size {window}"
            )

    def _check_streams(self) -> None:
        settings, frames = self.distillation, self.num_training_frames
        if not settings.num_streams:
            return
        if settings.num_streams < 0:
            raise ConfigError(f"distillation.num_streams is {settings.num_streams}; it is 0 (none) or more, e.g. 4")
        remedy = "or distillation.num_streams: 0"
        if self.trainer != "score_distillation" or self.distribution_loss == "causvid":
            name = f"trainer {self.trainer}" if self.trainer != "score_distillation" else "distribution_loss causvid"
            raise ConfigError(
                f"distillation.num_streams is {settings.num_streams}, but rollouts of the {name} do not go on; set "
                f"trainer: score_distillation with dmd or sid, {remedy}"
            )
        if frames < 2 * settings.num_grad_frames:
            raise ConfigError(
                f"distillation.num_streams is {settings.num_streams}, but streams of {frames} latents "
                f"(num_training_frames) end with their first clip of {settings.num_grad_frames} (num_grad_frames); set "
                f"num_training_frames: {12 * settings.num_grad_frames}, {remedy}"
            )
        if settings.num_input_frames or self.independent_first_frame:
            raise ConfigError(
                "streams begin from words alone and go on in whole blocks; set distillation.num_input_frames: 0 and "
                f"independent_first_frame: false, {remedy}"
            )
        if not (settings.same_step_across_blocks or settings.last_step_only):
            raise ConfigError(
                "a stream goes on from clips whose blocks all left at the last step, which is rare where every block "
                f"draws its own; set distillation.same_step_across_blocks: true, {remedy}"
            )

    def _check_blocks(self, name: str) -> None:
        frames, block = getattr(self, name), self.num_frame_per_block
        if frames < 1:
            raise ConfigError(f"{name} is {frames}; a video has at least 1 latent frame")
        given = 0
        if name == "num_training_frames" and self.trainer == "score_distillation":
            given = self.distillation.num_input_frames
        frames -= given
        first = 1 if self.independent_first_frame and not given else 0
        if self.causal and (frames - first) % block:
            low = (frames - first) // block * block + first
            choice = " or ".join(str(given + n) for n in (low, low + block) if n > 0)
            blocks = f"one frame and blocks of {block}" if first else f"blocks of {block}"
            after = f" after {given} given ones" if given else ""
            raise ConfigError(f"{frames} latent frames{after} do not split into {blocks}; use {choice} ({name})")

    def _check_window(self) -> None:
        window, sink = self.model_kwargs.local_attn_size, self.model_kwargs.sink_size
        if window != -1 and window < self.num_frame_per_block:
            raise ConfigError(
                f"model_kwargs.local_attn_size is {window}, less than one block of {self.num_frame_per_block}; "
                "use -1 (everything) or at least one block"
            )
        if sink < 0 or (window != -1 and sink > window - self.num_frame_per_block):
            raise ConfigError(
                f"model_kwargs.sink_size is {sink}; it lies in [0, local_attn_size - num_frame_per_block] "
                f"= [0, {max(0, window - self.num_frame_per_block)}]"
            )


def load_config(path: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """Settings of a run: this page, default_config.yaml, ``path``, then ``overrides`` such as "data.pool_size=64".

    A relative ``path`` is looked up in the working directory, then beside the package. Raises ConfigError.
    """
    layers = [(DEFAULT_CONFIG.name, _read_yaml(DEFAULT_CONFIG))]
    if path is not None:
        layers.append((str(path), _read_yaml(_find(Path(path)))))
    layers += [("command line", _read_override(item)) for item in overrides or []]
    merged = OmegaConf.structured(Config)
    for source, settings in layers:
        if isinstance(settings.get("compile"), bool):  # YAML reads "off" as false
            settings["compile"] = "default" if settings["compile"] else "off"
        _refuse_unknown(source, settings, Config)
        try:
            merged.merge_with(settings)  # in place: OmegaConf.merge copies all settings for each layer
        except OmegaConfBaseException as error:
            reason = str(error.msg or error).splitlines()[0]
            raise ConfigError(f"{source}: setting '{error.full_key}': {reason}") from error
    config = OmegaConf.to_object(merged)
    try:
        config.check()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if path else str(error)) from None
    return config


def dump(config: Config) -> str:
    """The resolved settings as YAML; ``load_config`` of it gives an equal Config."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def config_hash(config: Config | str) -> str:
    """Twelve hexadecimal digits that change when any setting does. config: or what `dump` made of it."""
    text = config if isinstance(config, str) else dump(config)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _find(path: Path) -> Path:
    for candidate in (path, ROOT / path):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(p.name for p in DEFAULT_CONFIG.parent.glob("*.yaml")))
    raise ConfigError(f"{path}: no such file; configs/ holds {known}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        settings = OmegaConf.load(path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a UTF-8 text file (byte {error.start})") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as a config: {error.strerror or error}") from error
    if not OmegaConf.is_dict(settings):
        raise ConfigError(f"{path}: a config is a list of 'key: value' lines")
    return OmegaConf.to_container(settings)


def _read_override(item: str) -> dict[str, Any]:
    key, equals, _ = item.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"command line: '{item}' is not of the form key=value")
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([item]))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"command line: the value in '{item}' is not valid YAML") from error


def _refuse_unknown(source: str, settings: dict[str, Any], page: type, prefix: str = "") -> None:
    sections = {f.name: f.type for f in dataclasses.fields(page)}
    for key, value in settings.items():
        if key not in sections:
            raise ConfigError(f"{source}: no setting '{prefix}{key}'{_nearest(prefix, str(key))}")
        if dataclasses.is_dataclass(sections[key]):
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: setting '{prefix}{key}' is a section of settings, not {value!r}")
            _refuse_unknown(source, value, sections[key], f"{prefix}{key}.")


def _nearest(prefix: str, key: str) -> str:
    """The likeliest key meant: same name in another section first, then the closest spelling."""
    known = list(_all_keys(Config))
    same_name = [k for k in known if k.rpartition(".")[2] == key]
    close = same_name or difflib.get_close_matches(prefix + key, known, n=1, cutoff=0.6)
    if not close:
        leaves = {k.rpartition(".")[2]: k for k in reversed(known)}
        close = [leaves[name] for name in difflib.get_close_matches(key, leaves, n=1, cutoff=0.6)]
    return f"; did you mean '{close[0]}'?" if close else "; the settings are listed in utils/config.py"


def _all_keys(page: type, prefix: str = "") -> Iterator[str]:
    for f in dataclasses.fields(page):
        yield prefix + f.name
        if dataclasses.is_dataclass(f.type):
            yield from _all_keys(f.type, f"{prefix}{f.name}.")
