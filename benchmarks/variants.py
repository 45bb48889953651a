"""Ways to make one preset fast, measured one after the other in one process: a line as soon as one is done.

    python benchmarks/variants.py --preset exact --random_weights --seconds 270 --json variants.json
    python benchmarks/variants.py --preset exact --random_weights --variants off max max+fp8 window+max+fp8+tiny

A variant is words joined by +, each of which stands for settings:

    off default max         compile; off: as launched, nothing fused
    fp8                     linear_dtype=float8
    int8 fastest            attention_backend; fastest is measured for the first variant's window that has the word
    tiny                    vae_decoder=tiny
    plainvae                the VAE as launched, whatever the rest is
    overlap  vae2           decode beside denoising, on the same GPU or on the second one
    window                  window 12 with sink 3
    turbo                   two steps, no clean pass, window 9 with sink 3
    float32                 its error only, which takes minutes: how far bfloat16 itself is from exact

Networks are loaded and compiled once and shared. The figures are those of benchmarks/realtime.py. The error is that of
latents and pixels against the same walk (steps, window) as launched in the preset's dtype with the full VAE, from the
same noise: what speed costs, and nothing else. Peak memory holds the clip's pixels, which are kept to be compared. A
variant that fails is told and left out; when `--seconds` are over, no other one begins. The JSON is written anew after
every variant, so that a run which is cut off leaves what it has.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from benchmarks.realtime import (
    PRESETS,
    Stand,
    describe_config,
    errors,
    make_random_folder,
    peak_bytes,
)
from benchmarks.stream_report import describe_machine, look_up, markdown
from pipeline.build import accelerate, assemble_pipeline, build_generator, build_vae, record_passes
from utils.config import Config, load_config
from utils.distributed import resolve_device, resolve_dtype
from utils.wan_wrapper import WanDiffusionWrapper, WanTextEncoder, WanVAEWrapper

WORDS = {
    **{word: [f"compile={word}"] for word in ("off", "default", "max")},
    "fp8": ["linear_dtype=float8"],
    "int8": ["attention_backend=int8"],
    "fastest": ["attention_backend=fastest"],
    "tiny": ["vae_decoder=tiny"],
    "plainvae": [],
    "overlap": ["vae_overlap=true"],
    "vae2": ["vae_device=cuda:1"],
    "window": ["model_kwargs.local_attn_size=12", "model_kwargs.sink_size=3"],
    "turbo": [
        "denoising_step_list=[1000,500]",
        "clean_context=false",
        "model_kwargs.local_attn_size=9",
        "model_kwargs.sink_size=3",
    ],
    "float32": ["dtype=float32", "vae_dtype=float32"],
}
VARIANTS = [
    *("off", "default", "max", "max+fp8", "max+tiny", "max+overlap"),
    *("window+max", "window+max+fp8+tiny", "turbo+max+fp8+tiny"),
    *("max+int8", "window+max+fp8+int8+tiny", "turbo+max+fp8+int8+tiny"),
]
LINE = {
    "transformer": ("fps_transformer", "{:.1f}"),
    "with VAE": ("fps_with_vae", "{:.1f}"),
    "client": ("fps_client", "{:.1f} frames/s"),
    "last block": ("last_block_s", "{:.3f} s"),
    "steady with VAE": ("steady_fps_with_vae", "{:.1f} frames/s"),
    "first frame": ("first_frame_s", "{:.2f} s"),
    "cold": ("cold_first_frame_s", "{:.1f} s"),
    "full speed": ("cold_full_speed_s", "{:.1f} s"),
    "peak": ("peak_gb", "{:.1f} GB"),
    "error of latents": ("error.latents_relative", "{:.1e}"),
    "of pixels": ("error.pixels_psnr_db", "{:.1f} dB"),
}


def settings_of(variant: str) -> list[str]:
    """key=value settings of a variant's words."""
    unknown = [word for word in variant.split("+") if word not in WORDS]
    if unknown:
        raise SystemExit(f"variant {variant!r}: no word {unknown[0]!r}; there are {', '.join(WORDS)}")
    return [setting for word in variant.split("+") for setting in WORDS[word]]


