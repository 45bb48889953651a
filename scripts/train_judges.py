"""Train the puppet world's judges on renders and, given one, on what a VAE makes of them.

    python scripts/train_judges.py --vae_folder wan_models/puppet-tiny --out world/weights --seconds 160

Run again with more seconds, it goes on from its last state.
"""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from utils.distributed import resolve_dtype
from wan.configs import VAE_FILES, find_model_file
from wan.modules.vae import load_vae
from world.train_judges import train, validate


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae_folder", type=Path, help="model folder of the VAE (default: renders only)")
    parser.add_argument("--out", type=Path, required=True, help="folder for judges.safetensors and the training state")
    parser.add_argument("--seconds", type=float, default=160.0, help="training time in all, resumed runs included")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clips", type=int, default=32, help="clips per step; a quarter of them goes through the VAE")
    parser.add_argument("--stills", type=int, default=256)
    parser.add_argument("--num_validation_clips", type=int, default=256)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    judges = train(
        args.out,
        seconds=args.seconds,
        device=args.device,
        clips=args.clips,
        stills=args.stills,
        round_trip=through_vae(args.vae_folder, args.device) if args.vae_folder else None,
    )
    for name, value in validate(judges, num_clips=args.num_validation_clips, device=args.device).items():
        print(f"{name:>16} {value:.4f}")
    return 0


def through_vae(folder: Path, device: str) -> Callable[[Tensor], Tensor]:
    """Videos [B, T, 3, H, W] in [-1, 1] -> the same, encoded and decoded."""
    dtype = resolve_dtype("auto", torch.device(device))
    vae = load_vae(find_model_file(folder, VAE_FILES), device=device, dtype=dtype)

    def round_trip(video: Tensor) -> Tensor:
        latents = vae.encode(video.transpose(1, 2).to(dtype))
        return vae.decode(latents).transpose(1, 2).float().clamp(-1, 1)

    return round_trip


if __name__ == "__main__":
    raise SystemExit(main())
