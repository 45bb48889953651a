"""Names and shapes of the published checkpoints, held by our modules at full size on the meta device."""

import gzip
import json
from pathlib import Path

import torch

from wan.modules.clip import build_clip_vision, from_wan_names
from wan.modules.text_encoder import UMT5_XXL_SIZES, to_wan_names, transformers_name, umt5_config
from wan.modules.tiny_vae import TinyVAE
from wan.modules.vae import WanVAE

CLIP = "clip_xlm_roberta_vit_h_14_visual"
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


def test_tiny_vae_is_taew2_1_pth():
    with torch.device("meta"):
        vae = TinyVAE()
    assert shapes(vae.state_dict()) == manifest("taew2_1")
    assert sum(parameter.numel() for parameter in vae.parameters()) == 11_315_539
    assert (vae.spatial_stride, vae.temporal_stride) == (8, 4)


def test_text_encoder_is_models_t5_umt5_xxl_pth():
    from transformers import UMT5EncoderModel

    with torch.device("meta"):
        model = UMT5EncoderModel(umt5_config(UMT5_XXL_SIZES))
    published = manifest("umt5_xxl_encoder")
    assert shapes(to_wan_names(model.state_dict())) == published
    names = {transformers_name(name) for name in published}
    assert names | {"encoder.embed_tokens.weight"} == set(model.state_dict())
    assert sum(parameter.numel() for parameter in model.parameters()) == 5_680_910_336


def test_clip_vision_is_the_visual_part_of_clip_pth():
    published = {name: torch.empty(shape, device="meta") for name, shape in manifest(CLIP).items()}
    tower = from_wan_names(published)
    model = build_clip_vision(tower, num_heads=16)
    ours = {name.removeprefix("vision_model."): shape for name, shape in shapes(model.state_dict()).items()}
    assert ours == shapes(tower)
    head = published["visual.head"].numel()
    assert sum(tensor.numel() for tensor in tower.values()) + head == 632_076_800
    assert (model.config.image_size, model.config.hidden_size, model.config.num_hidden_layers) == (224, 1280, 32)
