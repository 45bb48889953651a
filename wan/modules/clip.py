"""The image encoder of Wan I2V: the vision tower of CLIP ViT-H/14, loaded from Wan's own `.pth` names.

image [B, 3, H, W] in [-1, 1] -> preprocess -> [B, 3, 224, 224] -> all blocks but the last -> [B, 257, 1280]
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.modules.weights import assign_weights, read_tensors

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

logger = logging.getLogger(__name__)

# Colour statistics of the images that CLIP was trained on, for pixels in [0, 1] (arXiv 2103.00020).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Wan's name, without `visual.` -> transformers' name.
TOP_NAMES = {
    "cls_embedding": "embeddings.class_embedding",
    "patch_embedding.weight": "embeddings.patch_embedding.weight",
    "pos_embedding": "embeddings.position_embedding.weight",
    "pre_norm.weight": "pre_layrnorm.weight",
    "pre_norm.bias": "pre_layrnorm.bias",
    "post_norm.weight": "post_layernorm.weight",
    "post_norm.bias": "post_layernorm.bias",
}
BLOCK_NAMES = {
    "norm1": "layer_norm1",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}


def from_wan_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The `visual.*` tensors of Wan's CLIP file under transformers' names (no `vision_model.` in front).

    The text tower, the temperature and the projection head, which nothing here uses, are left out. Other names are
    kept as they are, for the strict load to complain about.
    """
    renamed = {}
    for name, tensor in tensors.items():
        if not name.startswith("visual.") or name == "visual.head":
            continue
        name = name.removeprefix("visual.")
        match = re.fullmatch(r"transformer\.(\d+)\.(.+)\.(weight|bias)", name)
        if match and match[2] == "attn.to_qkv":
            for projection, part in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
                renamed[f"encoder.layers.{match[1]}.self_attn.{projection}.{match[3]}"] = part
        elif match and match[2] in BLOCK_NAMES:
            renamed[f"encoder.layers.{match[1]}.{BLOCK_NAMES[match[2]]}.{match[3]}"] = tensor
        elif name == "cls_embedding":
            renamed[TOP_NAMES[name]] = tensor.flatten()
        elif name == "pos_embedding":
            renamed[TOP_NAMES[name]] = tensor[0]
        else:
            renamed[TOP_NAMES.get(name, name)] = tensor
    return renamed


def build_clip_vision(tensors: Mapping[str, Tensor], num_heads: int) -> CLIPVisionModel:
    """An empty tower (on the meta device) of the sizes that the renamed tensors have; the number of heads they hide."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    dim, _, patch_size, _ = tensors["embeddings.patch_embedding.weight"].shape
    num_patches = tensors["embeddings.position_embedding.weight"].shape[0] - 1  # the class token has a place too
    config = CLIPVisionConfig(
        hidden_size=dim,
        intermediate_size=tensors["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.layers.")),
        num_attention_heads=num_heads,
        image_size=patch_size * math.isqrt(num_patches),
        patch_size=patch_size,
        hidden_act="gelu",
    )
    with torch.device("meta"):
        return CLIPVisionModel(config)


class CLIPVision(nn.Module):
    """Images to clip_feature tokens: preprocessing and a CLIP tower that lacks its last block."""

    def __init__(self, tower: CLIPVisionModel):
        super().__init__()
        self.tower = tower

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1], any size -> [B, 257, 1280], class token first.

        The hidden state in front of ViT-H's last block, without a final norm: what Wan I2V was trained on.
        """
        pixels = preprocess(images.to(self.tower.device), self.tower.config.image_size).to(self.tower.dtype)
        return self.tower(pixel_values=pixels).last_hidden_state


def load_clip_vision(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float16,
    *,
    num_heads: int = 16,
) -> CLIPVision:
    """The vision tower in Wan's CLIP file, without its last block (never used), frozen, in eval mode.

    Sizes are read off the weights' shapes; num_heads is ViT-H's unless told otherwise.
    """
    path = Path(path)
    tensors = from_wan_names(read_tensors(path))
    needed = {"embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"}
    needed |= {"encoder.layers.0.mlp.fc1.weight", "encoder.layers.1.mlp.fc1.weight"}
    if missing := sorted(needed - tensors.keys()):
        raise ValueError(f"{path} holds no CLIP vision tower under Wan's names (visual.*): it lacks {missing[0]}")

    last = max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.layers."))
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"encoder.layers.{last}.")}
    model = build_clip_vision(tensors, num_heads)
    # transformers 4 has one more module around the tower than transformers 5.
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in model.state_dict()) else ""
    assign_weights(model, {prefix + name: tensor.to(device, dtype) for name, tensor in tensors.items()}, str(path))
    embeddings = model.get_submodule(f"{prefix}embeddings")
    positions = torch.arange(embeddings.position_embedding.num_embeddings, device=device)
    embeddings.register_buffer("position_ids", positions[None], persistent=False)  # was left on the meta device
    logger.info("CLIP vision %s: %.1fM parameters, %s on %s", path.name, model.num_parameters() / 1e6, dtype, device)
    return CLIPVision(model).eval().requires_grad_(False)


def preprocess(image: Tensor, size: int) -> Tensor:
    """[B, 3, H, W] in [-1, 1] -> [B, 3, size, size] as CLIP was trained on, float32.

    The picture is squeezed to a square, not cropped, and bicubic without antialiasing: what Wan I2V was trained with.
    """
    resized = F.interpolate(image.float(), size=(size, size), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(values, device=image.device).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (resized * 0.5 + 0.5 - mean) / std
