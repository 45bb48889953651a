"""Frames per second and memory of a stream, with random weights of any known model's sizes. Speed does not depend on
weights.

    python benchmarks/stream.py --model Wan2.1-T2V-1.3B --height 480 --width 832 --json
    benchmarks/results/stream_1.3b.json

Weights go through disk and the ordinary loading path, so the load times are real; prompt embeddings are random (umT5 is
left out: it has left the GPU by the time a stream runs). Times are wall-clock around synchronised work, after one
warm-up video.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import torch

from pipeline import CausalDiffusionInferencePipeline
from utils.wan_wrapper import WanDiffusionWrapper, WanVAEWrapper
from wan.configs import WAN_CONFIGS
from wan.modules.model import WanModel
from wan.modules.vae import WanVAE
from wan.modules.weights import save_safetensors


def make_random_folder(model_name: str, folder: Path) -> None:
    """A model folder in the published layout with random bf16 weights: transformer and VAE."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = WanModel(WAN_CONFIGS[model_name])
        torch.nn.init.normal_(model.head.head.weight, std=0.02)  # zero by default: nothing would move
        vae = WanVAE()
    model.save_pretrained(folder, torch.bfloat16)
    save_safetensors(vae.state_dict(), folder / "Wan2.1_VAE.safetensors", torch.bfloat16)


def synchronized(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(blocks, device: torch.device) -> tuple[list[float], float]:
    """Seconds of each block, and of all; the clock waits for the device after every block."""
    start = last = synchronized(device)
    seconds = []
    for _ in blocks:
        now = synchronized(device)
        seconds.append(now - last)
        last = now
    return seconds, last - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Wan2.1-T2V-1.3B", choices=WAN_CONFIGS)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--num_frames", type=int, default=21, help="latent frames")
    parser.add_argument("--steps", type=float, nargs="+", default=[1000, 750, 500, 250])
    parser.add_argument("--window", type=int, default=-1, help="local_attn_size in latent frames; -1: all")
    parser.add_argument("--sink", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device, config = torch.device(arguments.device), WAN_CONFIGS[arguments.model]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    with tempfile.TemporaryDirectory() as folder:
        make_random_folder(arguments.model, Path(folder))
        start = synchronized(device)
        generator = WanDiffusionWrapper(
            folder,
            is_causal=True,
            local_attn_size=arguments.window,
            sink_size=arguments.sink,
            device=device,
            dtype=dtype,
        )
        vae = WanVAEWrapper(folder, device=device, dtype=dtype)
        load_seconds = synchronized(device) - start

    embeds = torch.randn(1, config.text_len, config.text_dim, device=device, dtype=dtype)
    pipeline = CausalDiffusionInferencePipeline(
        generator.requires_grad_(False),
        lambda prompts: embeds.expand(len(prompts), -1, -1),
        vae,
        denoising_step_list=arguments.steps,
    )
    options = {
        "text_prompts": ["random"],
        "seeds": [0],
        "num_frames": arguments.num_frames,
        "height": arguments.height,
        "width": arguments.width,
    }
    first_video, _ = timed(pipeline.stream(**options), device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.no_grad():
        transformer_blocks, transformer_seconds = timed(pipeline._walk(None, **options), device)
    stream_blocks, stream_seconds = timed(pipeline.stream(**options), device)
    pixel_frames = 1 + vae.model.temporal_stride * (arguments.num_frames - 1)
    result = {
        "model": arguments.model,
        "height": arguments.height,
        "width": arguments.width,
        "latent_frames": arguments.num_frames,
        "pixel_frames": pixel_frames,
        "passes_per_block": len(arguments.steps) + 1,
        "window": arguments.window,
        "dtype": str(dtype).removeprefix("torch."),
        "load_seconds": round(load_seconds, 2),
        "fps_transformer": round(pixel_frames / transformer_seconds, 2),
        "fps_with_vae": round(pixel_frames / stream_seconds, 2),
        "seconds_to_first_frames_cold": round(first_video[0], 3),
        "seconds_to_first_frames": round(stream_blocks[0], 3),
        "transformer_block_seconds": [round(s, 4) for s in transformer_blocks],
        "stream_block_seconds": [round(s, 4) for s in stream_blocks],
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
    }
    if device.type == "cuda":
        result["peak_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
        result["weights_gb"] = round(sum(p.numel() * p.element_size() for p in generator.parameters()) / 1e9, 2)
        result["kv_cache_gb"] = round(pipeline.kv_cache_pos.num_bytes / 1e9, 2)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
