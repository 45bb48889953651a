"""The four figures of a stream, with their spread, their error and what they were measured on.

    python benchmarks/realtime.py --preset embedded --threads 2 --repeats 3 --json out.json
    python benchmarks/realtime.py --preset embedded vae_decoder=tiny
    python benchmarks/realtime.py --preset window --random_weights --steady_blocks 20 --json window.json

A preset is a file of configs/presets/; key=value overrides it: compile=max, linear_dtype=float8, vae_overlap=true.
benchmarks/variants.py measures several of these in one process. Wall-clock around synchronised work, after one video
that warms up; of several repeats the fastest counts, and all are in the JSON.

- transformer: denoising and remembering, no decoding
- with VAE: pixels in the device's memory
- client: JPEG pictures in another thread's hands, counted from the request to the last picture
- CPU seconds: of all threads, for a block with VAE; on a machine that others use, the figure that they disturb least
- first frame: from the request to the first such picture, warm; cold: in a process that has made none, weights loaded
- process: from its start, imports and loading included; give --weights_folder, and what is there is not made first

The error is that of latents and pixels against the eager float32 model with the full VAE, from the same noise.
Speed does not depend on weights: --random_weights needs none on disk and leaves the text encoder out.
"""

import argparse
import json
import logging
import os
import queue
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from benchmarks.stream_report import describe_machine, markdown, percentiles
from demo import jpeg_html
from pipeline.build import accelerate, assemble_pipeline, build_generator, build_pipeline, build_vae, record_passes
from utils.config import ROOT, Config, load_config
from utils.distributed import resolve_device, resolve_dtype
from utils.flops import pass_flops
from utils.video import to_uint8
from wan.configs import WAN_CONFIGS
from wan.modules.model import WanModel
from wan.modules.tiny_vae import TinyVAE
from wan.modules.vae import WanVAE
from wan.modules.weights import save_safetensors

PRESETS = ROOT / "configs" / "presets"
PROMPT = "a red puppet waves before a mint wall"


def make_random_folder(model_name: str, folder: Path, device: torch.device) -> None:
    """A model folder in the published layout with random bf16 weights: transformer, VAE and tiny VAE."""
    torch.manual_seed(0)
    with torch.device(device):
        model = WanModel(WAN_CONFIGS[model_name])
        torch.nn.init.normal_(model.head.head.weight, std=0.02)  # zero by default: nothing would move
        model.save_pretrained(folder, torch.bfloat16)
        save_safetensors(WanVAE().state_dict(), folder / "Wan2.1_VAE.safetensors", torch.bfloat16)
        save_safetensors(TinyVAE().state_dict(), folder / "taew2_1.safetensors", torch.bfloat16)


@contextmanager
def model_folder(
    config: Config, random_weights: bool, device: torch.device, kept: Path | None = None
) -> Iterator[Config]:
    """The config, pointing to a folder of random weights if wanted; kept: where they stay, or are already."""
    if not random_weights:
        yield config
        return
    with tempfile.TemporaryDirectory() as passing:
        folder = kept or Path(passing)
        if not (folder / "taew2_1.safetensors").is_file():  # the last to be written
            make_random_folder(config.model_name, folder, device)
        yield replace(config, model_name=str(folder), generator_ckpt=None, use_ema=False)


