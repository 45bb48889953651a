"""Reads tests/golden: inputs, weights and outputs of the public implementations on small random weights."""

import json
import lzma
from dataclasses import fields
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from wan.configs import WanConfig

FOLDER = Path(__file__).parent / "golden"
PLANES = 4  # the first, second, third and fourth bytes of all numbers stand together: the high ones repeat themselves
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]


@cache
def load_golden(name: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and config of one case: a safetensors file whose header holds the config, packed by `save_golden`."""
    raw = lzma.decompress((FOLDER / f"{name}.safetensors.xz").read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    metadata = header.pop("__metadata__", {})
    length = max(entry["data_offsets"][1] for entry in header.values())
    body = np.frombuffer(raw[start:], np.uint8).reshape(PLANES, -1).T.tobytes()
    tensors = load(raw[:start] + body[:length])
    for key, (case, its_key) in json.loads(metadata.get("elsewhere", "{}")).items():
        tensors[key] = load_golden(case)[0][its_key]
    return tensors, json.loads(metadata.get("config", "{}"))


def save_golden(
    name: str, tensors: dict[str, Tensor], config: dict, elsewhere: dict[str, tuple[str, str]] | None = None
) -> Path:
    """Pack one case, about a tenth smaller than compressed as it is. Returns the file.

    elsewhere: keys of tensors that another case holds already -> that case and its key.
    """
    metadata = {"config": json.dumps(config)} | ({"elsewhere": json.dumps(elsewhere)} if elsewhere else {})
    raw = save(tensors, metadata)
    start = 8 + int.from_bytes(raw[:8], "little")
    body = np.frombuffer(raw[start:], np.uint8)
    planes = np.pad(body, (0, -len(body) % PLANES)).reshape(-1, PLANES).T.tobytes()
    path = FOLDER / f"{name}.safetensors.xz"
    path.write_bytes(lzma.compress(raw[:start] + planes, filters=FILTERS))
    return path


def rounded(tensor: Tensor, mantissa_bits: int = 16) -> Tensor:
    """Float32 numbers to the nearest with so many bits after the point: what is left compresses to so much less."""
    drop = 23 - mantissa_bits
    bits = tensor.float().contiguous().view(torch.int32)
    return ((bits + (1 << (drop - 1))) & ~((1 << drop) - 1)).view(torch.float32)


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix.`, without it."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(prefix + ".")}


def wan_config(golden_config: dict) -> WanConfig:
    known = {field.name for field in fields(WanConfig)}
    values = {
        k: tuple(v) if isinstance(v, list) else v for k, v in golden_config.items() if k in known and v is not None
    }
    return WanConfig(**values)
