"""From a run's Config to a pipeline: the one file below trainer/ that reads it."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipeline.attention_choice import choose_attention
from pipeline.bidirectional_inference import BidirectionalInferencePipeline
from pipeline.causal_diffusion_inference import CausalDiffusionInferencePipeline
from pipeline.graphs import CudaRecorder
from pipeline.teacache import TeaCache, load_coefficients
from utils.checkpoint import load_generator
from utils.config import Config
from utils.distributed import resolve_device, resolve_dtype
from utils.fingerprint import fingerprint
from utils.video_ranks import VideoRanks
from utils.wan_wrapper import CLIPModel, WanDiffusionWrapper, WanTextEncoder, WanVAEWrapper
from wan.configs import WanConfig, find_model_folder, pose_file
from wan.modules.float8 import check_float8, quantise_linears
from wan.modules.lora import find_lora, merge_lora
from wan.modules.sequence_parallel import Ulysses, check_heads
from wan.modules.weights import read_tensors

logger = logging.getLogger(__name__)
TEACACHE_FILE = "teacache.json"
LATENT_STRIDE = 8  # pixels beside each other that a latent stands for


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
    merge_lora_of(config, generator)
    return generator.eval().requires_grad_(False)


def merge_lora_of(config: Config, generator: WanDiffusionWrapper) -> None:
    """Merge `lora_ckpt` into the weights, if there is one. FileNotFoundError or ValueError says what does not fit."""
    if config.lora_ckpt is None:
        return
    path = find_lora_file(config)
    try:
        merge_lora(generator.model, read_tensors(path), config.lora_scale)
    except ValueError as error:
        raise ValueError(f"lora_ckpt {path}: {error}") from error


def find_lora_file(config: Config) -> Path:
    """What `lora_ckpt` names: a file, or one of the model folder's."""
    path = Path(config.lora_ckpt)
    if not path.is_file():
        path = find_model_folder(config.model_name) / path
    if not path.is_file():
        raise FileNotFoundError(
            f"lora_ckpt {config.lora_ckpt}: there is no such file, and none of that name in {path.parent}; name the "
            "file, or set lora_ckpt=null (a many-step model of your own: --config_path configs/puppet_many_steps.yaml)"
        )
    return path


def accelerate(generator: WanDiffusionWrapper, config: Config) -> None:
    """Make a loaded transformer as fast as `linear_dtype`, `attention_backend` and `compile` say. What changes its
    weights comes before.

    Raises ValueError where the hardware, the model's dtype or attention's error does not fit.
    """
    model = generator.model
    if config.linear_dtype == "bfloat16" and model.dtype != torch.bfloat16:
        raise ValueError(f"linear_dtype is bfloat16, but the model is loaded in {model.dtype}; set dtype=bfloat16")
    if config.linear_dtype == "float8":
        check_float8(model.device)
        logger.info("%d linear layers in float8, the others stay %s", quantise_linears(model), model.dtype)
        if not config.compiles:
            logger.warning("float8 pays where its rounding is compiled into what goes before; set compile=default")
    window = config.model_kwargs.local_attn_size if config.causal else -1
    num_frames = config.num_output_frames if window == -1 else min(window, config.num_output_frames)
    choose_attention(
        model,
        config.attention_gate,
        num_frames=num_frames,
        num_block_frames=min(config.num_frame_per_block, num_frames) if config.causal else num_frames,
        height=config.height // LATENT_STRIDE,
        width=config.width // LATENT_STRIDE,
    )
    if config.compiles:
        model.fuse_projections()
        model.compile_blocks()
        logger.info("compile=%s: a first video compiles on its way, later ones run at full speed", config.compile)


def record_passes(pipeline: CausalDiffusionInferencePipeline | BidirectionalInferencePipeline, config: Config) -> None:
    """Let a pipeline replay its passes as CUDA graphs, if the config wants it and there is what can be recorded."""
    if config.compile != "max":
        return
    model = pipeline.generator.model
    if config.causal and model.device.type == "cuda" and model.sequence_parallel is None:
        pipeline.record_passes(CudaRecorder(model.device))
    else:
        logger.info("compile=max records passes of causal models on one GPU; here it does what default does")


def build_vae(config: Config, device: torch.device) -> WanVAEWrapper:
    """The VAE with the decoder, in the dtype and on the device that the config wants; device: the generator's."""
    if config.vae_device != "auto":
        device = resolve_device(config.vae_device)
    dtype = resolve_dtype(config.dtype if config.vae_dtype == "auto" else config.vae_dtype, device)
    options = {"decoder": config.vae_decoder, "device": device, "dtype": dtype, "compile": config.compiles}
    return WanVAEWrapper(config.model_name, **options)


def build_pipeline(
    config: Config,
    device: torch.device | str | None = None,
    generator: WanDiffusionWrapper | None = None,
    ranks: VideoRanks | None = None,
) -> CausalDiffusionInferencePipeline | BidirectionalInferencePipeline:
    """Everything that turns prompts into pixels. device None: the config's. generator: one that is in training.

    A generator that is built here is as fast as the config wants; one in training stays as it is. ranks: the processes
    that a video is shared with (utils.video_ranks.share_videos), for a config that wants them.
    """
    if ranks is None and (config.sequence_parallel > 1 or config.guidance_parallel):
        raise ValueError(
            "sequence_parallel and guidance_parallel share a video among the processes of torchrun inference.py; this "
            "program makes it in one: leave them out"
        )
    check_heads(WanConfig.from_folder(find_model_folder(config.model_name)).num_heads, config.sequence_parallel)
    device = resolve_device(config.device) if device is None else torch.device(device)
    dtype = resolve_dtype(config.dtype, device)
    in_training = generator is not None
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
    elif config.causal and generator.model.config.pose_dim and (own := pose_file(config.model_name)) is not None:
        pipeline.load_pose_embedding_weights(own)
    if not in_training:
        accelerate(generator, config)
        record_passes(pipeline, config)
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
    folder = find_model_folder(config.model_name)
    files = (
        [config.generator_ckpt]
        if config.generator_ckpt
        else sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    )
    if config.lora_ckpt is None:
        return fingerprint(*files)
    return f"{fingerprint(*files, find_lora_file(config))}*{config.lora_scale:g}"


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
        vae_overlap=config.vae_overlap,
        independent_first_frame=config.independent_first_frame,
        **sampling,
    )
