"""Published generators, and those that training exports: how they come back, whatever wrapped their names."""

import logging
from pathlib import Path

import torch
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
