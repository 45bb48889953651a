"""A video made by several GPUs together against the same video on one of them, in one run.

    torchrun --nproc_per_node=2 benchmarks/usp.py --random_weights                    # 1.3B, 832x480, 4 steps
    torchrun --nproc_per_node=4 benchmarks/usp.py --random_weights --out benchmarks/results/usp_4.json
    torchrun --nproc_per_node=2 benchmarks/usp.py --random_weights guidance_parallel=true sequence_parallel=1 \
        denoising_step_list=null guidance_scale=3 sampling_steps=8 --out benchmarks/results/usp_guidance.json

First rank 0 makes the video alone while the others wait, then all make it; each after a video that warms up, of several
repeats the fastest counts, and all are in the JSON. Wall-clock around synchronised work, block by block:

- usp_fps, one_gpu_fps, speedup: frames/s of denoising and remembering, which is what is shared
- usp_fps_with_vae and so on: of pixels in rank 0's memory; each rank decodes a strip
- block_s: latency of a block (of the first one: first_block_s); with_vae: until its pixels are there
- messages_s_per_block: what a block's messages between layers take by themselves, nothing else running
- flow_error, latents_error: against one GPU from the same noise, relative; of one pass, and of the whole video
- flow_to_float32: how far one pass is from float32 weights and numbers, on one GPU and on all: what rounding does
- peak_gb, kv_cache_gb: of rank 0

Without overrides all processes share one video's tokens (sequence_parallel). Speed does not depend on weights.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from benchmarks.realtime import PRESETS, PROMPT, load, make_random_folder, now, peak_bytes, timed
from benchmarks.stream_report import describe_machine, percentiles
from pipeline.build import assemble_pipeline
from pipeline.samplers import SampleNoise
from utils.conditioning import Conditioning
from utils.config import ROOT, Config, load_config
from utils.distributed import Ranks, barrier, broadcast_tensors, init_distributed, shutdown
from utils.errors import plain_errors
from utils.video_ranks import share_videos
from wan.modules.sequence_parallel import Ulysses, check_heads


class Stand:
    """One pipeline under measurement, alone or one of several."""

    def __init__(self, pipeline, config: Config):
        self.pipeline, self.config, self.device = pipeline, config, pipeline.device
        self.options = {"text_prompts": [PROMPT], "seeds": [0], "num_frames": config.num_output_frames}
        self.options |= {"height": config.height, "width": config.width}
        self.num_pictures = 1 + 4 * (config.num_output_frames - 1)

    @torch.no_grad()
    def measure(self, repeats: int) -> dict:
        """Figures of the fastest of several rounds, after one video that warms up."""
        for _ in self.pipeline.stream(**self.options):
            pass
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        walks = [timed(self.pipeline._walk(None, **self.options), self.device).seconds for _ in range(repeats)]
        streams = [timed(self.pipeline.stream(**self.options), self.device).seconds for _ in range(repeats)]
        walk, stream = min(walks, key=sum), min(streams, key=sum)
        return {
            "fps": self.num_pictures / sum(walk),
            "fps_with_vae": self.num_pictures / sum(stream),
            "block_s": percentiles(walk),
            "block_with_vae_s": percentiles(stream),
            "first_block_s": walk[0],
            "first_block_with_vae_s": stream[0],
            "kv_cache_gb": self.pipeline.kv_cache_pos.num_bytes / 1e9,
            "peak_gb": peak_bytes(self.device) / 1e9,
            "seconds_of_blocks": walks,
            "seconds_of_blocks_with_vae": streams,
        }

    @torch.no_grad()
    def latents(self) -> Tensor:
        return torch.cat([latents for latents, _ in self.pipeline._walk(None, **self.options)], dim=1)

    @torch.no_grad()
    def flow(self) -> Tensor:
        """Of the first block's first pass, guided side."""
        pipeline, config, stride = self.pipeline, self.config, self.pipeline.vae.model.spatial_stride
        model = pipeline.generator.model
        size = config.height // stride, config.width // stride
        noise = SampleNoise([0], self.device)((1, config.num_frame_per_block, model.config.out_dim, *size))
        cache = model.make_kv_cache(1, *size, config.num_frame_per_block)
        prompt = Conditioning(pipeline.text_encoder([PROMPT]).to(self.device))
        times = torch.full(noise.shape[:2], 900.0, device=self.device)
        return pipeline.generator(noise, prompt, times, kv_cache=cache)[0]

    def exact_flow(self) -> Tensor:
        """The same in float32."""
        generator, dtype = self.pipeline.generator, self.pipeline.generator.model.dtype
        generator.float()
        flow = self.flow()
        generator.to(dtype)  # as they were: a larger type lost nothing
        return flow


