"""Make a model folder, or one generator file, from a run's newest training state.

python scripts/export_model.py logs/puppet_diffusion wan_models/puppet-tiny
python scripts/export_model.py logs/puppet_diffusion checkpoints/puppet.pt        # keys generator and generator_ema
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from trainer import TRAINERS  # noqa: E402 (run as a script, the repository is not on the path yet)
from utils.config import load_config  # noqa: E402
from utils.distributed import init_distributed  # noqa: E402
from utils.errors import plain_errors  # noqa: E402
from utils.training_state import load_training_state  # noqa: E402
from wan.modules.weights import save_safetensors  # noqa: E402


@plain_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="run folder of train.py")
    parser.add_argument("output", type=Path, help="folder to write, or a .pt or .safetensors file")
    args = parser.parse_args(argv)
    state = load_training_state(args.run_dir)
    if state is None:
        raise ValueError(f"{args.run_dir} holds no training_state/; give the --logdir of a training run")
    if args.output.suffix in (".pt", ".safetensors"):
        export_file(state.tensors, args.output)
    else:
        export_folder(args.run_dir, args.output)
    print(f"step {state.facts['step']} of {args.run_dir} written to {args.output}")
    return 0


def export_file(tensors: dict[str, Tensor], path: Path) -> None:
    """The published layout: `generator` and `generator_ema`, keys `model.*`; nested in .pt, dotted in .safetensors."""
    parts = {"generator": "student/weights/generator.", "generator_ema": "student/ema/generator."}
    nested = {
        key: {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for key, prefix in parts.items()
    }
    if not all(nested.values()):
        raise ValueError("this run trained no generator; give an output folder instead of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt":
        torch.save(nested, path)
    else:
        save_safetensors({f"{key}.{name}": t for key, part in nested.items() for name, t in part.items()}, path)


def export_folder(run_dir: Path, folder: Path) -> None:
    """What the trainer writes at the end of a run, from the averaged weights as they were saved."""
    config = load_config(run_dir / "config.yaml", ["device=cpu", "compile=false"])
    trainer = TRAINERS[config.trainer](config, init_distributed("cpu"), run_dir)
    trainer.resume()
    trainer.export_averages(folder)


if __name__ == "__main__":
    sys.exit(main())