def process_seconds() -> float | None:
    """Since this process began, imports included; None where the system does not tell."""
    stat, uptime = Path("/proc/self/stat"), Path("/proc/uptime")
    if not (stat.is_file() and uptime.is_file()):
        return None
    began = int(stat.read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return float(uptime.read_text().split()[0]) - began


def load(config: Config, device: torch.device, random_weights: bool):
    """The pipeline; with random weights its text encoder is a random embedding."""
    if not random_weights:
        return build_pipeline(config, device)
    dtype = resolve_dtype(config.dtype, device)
    generator = build_generator(config, device, dtype)
    sizes = generator.model.config
    noise = torch.randn(1, sizes.text_len, sizes.text_dim, generator=torch.Generator().manual_seed(0))
    embeds = noise.to(device, dtype)

    def encode(prompts: Sequence[str]) -> Tensor:
        return embeds.expand(len(prompts), -1, -1)

    pipeline = assemble_pipeline(config, generator, encode, build_vae(config, device))
    accelerate(generator, config)
    record_passes(pipeline, config)
    return pipeline


def now(device: torch.device) -> float:
    """When the device has done what was asked for on the current stream; another may be denoising the next block."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return time.perf_counter()


class Timed(NamedTuple):
    """Of each block: wall-clock and CPU seconds, and bytes in use after it."""

    seconds: list[float]
    cpu_seconds: list[float]
    bytes: list[int]


def timed(blocks: Iterator, device: torch.device) -> Timed:
    """The clock waits for the device after every block, for the one that decodes where there are pixels."""
    last, last_cpu, figures = now(device), time.process_time(), Timed([], [], [])
    for block in blocks:
        moment = now(block.device if isinstance(block, Tensor) else device)
        cpu = time.process_time()
        figures.seconds.append(moment - last)
        figures.cpu_seconds.append(cpu - last_cpu)
        figures.bytes.append(bytes_in_use(device))
        last, last_cpu = moment, cpu
    return figures


def bytes_in_use(device: torch.device) -> int:
    """Tensors on the GPU, else the process in main memory (0 where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.is_file() else 0


def client(stream: Iterator[Tensor]) -> list[float]:
    """Seconds from the request until each picture is a JPEG in another thread, which reads while the stream goes on."""
    frames: queue.Queue = queue.Queue()
    arrivals: list[float] = []

    def read() -> None:
        while (frame := frames.get()) is not None:
            jpeg_html(frame)
            arrivals.append(time.perf_counter() - asked)

    reader = threading.Thread(target=read)
    asked = time.perf_counter()
    reader.start()
    for pixels in stream:
        for frame in to_uint8(pixels[0]):
            frames.put(frame)
    frames.put(None)
    reader.join()
    return arrivals


def peak_bytes(device: torch.device) -> int:
    """The most memory that was in use: on the GPU since the warm-up, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Stand:
    """One pipeline under measurement."""

    def __init__(self, pipeline, config: Config, steady_blocks: int):
        self.pipeline, self.config, self.device = pipeline, config, pipeline.device
        self.block = config.num_frame_per_block
        self.clip_blocks = config.num_output_frames // self.block
        self.num_frames = config.num_output_frames + steady_blocks * self.block
        self.stride = pipeline.vae.decoder.temporal_stride

    def options(self, num_frames: int | None = None) -> dict:
        sizes = {"height": self.config.height, "width": self.config.width}
        return {"text_prompts": [PROMPT], "seeds": [0], "num_frames": num_frames or self.num_frames, **sizes}

    @torch.no_grad()
    def warm_up(self) -> dict:
        """A first clip, and a walk more: what comes for the second time is recorded (compile=max)."""
        process, asked = process_seconds(), now(self.device)
        arrivals = client(self.pipeline.stream(**self.options_of_client))
        for _ in self.pipeline._walk(None, **self.options()):
            pass
        seconds = {"cold_first_frame_s": arrivals[0], "cold_full_speed_s": now(self.device) - asked}
        if process is not None:
            seconds |= {name.replace("cold", "process"): process + value for name, value in seconds.items()}
        return seconds

    @property
    def options_of_client(self) -> dict:
        return self.options(self.config.num_output_frames) | {"first_frame_alone": True}

    def pixel_frames(self, blocks: int, *, first: bool) -> int:
        return self.stride * self.block * blocks - (self.stride - 1) * first

    @torch.no_grad()
    def clip(self, kept: list[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        """Pixels of the clip as `stream` yields them to a client; latents and pixels are kept."""
        for latents, pixels in self.pipeline._decoded(None, **self.options_of_client):
            kept.append((latents, pixels))
            yield pixels

    @torch.no_grad()
    def measure(self, kept: list[tuple[Tensor, Tensor]] | None = None) -> dict:
        """One round of the four figures. kept: filled with latents and pixels of the blocks that a client saw."""
        transformer = timed(self.pipeline._walk(None, **self.options()), self.device).seconds
        stream = timed(self.pipeline.stream(**self.options()), self.device)
        with_vae = stream.seconds
        arrivals = client(self.pipeline.stream(**self.options_of_client) if kept is None else self.clip(kept))
        clip = self.clip_blocks
        figures = {
            "fps_transformer": self.pixel_frames(clip, first=True) / sum(transformer[:clip]),
            "fps_with_vae": self.pixel_frames(clip, first=True) / sum(with_vae[:clip]),
            "fps_client": len(arrivals) / arrivals[-1],
            "first_frame_s": arrivals[0],
            "cpu_s_per_block": sum(stream.cpu_seconds) / len(with_vae),
            "block_transformer_s": percentiles(transformer[1:]),
            "last_block_s": transformer[clip - 1],
            "block_with_vae_s": percentiles(with_vae[1:]),
        }
        steady = len(with_vae) - clip
        if steady:
            frames = self.pixel_frames(steady, first=False)
            figures["steady_fps_transformer"] = frames / sum(transformer[clip:])
            figures["steady_fps_with_vae"] = frames / sum(with_vae[clip:])
            figures["steady_block_with_vae_s"] = percentiles(with_vae[clip:])
            figures["steady_tenths"] = tenths(stream, clip)
        return figures

    def flops(self) -> dict:
        """Work of one late block: matrix products of the transformer, convolutions of the VAE."""
        config, pipeline = self.config, self.pipeline
        sizes = pipeline.generator.model.config
        side = pipeline.vae.decoder.spatial_stride
        tokens = sizes.tokens_per_frame(config.height // side, config.width // side)
        window = config.model_kwargs.local_attn_size
        seen = config.num_output_frames if window == -1 else min(window, config.num_output_frames)
        work, remembering = (
            pass_flops(sizes, self.block * tokens, seen * tokens, text_keys=False, keys_only=keys_only)
            for keys_only in (False, True)
        )
        steps = len(pipeline.timesteps) if pipeline.timesteps else pipeline.sampling_steps
        guided = pipeline.timesteps is None and pipeline.guidance_scale != 1
        transformer = (1 + guided) * (steps * work + config.clean_context * remembering)
        latents = torch.zeros(1, self.block, sizes.out_dim, config.height // side, config.width // side)
        latents, decode = pipeline.vae._to_model(latents), pipeline.vae.decoder.decode  # not compiled: it is to be seen
        cache = pipeline.vae.make_cache()
        decode(latents, cache)
        with FlopCounterMode(display=False) as counter:
            decode(latents, cache)
        return {
            "passes": (1 + guided) * (steps + config.clean_context),
            "transformer_block": transformer,
            "vae_block": float(counter.get_total_flops()),
        }


def reference_error(config: Config, stand: Stand, random_weights: bool) -> dict:
    """Latents and pixels of the measured pipeline against eager float32 with the full VAE, from the same noise."""
    plain = {"dtype": "float32", "vae_dtype": "auto", "vae_decoder": "full"}
    exact = replace(config, **plain, attention_backend="sdpa", compile="off", linear_dtype="auto")
    options = stand.options(config.num_output_frames)
    pixels, latents = stand.pipeline.inference(**options, return_latents=True)
    reference = load(exact, stand.device, random_weights)
    true_pixels, true_latents = reference.inference(**options, return_latents=True)
    return errors(latents, pixels.to(true_pixels.device), true_latents, true_pixels)


def errors(latents: Tensor, pixels: Tensor, true_latents: Tensor, true_pixels: Tensor) -> dict:
    """How far a video is from another."""
    error, pixel_error = latents - true_latents, (pixels - true_pixels).square().mean()
    return {
        "latents_relative": float(error.norm() / true_latents.norm()),
        "latents_largest": float(error.abs().max()),
        "pixels_psnr_db": float(-10 * torch.log10(pixel_error)) if pixel_error else None,  # None: equal
    }


def tenths(stream: Timed, start: int) -> list[dict]:
    """Median block time, mean CPU seconds and memory of each tenth of the blocks from `start` on."""
    bounds = [start + (len(stream.seconds) - start) * i // 10 for i in range(11)]
    return [
        {
            "p50": percentiles(stream.seconds[first:last])["p50"],
            "cpu_s": sum(stream.cpu_seconds[first:last]) / (last - first),
            "gb": max(stream.bytes[first:last]) / 1e9,
        }
        for first, last in pairwise(bounds)
        if last > first
    ]


def best(rounds: Sequence[dict]) -> dict:
    """The fastest round, by frames with VAE."""
    return max(rounds, key=lambda figures: figures["fps_with_vae"])


def run(config: Config, arguments: argparse.Namespace) -> dict:
    device = resolve_device(config.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with model_folder(config, arguments.random_weights, device, arguments.weights_folder) as config:
        start = now(device)
        stand = Stand(load(config, device, arguments.random_weights), config, arguments.steady_blocks)
        loaded = now(device)
        cold = stand.warm_up()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        rounds = [stand.measure() for _ in range(arguments.repeats)]
        result = {
            **best(rounds),
            **cold,
            "load_s": loaded - start,
            "peak_gb": peak_bytes(device) / 1e9,
            "kv_cache_gb": stand.pipeline.kv_cache_pos.num_bytes / 1e9,
            "attention": stand.pipeline.generator.model.attention_backend,
            "flops": stand.flops(),
        }
        if not arguments.no_reference:
            result["error"] = reference_error(config, stand, arguments.random_weights)
    return {**result, "rounds": rounds, "machine": describe_machine(device)}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml")))
    parser.add_argument("--preset", default="embedded", help=f"{known}; or the path of another config")
    parser.add_argument("--random_weights", action="store_true", help="of the model's sizes; nothing need be on disk")
    parser.add_argument("--weights_folder", type=Path, help="random weights stay there, or are there already")
    parser.add_argument("--steady_blocks", type=int, default=0, help="blocks after the clip, for steady figures")
    parser.add_argument("--repeats", type=int, default=1, help="rounds, of which the fastest counts")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--no_reference", action="store_true", help="leave the error out")
    parser.add_argument("--json", type=Path, help="write the figures here; benchmarks/compare.py reads such files")
    parser.add_argument("--markdown", type=Path, help="write the report here")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over those of the preset")
    return parser.parse_intermixed_args(argv)


def describe_config(config: Config) -> dict:
    """The settings that figures depend on."""
    return {
        "model": config.model_name,
        "size": [config.width, config.height],
        "latent_frames": config.num_output_frames,
        "steps": list(config.denoising_step_list or []) or config.sampling_steps,
        "clean_context": config.clean_context,
        "window": config.model_kwargs.local_attn_size,
        "sink": config.model_kwargs.sink_size,
        "vae_decoder": config.vae_decoder,
        "vae_dtype": config.vae_dtype,
        "dtype": str(resolve_dtype(config.dtype, resolve_device(config.device))).removeprefix("torch."),
        "compile": config.compile,
        "linear_dtype": config.linear_dtype,
        "attention_backend": config.attention_backend,
        "vae_overlap": config.vae_overlap,
        "vae_device": config.vae_device,
    }


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    arguments = parse_arguments(argv)
    path = PRESETS / f"{arguments.preset}.yaml"
    config = load_config(path if path.is_file() else arguments.preset, arguments.overrides)
    settings = {
        "preset": arguments.preset,
        "overrides": arguments.overrides,
        "random_weights": arguments.random_weights,
    }
    result = {"settings": settings | describe_config(config), **run(config, arguments)}
    report = markdown({arguments.preset: result})
    print(report)
    for target, text in ((arguments.json, json.dumps(result, indent=1) + "\n"), (arguments.markdown, report)):
        if target:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
