"""Names and shapes of the published checkpoints, held by our modules at full size on the meta device."""

import gzip
import json
from pathlib import Path

import torch

from wan.modules.vae import WanVAE

MANIFESTS = Path(__file__).parents[1] / "golden" / "manifests"


def manifest(name: str) -> dict[str, list[int]]:
    return json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))


def shapes(state_dict: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in state_dict.items()}


def test_vae_is_wan21_vae_pth():
    with torch.device("meta"):
        vae = WanVAE()
    assert shapes(vae.state_dict()) == manifest("wan2.1_vae")
    assert sum(parameter.numel() for parameter in vae.parameters()) == 126_892_531
    assert (vae.spatial_stride, vae.temporal_stride) == (8, 4)
