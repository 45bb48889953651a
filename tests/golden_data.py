"""Reads tests/golden: inputs, weights and outputs of the public implementations on small random weights."""

import json
import lzma
from dataclasses import fields
from functools import cache
from pathlib import Path

from safetensors.torch import load
from torch import Tensor

from wan.configs import WanConfig

FOLDER = Path(__file__).parent / "golden"


@cache
def load_golden(name: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and config of one case: a safetensors file, compressed, whose header holds the config."""
    raw = lzma.decompress((FOLDER / f"{name}.safetensors.xz").read_bytes())
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return load(raw), json.loads(header.get("__metadata__", {}).get("config", "{}"))


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix.`, without it."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(prefix + ".")}


def wan_config(golden_config: dict) -> WanConfig:
    known = {field.name for field in fields(WanConfig)}
    values = {
        k: tuple(v) if isinstance(v, list) else v for k, v in golden_config.items() if k in known and v is not None
    }
    return WanConfig(**values)
