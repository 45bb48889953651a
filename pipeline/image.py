"""A picture as condition: which way a checkpoint can take one, and the channels `y` that image-to-video models read.

context    its latent is the video's first frame, remembered as one that was given: any causal model
concat     its latent and a mask on input channels of their own, its CLIP tokens in cross-attention: i2v checkpoints
ref_sink   its latent is remembered in front of the video, never leaves and is never shown: needs training to be good
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.conditioning import hold_last
from utils.wan_wrapper import WanDiffusionWrapper, WanVAEWrapper
from wan.configs import WanConfig

IMAGE_MODES = ("auto", "context", "concat", "ref_sink")


@dataclass(frozen=True)
class ImageCondition:
    """What an image puts into a walk."""

    clip_feature: Tensor | None = None  # [B, 257, clip_dim]
    y: Tensor | None = None  # [B, 4 + C, F, H, W]
    given: Tensor | None = None  # [B, 1, C, H, W] latent of a frame that goes before all others
    num_hidden: int = 0  # of the given frames, those that are no part of the video


def choose_image_mode(mode: str, config: WanConfig) -> str:
    """The way a model takes an image; ValueError with the way out where it cannot take it so."""
    if mode not in IMAGE_MODES:
        raise ValueError(f"image_mode {mode!r} is unknown; use one of {', '.join(IMAGE_MODES)}")
    takes_y = config.model_type == "i2v"
    if mode == "auto":
        return "concat" if takes_y else "context"
    if mode == "concat" and not takes_y:
        raise ValueError(
            f"image_mode concat needs an i2v checkpoint; this one (in_dim {config.in_dim}) has no channels for it: "
            "use image_mode context, which makes the image the first frame, or a model such as Wan2.1-I2V-14B-480P"
        )
    if mode != "concat" and takes_y:
        raise ValueError(f"image_mode {mode} is for t2v checkpoints; this i2v one reads its image by concat (or auto)")
    return mode


def encode_image(
    generator: WanDiffusionWrapper,
    vae: WanVAEWrapper,
    clip: Callable[[Tensor], Tensor] | None,
    images: Tensor,
    num_frames: int | None,
    ref_pose: Tensor | None = None,
) -> dict[str, Tensor]:
    """`clip_feature` [B, 257, clip_dim] and `y` [B, 4 + C, F, H, W] of images [B, 3, 8H, 8W] in [-1, 1].

    y is the mask of known frames and the latents of the clip [image, grey, grey, ...] (Wan 2.1, arXiv 2503.20314), plus
    ref_pose [B, 4 + C, H, W] in every frame. num_frames None: only up to where the latents stop changing, see
    `latents_of_still`.
    """
    config = generator.model.config
    choose_image_mode("concat", config)
    if clip is None:
        raise ValueError("an i2v model reads an image's CLIP tokens too; build the pipeline with clip=CLIPModel(...)")
    latents = latents_of_still(vae, images, num_frames).transpose(1, 2)
    if num_frames is not None:
        latents = hold_last(latents, 0, num_frames)
    mask = latents.new_zeros(len(latents), vae.model.temporal_stride, *latents.shape[2:])
    mask[:, :, 0] = 1
    y = torch.cat([mask, latents], dim=1)
    if y.shape[1] != config.in_dim - config.out_dim:
        raise ValueError(
            f"this VAE makes {y.shape[1]} image channels (mask and latent), the model reads "
            f"{config.in_dim - config.out_dim}; use the VAE of the model's own folder"
        )
    device = generator.model.device
    y = y.to(device)
    if ref_pose is not None:
        if ref_pose.shape[1:] != y[:, :, 0].shape[1:]:
            raise ValueError(
                f"the reference pose is {list(ref_pose.shape)}, the image needs {list(y[:, :, 0].shape)}: "
                "draw it in the size of the video"
            )
        y = y + ref_pose.to(y)[:, :, None]
    return {"clip_feature": clip(images).to(device), "y": y}


@torch.no_grad()
def latents_of_still(vae: WanVAEWrapper, images: Tensor, num_frames: int | None) -> Tensor:
    """Latents [B, n, C, H, W] of a clip that begins with the images [B, 3, 8H, 8W] and goes on in mid-grey.

    n is num_frames, or less: the encoder looks back a finite time, so that its memory, and with it the latents, stop
    changing (Wan's: at latent 29). The last one returned then goes on for ever, bit for bit.
    """
    cache = vae.make_encoder_cache()
    grey = torch.zeros_like(images)[:, None].expand(-1, vae.model.temporal_stride, -1, -1, -1)
    latents = [vae.encode_to_latent(images[:, None], cache=cache)]
    limit = 2 + 2 * vae.model.encoder.num_slots  # each convolution looks back two latents at most
    while len(latents) < min(num_frames or limit, limit):
        before = list(cache.encoder)
        latents.append(vae.encode_to_latent(grey, cache=cache))
        if all(map(torch.equal, before, cache.encoder)):
            break
    return torch.cat(latents, dim=1)
