"""Frames per second of streaming VAE decoding.

python benchmarks/vae_decode.py --weights wan_models/puppet-tiny/Wan2.1_VAE.safetensors --height 128 --width 128
python benchmarks/vae_decode.py --device cuda --dtype bfloat16 --height 480 --width 832 --compile --measure
python benchmarks/vae_decode.py --sizes '{"dim": 24, "dim_mult": [1, 2, 4], "temporal_downsample": [true, true],
    "num_res_blocks": 1, "patch_size": 2}' --height 128 --width 128 --threads 2
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from utils.wan_wrapper import measured_convolutions
from wan.modules.vae import WanVAE, channels_last_weights_, load_vae


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--weights", type=Path, help="a VAE file; without it, random weights")
    source.add_argument("--sizes", type=json.loads, default={}, help="JSON of WanVAE's arguments (default: Wan 2.1)")
    parser.add_argument("--height", type=int, default=480, help="pixels")
    parser.add_argument("--width", type=int, default=832, help="pixels")
    parser.add_argument("--latents-per-call", type=int, default=3)
    parser.add_argument("--calls", type=int, default=10, help="timed calls, after three that are not")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the decoder")
    parser.add_argument("--measure", action="store_true", help="let cuDNN try its kernels, as compile=default does")
    return parser.parse_args(argv)


@torch.inference_mode()
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    if args.weights:
        vae = load_vae(args.weights, device, dtype)
    else:
        vae = WanVAE(**args.sizes).to(device, dtype).eval()
        channels_last_weights_(vae)
    decode = torch.compile(vae.decode, fullgraph=True, dynamic=False) if args.compile else vae.decode
    latent_size = (args.height // vae.spatial_stride, args.width // vae.spatial_stride)
    shape = (args.batch_size, len(vae.latents_mean), args.latents_per_call, *latent_size)
    latents = torch.randn(shape, device=device, dtype=dtype)

    def timed_call() -> float:
        start = time.perf_counter()
        with measured_convolutions(args.measure):
            decode(latents, cache)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    cache = vae.make_cache()
    first = timed_call()
    for _ in range(2):
        timed_call()
    seconds = sorted(timed_call() for _ in range(args.calls))
    median, best = seconds[len(seconds) // 2], seconds[0]
    num_frames = args.latents_per_call * vae.temporal_stride
    num_parameters = sum(parameter.numel() for parameter in vae.decoder.parameters())
    cache_bytes = sum(past.nbytes for past in cache.decoder)
    print(
        f"decoder {num_parameters / 1e6:.2f}M parameters, {args.height}x{args.width}, {args.dtype} on {device}, "
        f"{torch.get_num_threads()} CPU threads\n"
        f"{args.latents_per_call} latents a call: {median * 1e3:.1f} ms median, {best * 1e3:.1f} ms best, "
        f"first call {first * 1e3:.1f} ms\n"
        f"{num_frames / median:.1f} frames/s median, {num_frames / best:.1f} best; cache {cache_bytes / 1e6:.1f} MB"
    )
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
