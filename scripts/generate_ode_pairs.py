"""Write a teacher's ODE trajectories, which an ODE-regression student learns from. Run it again to go on.

    python scripts/generate_ode_pairs.py --config_path configs/ode_init.yaml --prompts prompts.txt --output data/ode
    torchrun --nproc_per_node=8 scripts/generate_ode_pairs.py --config_path ... --guidance_scale 6

The config is the student's: size, length, shift and denoising_step_list of the trajectories are those it trains on; the
teacher is its distillation.real_name. A killed run loses at most the shards it was in the middle of; finished ones are
never made again, on however many GPUs it goes on.
"""

import argparse
import dataclasses
import hashlib
import itertools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.build import build_generator  # noqa: E402 (run as a script, the repository is not on the path yet)
from pipeline.ode_pairs import grid_places, ode_trajectory  # noqa: E402
from pipeline.samplers import SampleNoise  # noqa: E402
from trainer.data import trajectories_about  # noqa: E402
from utils.conditioning import Conditioning  # noqa: E402
from utils.config import Config, ConfigError, load_config  # noqa: E402
from utils.distributed import Ranks, init_distributed, resolve_dtype, shutdown  # noqa: E402
from utils.errors import plain_errors  # noqa: E402
from utils.fingerprint import fingerprint  # noqa: E402
from utils.latent_folder import ODEPairs  # noqa: E402
from utils.prompts import read_prompts, video_seed  # noqa: E402
from utils.shards import Made, Shards, ShardWriter  # noqa: E402
from utils.text_cache import TextCache, TextEncoderFiles, fill_text_cache  # noqa: E402
from utils.wan_wrapper import WanTextEncoder, WanVAEWrapper, latent_shape  # noqa: E402
from wan.configs import (  # noqa: E402
    TEXT_ENCODER_FILES,
    TOKENIZER_FOLDERS,
    WanConfig,
    find_model_file,
    find_model_folder,
)
from world.captions import captions  # noqa: E402
from world.puppet import sample_scenes  # noqa: E402


