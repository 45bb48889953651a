"""All that steers generation, in one frozen object."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class FrameSource(Protocol):
    """What brings a per-frame part while it is made, in place of a tensor of the whole video."""

    def frames(self, start: int, stop: int) -> Tensor:
        """[B, C, stop - start, h, w] of latent frames [start, stop)."""
        ...


@dataclass(frozen=True)
class Conditioning:
    """Prompt, image and pose for one batch; per-frame parts cover the whole video and are sliced per block.

    Frozen: no callee can change its caller's batch.
    """

    prompt_embeds: Tensor  # [B, T, text_dim]
    clip_feature: Tensor | None = None  # [B, 257, clip_dim] image tokens (i2v)
    y: Tensor | None = None  # [B, 20, F, H, W] 4 mask + 16 image-latent channels (i2v); its last frame goes on for ever
    pose: Tensor | FrameSource | None = None  # [B, pose_dim, F, H/2, W/2] features, or [B, dim, ...] for the tokens

    def frames(self, start: int, stop: int) -> "Conditioning":
        """The same for latent frames [start, stop)."""
        pose = self.pose
        if pose is not None:
            pose = pose[:, :, start:stop] if isinstance(pose, Tensor) else pose.frames(start, stop)
        return replace(self, y=None if self.y is None else hold_last(self.y, start, stop), pose=pose)

    @property
    def add_condition(self) -> Tensor | None:
        """Pose as tokens [B, F * H/2 * W/2, width], in the order of the video's tokens."""
        return None if self.pose is None else self.pose.flatten(2).transpose(1, 2)

    def beside(self, other: "Conditioning") -> "Conditioning":
        """Both in one batch, this one's samples first. Neither may have a pose: a side without has no tokens for it."""
        if self.pose is not None or other.pose is not None:
            raise ValueError("conditionings with a pose do not go side by side; walk them as two paths")
        embeds = (self.prompt_embeds, other.prompt_embeds)
        longest = max(embed.shape[1] for embed in embeds)  # rows of zeros are what the network fills up with, too
        padded = [F.pad(embed, (0, 0, 0, longest - embed.shape[1])) for embed in embeds]
        pairs = ((self.clip_feature, other.clip_feature), (self.y, other.y))
        return Conditioning(torch.cat(padded), *(None if one is None else torch.cat([one, two]) for one, two in pairs))

    def negative(self, prompt_embeds: Tensor) -> "Conditioning":
        """The unguided side of classifier-free guidance: other words, the same image, no pose."""
        return replace(self, prompt_embeds=prompt_embeds, pose=None)


def hold_last(frames: Tensor, start: int, stop: int) -> Tensor:
    """Frames [start, stop) of [B, C, F, H, W], whose last frame goes on for ever."""
    inside = frames[:, :, start:stop]
    missing = stop - start - inside.shape[2]
    if not missing:
        return inside
    return torch.cat([inside, frames[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
