"""Weights between disk and modules: safetensors or .pth, straight to the device, refused with the first difference."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from zipfile import is_zipfile

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def read_tensors(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors of one .safetensors or (weights-only) .pt/.pth file; ValueError for a damaged one."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt", device=str(device)) as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return torch.load(path, map_location=device, weights_only=True, mmap=is_zipfile(path))
    except (torch.OutOfMemoryError, OSError):
        raise
    except Exception as error:  # a damaged pickle may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is damaged or cut off ({reason}); download it again"
        ) from error


def check_same_tensors(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError naming the first missing, unexpected and misshapen tensors of `source`."""
    differences = [f"missing {name} {list(expected[name].shape)}" for name in expected if name not in given]
    differences += [f"unexpected {name} {list(given[name].shape)}" for name in given if name not in expected]
    differences += [
        f"{name} has {list(given[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(f"{source} does not fit this model: {'; '.join(differences[:3])}{more}")


def assign_weights(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Make `tensors` the module's parameters and buffers (strictly, no copy); a meta module becomes real."""
    check_same_tensors(module.state_dict(), tensors, source)
    module.load_state_dict(dict(tensors), strict=True, assign=True)


def load_weights(
    module: nn.Module,
    files: Iterable[str | Path],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> None:
    """Read files straight to `device`, cast tensor by tensor, and assign them strictly."""
    files = list(files)
    tensors = {}
    for path in files:
        for name, tensor in read_tensors(path, device).items():
            tensors[name] = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
    assign_weights(module, tensors, ", ".join(str(path) for path in files))


def save_safetensors(tensors: Mapping[str, Tensor], path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write tensors (cast to `dtype`) atomically: a broken-off write leaves no file under the final name.

    OSError where there is no room, or nothing may be written.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    own = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    try:
        save_file(own, partial)
    except SafetensorError as error:
        partial.unlink(missing_ok=True)
        size = sum(tensor.nbytes for tensor in own.values())
        raise OSError(f"{path} ({size / 1e9:.2f} GB) could not be written: {error}; make room and run again") from error
    partial.replace(path)
