"""The state of a training run on disk: found, checked, read; and written small.

States lie in the run folder as ``training_state/step_00000120/``, in one of two forms:

- whole: what ``utils/checkpointer.py`` writes through torch.distributed.checkpoint, with ``facts.json`` beside it;
- compact: ``part-1-of-2.safetensors``, bfloat16 and without the optimizer, the facts in the metadata of every part.

A folder gets its final name after everything in it is on the disk, so a process killed at any moment leaves the last
whole state; what a broken-off write or deletion left ends in ``.partial`` and is never read.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from utils.sharding import cut, local

FACTS = "facts.json"


@dataclass(frozen=True)
class TrainingState:
    """Tensors of a run by name, and the JSON-able rest (step, seconds, config)."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


@dataclass(frozen=True)
class StoredState:
    """A state on disk. shapes: every tensor it holds, on the meta device."""

    folder: Path
    facts: dict[str, Any]
    shapes: dict[str, Tensor]

    def read(self, targets: Mapping[str, Tensor]) -> None:
        """Fill tensors, or this rank's parts of DTensors, in place. Every rank reads for itself."""
        if (self.folder / FACTS).is_file():
            self._read_whole(dict(targets))
            return
        for path in _parts_of(self.folder):
            with _open(path) as file:
                for name in set(targets) & set(file.keys()):
                    local(targets[name]).copy_(cut(file.get_tensor(name), targets[name]))

    def _read_whole(self, targets: dict[str, Tensor]) -> None:
        try:
            dcp.load(targets, storage_reader=dcp.FileSystemReader(self.folder), no_dist=True)
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise damaged(self.folder, f"{type(cause).__name__}: {cause}".splitlines()[0]) from None


def damaged(path: Path, reason: str) -> ValueError:
    folder = path if path.is_dir() else path.parent
    return ValueError(f"{path} is damaged ({reason}); delete {folder} to resume from the state before it")


def open_training_state(run_dir: str | Path, name: str | None = None) -> StoredState | None:
    """The newest state of a run, or the one of that folder name, unread; None when there is none.

    ValueError for a damaged one.
    """
    folders = [folder for folder in state_folders(run_dir) if name in (None, folder.name)]
    if not folders:
        return None
    return _open_whole(folders[-1]) if (folders[-1] / FACTS).is_file() else _open_compact(folders[-1])


def load_training_state(run_dir: str | Path, name: str | None = None) -> TrainingState | None:
    """As `open_training_state`, read, on the CPU."""
    stored = open_training_state(run_dir, name)
    if stored is None:
        return None
    tensors = {name: torch.empty_like(shape, device="cpu") for name, shape in stored.shapes.items()}
    stored.read(tensors)
    return TrainingState(tensors, stored.facts)


def has_training_state(run_dir: str | Path) -> bool:
    """Whether a run folder holds a whole state to resume from."""
    return bool(state_folders(run_dir))


def state_folders(run_dir: str | Path) -> list[Path]:
    """Whole states, oldest first."""
    folders = (Path(run_dir) / "training_state").glob("step_*")
    return sorted(path for path in folders if path.is_dir() and path.name[5:].isdigit())


def _open_whole(folder: Path) -> StoredState:
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        files = facts.pop("files")
    except (ValueError, KeyError) as error:
        raise damaged(folder / FACTS, str(error)) from error
    for name, size in files.items():
        file = folder / name
        if not file.is_file():
            raise damaged(folder, f"{name} is missing")
        if file.stat().st_size != size:
            raise damaged(file, f"{file.stat().st_size} bytes instead of {size}")
    try:
        stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as error:  # a damaged pickle may raise anything
        raise damaged(folder / ".metadata", f"{type(error).__name__}: {error}".splitlines()[0]) from error
    shapes = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    return StoredState(folder, facts, shapes)


def _open_compact(folder: Path) -> StoredState:
    shapes: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for path in _parts_of(folder):
        with _open(path) as file:
            metadata = file.metadata()
            for name in file.keys():  # noqa: SIM118 (not a dict)
                shapes[name] = file.get_tensor(name).to("meta")
    if not metadata or len(shapes) != int(metadata["tensors"]):
        raise ValueError(f"{folder} lacks some of its parts; copy all of them, or delete the folder")
    return StoredState(folder, json.loads(metadata["facts"]), shapes)


def _parts_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.safetensors"))


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise damaged(path, str(error)) from error


# --- writing ---


def save_compact_state(
    run_dir: str | Path, state: TrainingState, *, keep_last: int = 2, max_file_mb: int = 2000
) -> Path:
    """Write a state as few small files, then delete all but the newest ``keep_last``. Returns its folder.

    max_file_mb: tensors are spread over files of at most this many megabytes (10^6 bytes).
    """
    step, size = state.facts["step"], num_bytes(state.tensors)
    partial = begin_state(run_dir, step)
    partial.mkdir(parents=True)
    parts = list(_split(state.tensors, max_file_mb * 10**6))
    metadata = {"facts": json.dumps(state.facts), "tensors": str(len(state.tensors))}
    try:
        for index, part in enumerate(parts, start=1):
            path = partial / f"part-{index}-of-{len(parts)}.safetensors"
            save_file(part, path, metadata=metadata)
            sync(path)
    except (SafetensorError, OSError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise cannot_save(run_dir, step, size, str(error)) from error
    return finish_state(partial, keep_last)


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Of whole tensors, however they are cut."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def cannot_save(run_dir: str | Path, step: int, size: int, reason: str) -> OSError:
    """What to tell when there is no room for the state of a step, of `size` bytes."""
    kept = [folder.name for folder in state_folders(run_dir)]
    there = f"{kept[-1]} stays" if kept else "there is none before it"
    free = shutil.disk_usage(run_dir).free
    return OSError(
        f"the state of step {step} ({size / 1e9:.2f} GB) could not be saved in {run_dir}: {reason} "
        f"({free / 1e9:.2f} GB free); {there}: make room, or set checkpoint.keep_last=1, and run again to resume"
    )


def begin_state(run_dir: str | Path, step: int) -> Path:
    """Where to write the state of a step; what earlier broken-off writes left is deleted."""
    home = Path(run_dir) / "training_state"
    for leftover in home.glob("*.partial"):
        shutil.rmtree(leftover)
    return home / f"step_{step:08d}.partial"


def finish_state(partial: Path, keep_last: int) -> Path:
    """Give a written state its name, and delete all but the newest ``keep_last``."""
    sync(partial)
    final = partial.with_suffix("")
    if final.exists():  # the same step, saved once more
        _delete(final)
    partial.rename(final)
    sync(final.parent)
    for old in state_folders(final.parent.parent)[:-keep_last]:
        _delete(old)
    return final


def _delete(folder: Path) -> None:
    """Under another name first: half a state must not be taken for one."""
    shutil.rmtree(folder.rename(folder.with_suffix(".deleted.partial")))


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk and not only in the system's memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _split(tensors: dict[str, Tensor], max_bytes: int) -> Iterator[dict[str, Tensor]]:
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
