"""From any checkpoint to what inference takes: a model folder, or one file under the published keys.

python scripts/export_model.py logs/puppet_diffusion wan_models/puppet-tiny        # a model folder, averaged weights
python scripts/export_model.py logs/self_forcing_dmd checkpoints/mine.pt           # generator, generator_ema, critic
python scripts/export_model.py logs/self_forcing_dmd/training_state/step_00000600 checkpoints/mine.safetensors
python scripts/export_model.py checkpoints/mine.pt checkpoints/mine.safetensors    # from one form into the other

A .pt file nests the keys, a .safetensors file writes them before the names: generator_ema.model.blocks.0...
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.gan import published_critic_name  # noqa: E402 (run as a script, the repository is not on the path yet)
from trainer import TRAINERS  # noqa: E402
from utils.config import load_config  # noqa: E402
from utils.distributed import init_distributed  # noqa: E402
from utils.errors import plain_errors  # noqa: E402
from utils.training_state import TrainingState, load_training_state, open_training_state  # noqa: E402
from wan.modules.weights import read_tensors, save_safetensors  # noqa: E402

# Published key: where a training state keeps it.
PUBLISHED = {
    "generator": "student/weights/generator.",
    "generator_ema": "student/ema/generator.",
    "critic": "critic/weights/",
}
FILES = (".pt", ".safetensors")


@plain_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="run folder of train.py, one of its states, or a published file")
    parser.add_argument("output", type=Path, help="folder to write, or a .pt or .safetensors file")
    args = parser.parse_args(argv)
    to_file = args.output.suffix in FILES
    if args.source.suffix in FILES:
        if not to_file:
            raise ValueError(f"a model folder is made from a run; give a run folder instead of {args.source}")
        write_file(read_published(args.source), args.output)
        print(f"{args.source} written to {args.output}")
        return 0
    run_dir, name = args.source, None
    if args.source.parent.name == "training_state":
        run_dir, name = args.source.parent.parent, args.source.name
    stored = open_training_state(run_dir, name)
    if stored is None:
        raise ValueError(f"{args.source} holds no training_state/; give the --logdir of a training run")
    if to_file:
        write_file(published(load_training_state(run_dir, stored.folder.name)), args.output)
    else:
        write_folder(run_dir, stored.folder.name, stored.facts["config"], args.output)
    print(f"step {stored.facts['step']} of {run_dir} written to {args.output}")
    return 0


def published(state: TrainingState) -> dict[str, dict[str, Tensor]]:
    """Published key -> names and weights, of those that the run trained."""
    parts = {
        key: {name.removeprefix(prefix): t for name, t in state.tensors.items() if name.startswith(prefix)}
        for key, prefix in PUBLISHED.items()
    }
    if not parts["generator"]:
        raise ValueError("this run trained no generator; give an output folder instead of a file")
    parts["critic"] = {published_critic_name(name): tensor for name, tensor in parts["critic"].items()}
    return {key: part for key, part in parts.items() if part}


def read_published(path: Path) -> dict[str, dict[str, Tensor]]:
    """A published file, nested or dotted."""
    content = read_tensors(path)
    nested = {key: content[key] for key in PUBLISHED if isinstance(content.get(key), dict)}
    if not nested:
        for key in PUBLISHED:
            part = {name.removeprefix(f"{key}."): t for name, t in content.items() if name.startswith(f"{key}.")}
            nested |= {key: part} if part else {}
    if not nested:
        raise ValueError(f"{path} holds none of {', '.join(PUBLISHED)}; give a file that this command or training made")
    return nested


def write_file(parts: dict[str, dict[str, Tensor]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_safetensors({f"{key}.{name}": t for key, part in parts.items() for name, t in part.items()}, path)
        return
    partial = path.with_name(path.name + ".partial")
    torch.save(parts, partial)
    partial.replace(path)


def write_folder(run_dir: Path, state: str, settings: str, folder: Path) -> None:
    """What the trainer writes at the end of a run, from the averaged weights of a state."""
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "config.yaml"
        path.write_text(settings, encoding="utf-8")
        machine = ["device=cpu", "compile=false", "sharding_strategy=no_shard", "cpu_offload=false"]
        config = load_config(path, machine)
    trainer = TRAINERS[config.trainer](config, init_distributed("cpu"), run_dir)
    trainer.resume(state)
    trainer.export_averages(folder)


if __name__ == "__main__":
    sys.exit(main())
