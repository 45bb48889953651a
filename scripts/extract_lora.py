"""What training changed in a model, as a low-rank update (LoRA) of a few megabytes.

python scripts/extract_lora.py wan_models/puppet-tiny logs/puppet_consistency/export few_steps.safetensors --rank 16
python inference.py --prompt "a red puppet waves" lora_ckpt=few_steps.safetensors

Every matrix's change is cut to its largest singular values; biases and norms keep the base's. How much of the change
that holds (squared) is printed. Both models must have the same sizes.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.errors import plain_errors  # noqa: E402 (run as a script, the repository is not on the path yet)
from wan.configs import find_model_folder  # noqa: E402
from wan.modules.weights import check_same_tensors, read_tensors, save_safetensors  # noqa: E402


@plain_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="model folder that training started from")
    parser.add_argument("tuned", help="model folder that it made, e.g. logs/puppet_dmd/export")
    parser.add_argument("output", type=Path, help=".safetensors file to write")
    parser.add_argument("--rank", type=int, default=16, help="numbers kept per row and column of a matrix's change")
    args = parser.parse_args(argv)
    if args.rank < 1 or args.output.suffix != ".safetensors":
        raise ValueError(
            f"rank {args.rank} and output {args.output}: a rank is at least 1, a file ends in .safetensors"
        )
    base, tuned = (transformer_weights(name) for name in (args.base, args.tuned))
    check_same_tensors(base, tuned, f"the transformer of {args.tuned}")
    update, held = extract(base, tuned, args.rank)
    save_safetensors(update, args.output, torch.bfloat16)
    print(f"{args.output}: rank {args.rank} of {len(update) // 2} matrices holds {held:.1%} of the change")
    return 0


def transformer_weights(model: str) -> dict[str, Tensor]:
    folder = find_model_folder(model)
    files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no diffusion_pytorch_model*.safetensors; give a model folder")
    return {name: tensor for file in files for name, tensor in read_tensors(file).items()}


def extract(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], rank: int) -> tuple[dict[str, Tensor], float]:
    """`module.lora_A.weight` [rank, in] and `module.lora_B.weight` [out, rank] of every matrix that is larger than the
    rank; and which share of all that changed they hold."""
    update: dict[str, Tensor] = {}
    held = whole = 0.0
    for name, before in base.items():
        change = tuned[name].float() - before.float()
        whole += float(change.square().sum())
        if change.ndim != 2 or min(change.shape) <= rank or not name.endswith(".weight"):
            continue
        left, sizes, right = torch.linalg.svd(change, full_matrices=False)
        root = sizes[:rank].sqrt()  # both halves alike in size: bfloat16 rounds neither away
        module = name.removesuffix(".weight")
        update[f"{module}.lora_A.weight"] = root[:, None] * right[:rank]
        update[f"{module}.lora_B.weight"] = left[:, :rank] * root
        held += float(sizes[:rank].square().sum())
    return update, held / whole if whole else 1.0


if __name__ == "__main__":
    sys.exit(main())
