"""Train the puppet world's judges on renders and on what a VAE makes of them.

    python scripts/train_judges.py --vae_folder wan_models/puppet-tiny --out world/weights --seconds 160

`python -m world.train_judges` is the same without a VAE. Run again with more seconds, it goes on from its last state.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from wan.configs import VAE_FILES, find_model_file
from wan.modules.vae import load_vae
from world.train_judges import train, validate


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae_folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for judges.safetensors and the training state")
    parser.add_argument("--seconds", type=float, default=160.0, help="training time in all, resumed runs included")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clips", type=int, default=32, help="clips per step; a quarter of them goes through the VAE")
    parser.add_argument("--stills", type=int, default=256)
    parser.add_argument("--num_validation_clips", type=int, default=256)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    on_gpu = args.device.startswith("cuda")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    vae = load_vae(find_model_file(args.vae_folder, VAE_FILES), device=args.device, dtype=dtype)

    def round_trip(video: Tensor) -> Tensor:
        latents = vae.encode(video.transpose(1, 2).to(dtype))
        return vae.decode(latents).transpose(1, 2).float().clamp(-1, 1)

    options = {
        "seconds": args.seconds,
        "device": args.device,
        "amp": on_gpu,
        "clips": args.clips,
        "stills": args.stills,
    }
    judges = train(args.out, round_trip=round_trip, **options)
    for name, value in validate(judges, num_clips=args.num_validation_clips, device=args.device).items():
        print(f"{name:>16} {value:.4f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