class Parts:
    """The networks of all variants, each loaded and compiled once."""

    def __init__(self, device: torch.device, random_weights: bool):
        self.device, self.random_weights = device, random_weights
        self.generators: dict[tuple, WanDiffusionWrapper] = {}
        self.vaes: dict[tuple, WanVAEWrapper] = {}
        self.text_encoder: WanTextEncoder | None = None

    def pipeline(self, config: Config, plain_vae: bool = False):
        generator, window = self.generator(config), config.model_kwargs
        generator.model.local_attn_size, generator.model.sink_size = window.local_attn_size, window.sink_size
        pipeline = assemble_pipeline(config, generator, self.encoder(generator), self.vae(config, plain_vae))
        record_passes(pipeline, config)
        return pipeline

    def generator(self, config: Config) -> WanDiffusionWrapper:
        key = (config.dtype, config.linear_dtype, config.compiles, config.attention_backend)
        if key not in self.generators:
            generator = build_generator(config, self.device, resolve_dtype(config.dtype, self.device))
            accelerate(generator, config)
            self.generators[key] = generator
        return self.generators[key]

    def vae(self, config: Config, plain: bool) -> WanVAEWrapper:
        config = replace(config, compile="off") if plain else config
        key = (config.dtype, config.vae_dtype, config.vae_decoder, config.vae_device, config.compiles)
        if key not in self.vaes:
            self.vaes[key] = build_vae(config, self.device)
        return self.vaes[key]

    def encoder(self, generator: WanDiffusionWrapper) -> Callable[[Sequence[str]], Tensor]:
        dtype, sizes = generator.model.dtype, generator.model.config
        if self.random_weights:
            noise = torch.randn(1, sizes.text_len, sizes.text_dim, generator=torch.Generator().manual_seed(0))
            return lambda prompts: noise.to(self.device, dtype).expand(len(prompts), -1, -1)
        if self.text_encoder is None:
            raise ValueError("the text encoder is loaded with the preset; call load_text first")
        return self.text_encoder

    def load_text(self, config: Config) -> None:
        dtype = resolve_dtype(config.dtype, self.device)
        self.text_encoder = WanTextEncoder(config.model_name, device=self.device, dtype=dtype)


class Variants:
    """Measures variants of one preset and keeps what they are compared with."""

    def __init__(
        self, path: Path | str, overrides: Sequence[str], parts: Parts, steady_blocks: int, folder: str | None
    ):
        self.path, self.overrides, self.parts, self.steady_blocks = path, list(overrides), parts, steady_blocks
        self.folder = folder
        self.references: dict[tuple, tuple[Tensor, Tensor]] = {}  # latents and pixels of a walk as launched

    def config(self, variant: str) -> Config:
        config = load_config(self.path, [*self.overrides, *settings_of(variant)])
        return config if self.folder is None else replace(config, model_name=self.folder, generator_ckpt=None)

    def reference(self, config: Config) -> tuple[Tensor, Tensor]:
        window, steps = config.model_kwargs, tuple(config.denoising_step_list or ())
        key = (window.local_attn_size, window.sink_size, steps, config.clean_context)
        if key not in self.references:
            base = self.config("off")
            plain = {"dtype": base.dtype, "vae_dtype": base.vae_dtype, "vae_decoder": "full", "vae_device": "auto"}
            plain |= {"compile": "off", "linear_dtype": "auto", "attention_backend": "auto", "vae_overlap": False}
            self.references[key] = self.video(self.stand(replace(config, **plain)))
        return self.references[key]

    def stand(self, config: Config, plain_vae: bool = False) -> Stand:
        ends = config.model_kwargs.local_attn_size == -1  # no window, no steady state
        return Stand(self.parts.pipeline(config, plain_vae), config, 0 if ends else self.steady_blocks)

    def video(self, stand: Stand) -> tuple[Tensor, Tensor]:
        """Latents and pixels in main memory."""
        options = stand.options(stand.config.num_output_frames)
        pixels, latents = stand.pipeline.inference(**options, return_latents=True)
        return latents.cpu(), pixels.cpu()

    def measure(self, variant: str) -> dict:
        config, device = self.config(variant), self.parts.device
        reference, result = self.reference(config), {}
        stand = self.stand(config, "plainvae" in variant.split("+"))
        if "float32" in variant.split("+"):
            latents, pixels = self.video(stand)
        else:
            cold = stand.warm_up()
            result |= {name: seconds for name, seconds in cold.items() if name.startswith("cold")}
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            blocks: list[tuple[Tensor, Tensor]] = []
            result |= stand.measure(blocks) | {"peak_gb": peak_bytes(device) / 1e9}
            result["kv_cache_gb"] = stand.pipeline.kv_cache_pos.num_bytes / 1e9
            result["attention"] = stand.pipeline.generator.model.attention_backend
            latents, pixels = (torch.cat(parts, dim=1).cpu() for parts in zip(*blocks, strict=True))
        result["error"] = errors(latents, pixels, *reference)
        return {"settings": {"variant": variant, **describe_config(config)}, **result}