@plain_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    config = load_config(args.config_path, args.overrides)
    if not config.denoising_step_list:
        raise ConfigError(
            f"{args.config_path}: denoising_step_list is not set, so no times to keep; set e.g. [1000, 750, 500, 250]"
        )
    folder = Path(args.output or (config.data.kind == "ode_pairs" and config.data.path) or "")
    if folder == Path():
        raise ConfigError("where to? give --output, or a config with data.kind: ode_pairs and data.path")
    about = trajectories_about(config, causal=args.causal_teacher)
    grid_places(about["timesteps"], args.steps, config.timestep_shift)  # refused before anything is loaded
    teacher_config = dataclasses.replace(
        config,
        model_name=config.distillation.real_name or config.model_name,
        generator_ckpt=config.distillation.real_ckpt,
        causal=args.causal_teacher,
        denoising_step_list=None,
    )
    ranks = init_distributed(config.device)
    logging.basicConfig(level=logging.INFO if ranks.is_main else logging.WARNING, format="%(message)s")
    try:
        about |= describe(args, teacher_config)
        writer = ShardWriter(folder, about, ranks, args.pairs_per_shard)
        pairs = list_pairs(args, config)
        if writer.missing(pairs):
            writer.fill(list(pairs), make_pairs(args, teacher_config, about["timesteps"], pairs, ranks))
        if ranks.is_main:
            items = Shards(folder, ODEPairs.kind).items
            size = sum(shard.stat().st_size for shard in {item.shard for item in items})
            print(f"{len(items)} pairs in {folder}, {size / 1e9:.3g} GB")
    finally:
        shutdown()
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", required=True, help="the student's config")
    words = parser.add_mutually_exclusive_group(required=True)
    words.add_argument("--prompts", type=Path, help="text file, one prompt per line")
    words.add_argument("--puppet_captions", type=int, metavar="N", help="captions of N puppet scenes instead")
    parser.add_argument("--output", type=Path, help="folder of the pairs (default: the config's data.path)")
    parser.add_argument("--samples_per_prompt", type=int, default=1)
    parser.add_argument("--causal_teacher", action="store_true", help="the teacher goes block by block, as the student")
    parser.add_argument("--steps", type=int, default=48, help="Euler steps of the teacher (default 48)")
    parser.add_argument(
        "--guidance_scale",
        type=float,
        help="w in uncond + w (cond - uncond) (default: the config's distillation.real_guidance_scale)",
    )
    parser.add_argument("--batch_size", type=int, default=1, help="pairs made at a time on a GPU")
    parser.add_argument(
        "--pairs_per_shard",
        type=int,
        help="at most so many are lost to a kill (default: 16, or a batch if it is larger)",
    )
    parser.add_argument("--float32", action="store_true", help="keep the states in float32 (default: bfloat16)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, e.g. distillation.real_name=...")
    args = parser.parse_intermixed_args(argv)
    if args.pairs_per_shard is None:
        args.pairs_per_shard = max(16, args.batch_size)
    for name in ("samples_per_prompt", "batch_size", "pairs_per_shard"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; it is at least 1")
    if args.batch_size > args.pairs_per_shard:
        parser.error(
            f"--batch_size {args.batch_size} is more than --pairs_per_shard {args.pairs_per_shard}, and a batch lies "
            "in one shard; lower the one or raise the other"
        )
    return args


def describe(args: argparse.Namespace, teacher: Config) -> dict[str, Any]:
    """What else decides a trajectory: pairs that differ in it do not share a folder."""
    folder = find_model_folder(teacher.model_name)
    weights = [teacher.generator_ckpt] if teacher.generator_ckpt else sorted(folder.glob("diffusion_pytorch_model*"))
    return {
        "teacher": fingerprint(*weights),
        "text_encoder": fingerprint(find_model_file(folder, TEXT_ENCODER_FILES)),
        "num_frames": teacher.num_training_frames,
        "steps": args.steps,
        "guidance_scale": guidance(args, teacher),
        "negative_prompt": teacher.negative_prompt,
        "context_noise": teacher.context_noise if args.causal_teacher else 0.0,
        "window": dataclasses.asdict(teacher.model_kwargs) if args.causal_teacher else None,
        "dtype": "float32" if args.float32 else "bfloat16",
        "seed": teacher.seed,
    }


def guidance(args: argparse.Namespace, config: Config) -> float:
    return config.distillation.real_guidance_scale if args.guidance_scale is None else args.guidance_scale


def list_pairs(args: argparse.Namespace, config: Config) -> dict[str, tuple[str, int]]:
    """Key -> prompt and seed. A pair is known by its words and its number: the order of the prompts does not matter."""
    if args.prompts:
        prompts = [prompt.text for prompt in read_prompts(args.prompts)]
    else:
        prompts = captions(sample_scenes(args.puppet_captions, config.seed), config.seed, full=True)
    pairs = {}
    for prompt, sample in itertools.product(prompts, range(args.samples_per_prompt)):
        key = f"{hashlib.sha256(prompt.encode()).hexdigest()[:16]}-{sample:04d}"
        pairs[key] = prompt, video_seed(config.seed, prompt, sample)
    return pairs


def make_pairs(
    args: argparse.Namespace,
    config: Config,
    timesteps: list[float],
    pairs: dict[str, tuple[str, int]],
    ranks: Ranks,
) -> Callable[[list[str]], Iterator[Made]]:
    """The teacher, loaded; keys -> rows and trajectories."""
    teacher = build_generator(config, ranks.device, resolve_dtype(config.dtype, ranks.device))
    vae = WanVAEWrapper(config.data.vae_folder or config.model_name)  # for its stride
    shape = (config.num_training_frames, *latent_shape(teacher, vae, config.height, config.width))
    embed = make_embed(config, [config.negative_prompt, *(prompt for prompt, _ in pairs.values())], ranks)
    scale = guidance(args, config)

    def make(keys: list[str]) -> Iterator[Made]:
        for start in range(0, len(keys), args.batch_size):
            chunk = keys[start : start + args.batch_size]
            prompts, seeds = zip(*(pairs[key] for key in chunk), strict=True)
            draw = SampleNoise(seeds, ranks.device)
            negative = None if scale == 1 else Conditioning(embed([config.negative_prompt] * len(prompts)))
            states = ode_trajectory(
                teacher,
                draw((len(seeds), *shape)),
                Conditioning(embed(prompts)),
                negative,
                timesteps=timesteps,
                steps=args.steps,
                guidance_scale=scale,
                num_frame_per_block=config.num_frame_per_block,
                independent_first_frame=config.independent_first_frame,
                context_noise=config.context_noise,
                draw=draw,
            )
            states = states.to(torch.float32 if args.float32 else torch.bfloat16)
            for prompt, seed, trajectory in zip(prompts, seeds, states, strict=True):
                yield {"prompt": prompt, "seed": seed, "num_clips": 1}, {"clip0": trajectory}

    return make


def make_embed(config: Config, prompts: Sequence[str], ranks: Ranks) -> Callable[[Sequence[str]], Tensor]:
    """Prompts -> [B, T, text_dim]: from data.text_cache, or by the teacher's own encoder."""
    if not config.data.text_cache:
        return WanTextEncoder(config.model_name, device=ranks.device)
    folder = find_model_folder(config.model_name)
    weights, tokenizer = (find_model_file(folder, names) for names in (TEXT_ENCODER_FILES, TOKENIZER_FOLDERS))
    encoder = TextEncoderFiles(weights, tokenizer, WanConfig.from_folder(folder).text_len)
    fill_text_cache(config.data.text_cache, prompts, encoder, ranks)
    cache = TextCache(config.data.text_cache, encoder.text_len, ranks.device)
    return lambda words: cache(words).prompt_embeds


if __name__ == "__main__":
    sys.exit(main())