@torch.no_grad()
def messages_seconds(ulysses: Ulysses, stand: Stand) -> float:
    """What the messages of a block between layers take, measured without the work between them."""
    pipeline, config, device = stand.pipeline, stand.config, stand.device
    sizes, stride = pipeline.generator.model.config, pipeline.vae.model.spatial_stride
    frame_seqlen = sizes.tokens_per_frame(config.height // stride, config.width // stride)
    frames = config.num_frame_per_block
    own = frames * ulysses.shares(frame_seqlen)[ulysses.rank]
    q = torch.zeros(1, own, sizes.num_heads, sizes.head_dim, device=device, dtype=pipeline.generator.model.dtype)
    exchange = ulysses.around(lambda layer, q, k, v: v, frames, frame_seqlen)
    passes = pipeline.num_steps + config.clean_context
    if pipeline.timesteps is None and pipeline.guidance_scale != 1 and pipeline.ranks.guidance is None:
        passes *= 2
    exchange(0, q, q, q)
    start = now(device)
    for layer in range(sizes.num_layers):
        exchange(layer, q, q, q)
    return (now(device) - start) * passes


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def load_everywhere(config: Config, ranks: Ranks, random_weights: bool):
    """The same pipeline on every rank, each alone for now; random weights are made once."""
    alone = {"sequence_parallel": 1, "guidance_parallel": False}
    if not random_weights:
        return load(replace(config, **alone), ranks.device, False), config
    with tempfile.TemporaryDirectory() as folder:
        box = [folder]
        if ranks.is_main:
            make_random_folder(config.model_name, Path(folder), ranks.device)
        if ranks.size > 1:
            dist.broadcast_object_list(box, src=0)
        config = replace(config, model_name=box[0], generator_ckpt=None, use_ema=False)
        pipeline = load(replace(config, **alone), ranks.device, True)
        barrier(ranks)  # before the folder goes
    broadcast_tensors(pipeline.generator.parameters(), ranks)
    return pipeline, config


def run(config: Config, ranks: Ranks, arguments: argparse.Namespace) -> dict:
    pipeline, config = load_everywhere(config, ranks, arguments.random_weights)
    check_heads(pipeline.generator.model.config.num_heads, config.sequence_parallel)
    alone, one = Stand(pipeline, config), {}
    if ranks.is_main:
        one = alone.measure(arguments.repeats)
        latents, flow = alone.latents(), alone.flow()
        exact = None if arguments.no_float32 or config.linear_dtype == "float8" else alone.exact_flow()
    barrier(ranks)
    parts = pipeline.generator, pipeline.text_encoder, pipeline.vae
    del alone, pipeline  # and its caches
    together = share_videos(ranks, config.sequence_parallel, config.guidance_parallel)
    stand = Stand(assemble_pipeline(config, *parts, ranks=together), config)
    many = stand.measure(arguments.repeats)
    found_latents, found_flow = stand.latents(), stand.flow()
    ulysses = stand.pipeline.generator.model.sequence_parallel
    messages = None if ulysses is None else messages_seconds(ulysses, stand)
    if not ranks.is_main:
        return {}
    block = config.num_frame_per_block
    return {
        "usp_fps": many["fps"],
        "usp_fps_with_vae": many["fps_with_vae"],
        "one_gpu_fps": one["fps"],
        "one_gpu_fps_with_vae": one["fps_with_vae"],
        "speedup": many["fps"] / one["fps"],
        "speedup_with_vae": many["fps_with_vae"] / one["fps_with_vae"],
        "messages_s_per_block": messages,
        "flow_error": relative(found_flow, flow),
        "flow_to_float32": None if exact is None else [relative(flow, exact), relative(found_flow, exact)],
        "first_block_error": relative(found_latents[:, :block], latents[:, :block]),
        "latents_error": relative(found_latents, latents),
        "latents_largest_error": float((found_latents - latents).abs().max()),
        "usp": many,
        "one_gpu": one,
        "machine": describe_machine(ranks.device),
    }


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml")))
    parser.add_argument("--preset", default="exact", help=f"{known}; or the path of another config")
    parser.add_argument("--random_weights", action="store_true", help="of the model's sizes; nothing need be on disk")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, of which the fastest counts")
    parser.add_argument("--no_float32", action="store_true", help="leave flow_to_float32 out, which needs the memory")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "usp.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over those of the preset")
    return parser.parse_intermixed_args(argv)


def choose_ranks(config: Config, overrides: Sequence[str], num_ranks: int) -> Config:
    """All ranks on one video: where nothing is said, they share its tokens."""
    sides = 2 if config.guidance_parallel else 1
    if not any(override.startswith("sequence_parallel=") for override in overrides):
        config = replace(config, sequence_parallel=max(1, num_ranks // sides))
    if config.sequence_parallel * sides != num_ranks or num_ranks < 2:
        raise ValueError(
            f"{num_ranks} processes came for one video of sequence_parallel {config.sequence_parallel} and {sides} "
            f"rank(s) for guidance; start it under torchrun --nproc_per_node={max(2, config.sequence_parallel * sides)}"
        )
    config.check()
    return config


@plain_errors
def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    path = PRESETS / f"{arguments.preset}.yaml"
    config = load_config(path if path.is_file() else arguments.preset, arguments.overrides)
    ranks = init_distributed(config.device)
    try:
        report(choose_ranks(config, arguments.overrides, ranks.size), ranks, arguments)
    finally:
        shutdown()
    return 0


def report(config: Config, ranks: Ranks, arguments: argparse.Namespace) -> None:
    """Measure; rank 0 writes and prints the figures."""
    settings = {
        "gpus": ranks.size,
        "sequence_parallel": config.sequence_parallel,
        "guidance_parallel": config.guidance_parallel,
        "preset": arguments.preset,
        "overrides": arguments.overrides,
        "random_weights": arguments.random_weights,
        "model": config.model_name,
        "size": [config.width, config.height],
        "latent_frames": config.num_output_frames,
        "steps": list(config.denoising_step_list or []) or config.sampling_steps,
        "window": config.model_kwargs.local_attn_size,
        "dtype": config.dtype,
        "compile": config.compile,
        "vae_decoder": config.vae_decoder,
        "repeats": arguments.repeats,
    }
    result = {"settings": settings, **run(config, ranks, arguments)}
    if ranks.is_main:
        print(json.dumps({key: value for key, value in result.items() if isinstance(value, float | list)}, indent=1))
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