def line(variant: str, result: dict, seconds: float) -> str:
    cells = [
        f"{title} {form.format(look_up(result, path))}"
        for title, (path, form) in LINE.items()
        if look_up(result, path) is not None
    ]
    return f"{variant}: {', '.join(cells)} [{seconds:.0f} s]"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="exact", help="of configs/presets/, or the path of another config")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, metavar="WORD+WORD", help=" ".join(VARIANTS))
    parser.add_argument("--random_weights", action="store_true", help="of the model's sizes; nothing need be on disk")
    parser.add_argument(
        "--steady_blocks", type=int, default=0, help="blocks after the clip, for steady figures of windows"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no variant begins after so many")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--json", type=Path, help="write {variant: figures} here, anew after every variant")
    parser.add_argument("--settings", nargs="*", default=[], metavar="key=value", help="settings over the preset's")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    began = time.perf_counter()
    logging.basicConfig(format="%(message)s", level=logging.INFO)  # what attention was measured to be, for one
    arguments = parse_arguments(argv)
    for variant in arguments.variants:
        settings_of(variant)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    path = PRESETS / f"{arguments.preset}.yaml"
    path = path if path.is_file() else arguments.preset
    config = load_config(path, arguments.settings)
    device = resolve_device(config.device)
    torch.backends.cudnn.benchmark = True  # cuDNN keeps the first plan that it made for a shape, references' too
    parts = Parts(device, arguments.random_weights)
    results, failures = {}, []
    print(", ".join(f"{key} {value}" for key, value in describe_machine(device).items()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.random_weights:
            make_random_folder(config.model_name, Path(folder), device)
        else:
            parts.load_text(config)
        print(f"weights are there [{time.perf_counter() - began:.0f} s]", flush=True)
        source = folder if arguments.random_weights else None
        variants = Variants(path, arguments.settings, parts, arguments.steady_blocks, source)
        for variant in arguments.variants:
            start = time.perf_counter()
            if start - began > arguments.seconds:
                print(f"{variant}: left out, the time is over", flush=True)
                continue
            try:
                results[variant] = variants.measure(variant) | {
                    "machine": describe_machine(device)
                }  # clocks: as it ran
            except Exception:  # the others are still worth the GPU's time; the whole story is told
                failures.append(variant)
                print(f"{variant}: failed\n{traceback.format_exc()}", flush=True)
                continue
            print(line(variant, results[variant], time.perf_counter() - start), flush=True)
            if arguments.json:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if results:
        print(markdown(results), flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
