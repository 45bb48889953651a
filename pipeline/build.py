"""From a run's Config to a pipeline: the one file below trainer/ that reads it."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipeline.bidirectional_inference import BidirectionalInferencePipeline
from pipeline.causal_diffusion_inference import CausalDiffusionInferencePipeline
from pipeline.teacache import TeaCache, load_coefficients
from utils.checkpoint import load_generator
from utils.config import Config
from utils.distributed import resolve_device, resolve_dtype
from utils.fingerprint import fingerprint
from utils.video_ranks import VideoRanks, check_world
from utils.wan_wrapper import CLIPModel, WanDiffusionWrapper, WanTextEncoder, WanVAEWrapper
from wan.configs import WanConfig, find_model_folder
from wan.modules.lora import find_lora
from wan.modules.sequence_parallel import Ulysses, check_heads
from wan.modules.weights import read_tensors

logger = logging.getLogger(__name__)
TEACACHE_FILE = "teacache.json"


def generator_options(config: Config) -> dict:
    """WanDiffusionWrapper's arguments that a config decides, for inference and training alike."""
    return {
        "is_causal": config.causal,
        "timestep_shift": config.timestep_shift,
        "num_frame_per_block": config.num_frame_per_block,
        "local_attn_size": config.model_kwargs.local_attn_size,
        "sink_size": config.model_kwargs.sink_size,
        "independent_first_frame": config.independent_first_frame,
        "rope_base": config.rope_base,
        "attention_backend": config.attention_backend,
    }


def build_generator(config: Config, device: torch.device, dtype: torch.dtype) -> WanDiffusionWrapper:
    """The transformer with its weights: the model folder's, or those of `generator_ckpt`."""
    if config.use_ema and not config.generator_ckpt:
        raise ValueError("use_ema takes generator_ema from a checkpoint, and none is given; name one, or leave it out")
    generator = WanDiffusionWrapper(
        config.model_name,
        **generator_options(config),
        from_scratch=config.generator_ckpt is not None,
        device="meta" if config.generator_ckpt else device,
        dtype=dtype,
    )
    if config.generator_ckpt:
        load_generator(generator, config.generator_ckpt, use_ema=config.use_ema, device=device, dtype=dtype)
    return generator.eval().requires_grad_(False)


def build_vae(config: Config, device: torch.device) -> WanVAEWrapper:
    """The VAE with the decoder and in the dtype that the config wants."""
    dtype = resolve_dtype(config.dtype if config.vae_dtype == "auto" else config.vae_dtype, device)
    return WanVAEWrapper(config.model_name, decoder=config.vae_decoder, device=device, dtype=dtype)


def build_pipeline(
    config: Config,
    device: torch.device | str | None = None,
    generator: WanDiffusionWrapper | None = None,
    ranks: VideoRanks | None = None,
) -> CausalDiffusionInferencePipeline | BidirectionalInferencePipeline:
    """Everything that turns prompts into pixels. device None: the config's. generator: one that is in training.

    ranks: the processes that a video is shared with (utils.video_ranks.share_videos), for a config that wants them.
    """
    if ranks is None:
        check_world(1, config.sequence_parallel, config.guidance_parallel)
    check_heads(WanConfig.from_folder(find_model_folder(config.model_name)).num_heads, config.sequence_parallel)
    device = resolve_device(config.device) if device is None else torch.device(device)
    dtype = resolve_dtype(config.dtype, device)
    generator = generator or build_generator(config, device, dtype)
    text_encoder = WanTextEncoder(config.model_name, device=device, dtype=dtype)
    vae = build_vae(config, device)
    clip = None
    if generator.model.config.model_type == "i2v":
        half = torch.float16 if dtype == torch.bfloat16 else dtype  # bfloat16 is too coarse for CLIP; Wan runs it so
        clip = CLIPModel(config.model_name, device=device, dtype=half)
    pipeline = assemble_pipeline(config, generator, text_encoder, vae, clip, ranks)
    if config.pose_ckpt:
        load_pose(pipeline, config)
    return pipeline


def load_pose(pipeline: CausalDiffusionInferencePipeline, config: Config) -> None:
    """What `pose_ckpt` holds: the pose networks, and its LoRA if it has one and the config wants it."""
    pipeline.load_pose_embedding_weights(config.pose_ckpt)
    if config.pose_lora and find_lora(read_tensors(config.pose_ckpt)):
        try:
            pipeline.load_unianimate_lora(config.pose_ckpt)
        except ValueError as error:
            raise ValueError(f"{config.pose_ckpt}: {error}; pose_lora=false loads the pose networks alone") from error


def build_teacache(config: Config) -> TeaCache | None:
    """What teacache says, with the model folder's calibration (scripts/calibrate_teacache.py) or the published one."""
    if not config.teacache:
        return None
    folder = find_model_folder(config.model_name)
    name = Path(config.model_name).name
    return TeaCache(load_coefficients(folder / TEACACHE_FILE, name, weights_fingerprint(config)), config.teacache)


def weights_fingerprint(config: Config) -> str:
    """What tells a run's transformer from another."""
    if config.generator_ckpt:
        return fingerprint(config.generator_ckpt)
    folder = find_model_folder(config.model_name)
    return fingerprint(*sorted(folder.glob("diffusion_pytorch_model*.safetensors")))


def assemble_pipeline(
    config: Config,
    generator: WanDiffusionWrapper,
    text_encoder: Callable[[Sequence[str]], Tensor],
    vae: WanVAEWrapper,
    clip: CLIPModel | None = None,
    ranks: VideoRanks | None = None,
) -> CausalDiffusionInferencePipeline | BidirectionalInferencePipeline:
    """The pipeline a config asks for, of parts that are there already: trainers sample with what they train.

    With `ranks` the generator goes over to sharing its passes; without, whatever the config says, it works alone.
    """
    if ranks is not None and ranks.sequence is not None:
        generator.model.share_passes(Ulysses(ranks.sequence))
    sampling = {
        "ranks": ranks,
        "clip": clip,
        "teacache": build_teacache(config),
        "guidance_scale": config.guidance_scale,
        "negative_prompt": config.negative_prompt,
        "solver": config.solver,
        "sampling_steps": config.sampling_steps,
    }
    if not config.causal:
        return BidirectionalInferencePipeline(generator, text_encoder, vae, **sampling)
    return CausalDiffusionInferencePipeline(
        generator,
        text_encoder,
        vae,
        num_frame_per_block=config.num_frame_per_block,
        denoising_step_list=config.denoising_step_list,
        warp_denoising_step=config.warp_denoising_step,
        context_noise=config.context_noise,
        clean_context=config.clean_context,
        guidance_passes=config.guidance_passes,
        independent_first_frame=config.independent_first_frame,
        **sampling,
    )
