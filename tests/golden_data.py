"""Reads tests/golden: inputs, weights and outputs of the public implementations on small random weights."""

import json
from dataclasses import fields
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from wan.configs import WanConfig

FOLDER = Path(__file__).parent / "golden"


def load_golden(name: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and config of one case."""
    with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["config"])  # noqa: SIM118


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix.`, without it."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(prefix + ".")}


def wan_config(golden_config: dict) -> WanConfig:
    known = {field.name for field in fields(WanConfig)}
    values = {
        k: tuple(v) if isinstance(v, list) else v for k, v in golden_config.items() if k in known and v is not None
    }
    return WanConfig(**values)
