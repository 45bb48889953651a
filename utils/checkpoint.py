"""What is saved and how it comes back: published generators, and the state of a training run.

Training states lie in the run folder as ``training_state/step_00000120/part-1-of-2.safetensors``; step, clock and
config stand as JSON in the metadata of the first part. A folder gets its final name after everything in it is written,
so a process killed at any moment leaves the last whole state.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from wan.modules.weights import check_same_tensors, read_tensors

logger = logging.getLogger(__name__)

# What FSDP, activation checkpointing and torch.compile put into parameter names.
WRAPPER_MARKS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
PUBLIC_CHECKPOINTS = "gdhe17/Self-Forcing"  # Hugging Face repository of the released generators, under checkpoints/


def load_generator(
    module: nn.Module,
    path: str | Path,
    *,
    use_ema: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Load a published or self-trained generator strictly into a wrapper or a bare transformer.

    path: .pt or .safetensors; the weights may lie under ``generator``, ``generator_ema`` or ``model`` or bare, their
    names may carry ``model.`` and the marks of FSDP, checkpointing and compile. use_ema takes ``generator_ema``.
    device, dtype: where and what the module becomes (it may be on the meta device); None keeps what it is.
    Raises FileNotFoundError with the download line, ValueError with the first differing names and shapes.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; {_remedy(path)}")
    weights = {_clean(name): tensor for name, tensor in _pick_generator(path, use_ema).items()}
    names = {_clean(name): name for name in module.state_dict()}
    targets = {_clean(name): tensor for name, tensor in module.state_dict().items()}
    check_same_tensors(targets, weights, str(path))
    own = {
        names[name]: weights[name].to(device or target.device, dtype or target.dtype)
        for name, target in targets.items()
    }
    module.load_state_dict(own, assign=True)
    logger.info("generator from %s%s", path, " (EMA)" if use_ema else "")


def _remedy(path: Path) -> str:
    if path.parent.name == "checkpoints" and path.suffix == ".pt":
        return f"get it with: hf download {PUBLIC_CHECKPOINTS} checkpoints/{path.name} --local-dir {path.parent.parent}"
    return "give the path of a .pt or .safetensors file"


def _pick_generator(path: Path, use_ema: bool) -> dict[str, Tensor]:
    """The state dict of the generator inside a checkpoint file."""
    content = read_tensors(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict; give a generator checkpoint")
    nested = sorted(key for key, value in content.items() if isinstance(value, dict))
    order = ("generator_ema",) if use_ema else ("generator", "model")
    for key in order:
        if isinstance(content.get(key), dict):
            return content[key]
    for key in order:  # safetensors cannot nest: "generator_ema.model.blocks.0..." stands for it
        flat = {name.removeprefix(f"{key}."): t for name, t in content.items() if name.startswith(f"{key}.")}
        if flat:
            return flat
    if use_ema:
        found = f"only {', '.join(nested)}" if nested else "bare weights"
        raise ValueError(f"{path} holds no generator_ema ({found}); leave out use_ema")
    if nested:
        hint = "; set use_ema" if "generator_ema" in nested else ""
        raise ValueError(f"{path} holds {', '.join(nested)} but no generator{hint}")
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict of tensors; give a generator checkpoint")
    return content


def _clean(name: str) -> str:
    for mark in WRAPPER_MARKS:
        name = name.replace(mark, "")
    return name.removeprefix("model.")


@dataclass(frozen=True)
class TrainingState:
    """Tensors of a run by name, and the JSON-able rest (step, seconds, config)."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def save_training_state(
    run_dir: str | Path, state: TrainingState, *, keep_last: int = 2, max_file_mb: int = 2000
) -> Path:
    """Write a state atomically, then delete all but the newest ``keep_last``. Returns its folder.

    max_file_mb: tensors are spread over files of at most this many megabytes (10^6 bytes).
    """
    home = Path(run_dir) / "training_state"
    final = home / f"step_{state.facts['step']:08d}"
    partial = home / f"{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    parts = list(_parts(state.tensors, max_file_mb * 10**6))
    for index, part in enumerate(parts, start=1):
        metadata = {"facts": json.dumps(state.facts), "tensors": str(len(state.tensors))}
        save_file(part, partial / f"part-{index}-of-{len(parts)}.safetensors", metadata=metadata)
    shutil.rmtree(final, ignore_errors=True)
    partial.replace(final)
    for old in _state_folders(run_dir)[:-keep_last]:
        shutil.rmtree(old)
    return final


def has_training_state(run_dir: str | Path) -> bool:
    """Whether a run folder holds a whole state to resume from."""
    return bool(_state_folders(run_dir))


def load_training_state(run_dir: str | Path) -> TrainingState | None:
    """The newest whole state of a run, on the CPU; None when there is none."""
    folders = _state_folders(run_dir)
    if not folders:
        return None
    files = sorted(folders[-1].glob("part-*.safetensors"))
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    try:
        for path in files:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged ({error}); delete {folders[-1]} to resume from the state before it"
        ) from error
    if not metadata or len(tensors) != int(metadata["tensors"]):
        raise ValueError(f"{folders[-1]} lacks some of its parts; copy all of them, or delete the folder")
    return TrainingState(tensors, json.loads(metadata["facts"]))


def _state_folders(run_dir: str | Path) -> list[Path]:
    """Whole states, oldest first."""
    folders = (Path(run_dir) / "training_state").glob("step_*")
    return sorted(path for path in folders if path.is_dir() and path.name[5:].isdigit())


def _parts(tensors: dict[str, Tensor], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Consecutive groups of at most ``max_bytes`` (a single larger tensor makes a group of its own)."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        if part and size + tensor.nbytes > max_bytes:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    yield part
