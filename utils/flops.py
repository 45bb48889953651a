"""How much work a pass through the transformer is: multiplications and additions of its matrix products, counted."""

import torch
from torch import nn

from wan.configs import WanConfig
from wan.modules.pose import NUM_START_COPIES, DWPoseEmbedding


def pass_flops(
    config: WanConfig,
    num_tokens: int,
    num_keys: float | None = None,
    *,
    text_keys: bool = True,
    keys_only: bool = False,
) -> float:
    """FLOPs of one forward pass over num_tokens video tokens of one sample.

    num_keys: tokens that self-attention looks at, its own included; None: its own. text_keys: whether keys and values
    of the prompt are made in this pass, or remembered from an earlier one. keys_only: the last layer stops at the keys
    that a cache keeps. A backward pass is twice a forward one.

    1.3B over 21 latents of 60 x 104 (32,760 tokens): 2.8e14.
    """
    dim, text = config.dim, config.text_len
    num_keys = num_tokens if num_keys is None else num_keys
    projections = 4 * dim * dim + 2 * dim * config.ffn_dim + 2 * dim * dim  # self q k v o, ffn, cross q o
    attention = 2 * dim * (num_keys + text)  # scores and sums, over both kinds of keys
    layer = num_tokens * (projections + attention) + (2 * text * dim * dim if text_keys else 0)
    patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    ends = num_tokens * dim * patch * (config.in_dim + config.out_dim)
    if text_keys:
        ends += text * dim * (config.text_dim + dim)
    left_out = layer - num_tokens * 3 * dim * dim if keys_only else 0
    return 2.0 * (config.num_layers * layer - left_out + ends)


def pose_flops(num_frames: int, height: int, width: int, out_dim: int) -> float:
    """FLOPs of one forward pass of the pose network over drawings of so many frames and pixels.

    81 frames of 128 x 128 and 64 numbers a token: 4.8e10; 832 x 480 and 5120: 1.2e12.
    """
    with torch.device("meta"):
        network = DWPoseEmbedding(out_dim)
    sides, total = [num_frames + NUM_START_COPIES, height, width], 0
    for layer in network:
        if isinstance(layer, nn.Conv3d):
            sizes = zip(sides, layer.kernel_size, layer.stride, layer.padding, strict=True)
            sides = [(side + 2 * pad - kernel) // stride + 1 for side, kernel, stride, pad in sizes]
            total += 2 * layer.weight.numel() * sides[0] * sides[1] * sides[2]
    return float(total)
