"""Pose as condition: drawings of a skeleton, encoded as fast as the walk asks for them, in the memory of a block.

A latent looks four pose frames ahead. `pose_lookahead` says what a live stream does about it: `exact` waits for them
(the features are those of the whole clip), `hold` supposes that the newest pose stays (a block's last latent is then
an approximation).
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from pipeline.rollout import FrameBlock
from wan.modules.model import WanModel
from wan.modules.pose import (
    DWPoseEmbedding,
    RandomRefPoseEmbedding,
    StreamingPoseEncoder,
    pose_weights,
    project_features,
)
from wan.modules.weights import assign_weights, read_tensors

logger = logging.getLogger(__name__)

LOOKAHEADS = ("exact", "hold")


@dataclass(frozen=True)
class PoseSteering:
    """How much of a pose is used, and when.

    strength: factor on the pose tokens, 1 as trained. start, end: the part of the denoising steps that sees the pose;
    remembering always does. guidance_scale: w in  without + w (with - without), a guidance of its own for the pose
    beside the one for words (arXiv 2511.22940, equation for reference and pose), for one more pass; None: no.
    """

    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    lookahead: str = "exact"
    guidance_scale: float | None = None

    def __post_init__(self):
        if not 0 <= self.strength <= 2:
            raise ValueError(
                f"pose_strength is {self.strength}; it lies in [0, 2]: 0 ignores the pose, 1 is as trained"
            )
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                f"pose_start {self.start} and pose_end {self.end} are shares of the denoising steps; "
                "0 <= start < end <= 1"
            )
        if self.lookahead not in LOOKAHEADS:
            raise ValueError(f"pose_lookahead {self.lookahead!r} is unknown; use one of {', '.join(LOOKAHEADS)}")

    def sees(self, step: int, num_steps: int) -> bool:
        """Whether denoising step `step` of num_steps sees the pose."""
        return self.start <= step / num_steps < self.end


class DrivingPose:
    """Pose tokens of a walk, as `Conditioning.pose` takes them: `frames(start, stop)` reads on as far as it needs to.

    drawings: the whole clip [B, F_px, 3, H, W] (uint8, or floats in [0, 1]; B may be 1 for all), or an iterable of such
    pieces as they come. Other sizes are stretched to size = (B, H, W), as the published model's were. matrix: features
    to tokens (wan.modules.pose.fold_pose_proj). num_frames: pixel frames of the video, None: without end; drawings past
    it are not read, and where they run out before it, the last one stays. hidden [B, 64, 1, H/16, W/16]: the features
    of a reference that goes before the video; num_hidden without it: latents before the video that have no pose.
    """

    def __init__(
        self,
        embedding: DWPoseEmbedding,
        matrix: nn.Linear,
        drawings: Tensor | Iterable[Tensor],
        size: tuple[int, int, int],
        *,
        num_frames: int | None = None,
        steering: PoseSteering | None = None,
        num_hidden: int = 0,
        hidden: Tensor | None = None,
    ):
        self.steering = steering or PoseSteering()
        self._matrix, self._size, self._limit = matrix, size, num_frames
        self._num_hidden, self._hidden = num_hidden, hidden
        self._device = embedding[0].weight.device
        self._encoder = StreamingPoseEncoder(embedding)
        self._pieces = iter([drawings] if isinstance(drawings, Tensor) else drawings)
        self._num_pushed = self._num_came = 0  # frames, the held ones counted or not
        self._features: Tensor | None = None  # certain ones, from latent self._first on
        self._first = 0
        self._span: tuple[int, int] | None = None
        self._tokens: Tensor | None = None
        self._last: Tensor | None = None
        self._waiting = self._next_piece()
        if self._waiting is None:
            raise ValueError("the pose has no frames; give at least one drawing of a skeleton")

    def follow(self, blocks: Iterable[FrameBlock]) -> Iterator[FrameBlock]:
        """The blocks as long as the pose goes on."""
        for block in blocks:
            first_frame = 4 * (block.start - self._num_hidden) - 3
            if self._waiting is None and self._num_came <= first_frame:
                return
            yield block

    def frames(self, start: int, stop: int) -> Tensor:
        """Tokens [B, dim, stop - start, H/16, W/16] of latents [start, stop), times the strength. Never goes back."""
        if (start, stop) != self._span:
            hidden = self._num_hidden
            parts = [self._hidden_tokens(min(stop, hidden) - start)] if start < hidden else []
            if stop > hidden:
                parts.append(project_features(self._read(max(0, start - hidden), stop - hidden), self._matrix))
            self._span, self._tokens = (start, stop), self.steering.strength * torch.cat(parts, dim=2)
        return self._tokens

    @property
    def num_bytes(self) -> int:
        """Memory that stays between blocks; pieces that came and are not read yet left out."""
        kept = (self._features, self._tokens, self._last)
        return self._encoder.num_bytes + sum(tensor.nbytes for tensor in kept if tensor is not None)

    def _hidden_tokens(self, num_latents: int) -> Tensor:
        if self._hidden is not None:
            return project_features(self._hidden.expand(-1, -1, num_latents, -1, -1), self._matrix)
        batch, height, width = self._size  # zeros are how training said "no pose"
        shape = (batch, self._matrix.out_features, num_latents, height // 16, width // 16)
        return torch.zeros(shape, device=self._device)

    def _read(self, start: int, stop: int) -> Tensor:
        """Features of video latents [start, stop); those before are forgotten."""
        wanted = 4 * (stop - 1) + (5 if self.steering.lookahead == "exact" else 1)
        if self._limit is not None:
            wanted = min(wanted, self._limit)
        if wanted > self._num_pushed:
            self._keep(self._encoder.push(self._next_frames(wanted - self._num_pushed)))
            self._num_pushed = wanted
            if wanted == self._limit:
                self._keep(self._encoder.flush())
        if start > self._first:
            self._features, self._first = self._features[:, :, start - self._first :].clone(), start
        features = self._features[:, :, start - self._first : stop - self._first]
        if features.shape[2] < stop - start and self._num_pushed != self._limit:
            features = torch.cat([features, self._encoder.peek()], dim=2)
        return features

    def _keep(self, features: Tensor) -> None:
        self._features = features if self._features is None else torch.cat([self._features, features], dim=2)

    def _next_frames(self, num_frames: int) -> Tensor:
        """So many more drawings [B, 3, n, H, W] in [0, 1]; past the pose's end its last one."""
        frames, missing = [], num_frames
        while missing and self._waiting is not None:
            frames.append(self._prepared(self._waiting[:, :missing]))
            missing -= frames[-1].shape[2]
            self._num_came += frames[-1].shape[2]
            rest = self._waiting.shape[1] - frames[-1].shape[2]
            self._waiting = self._waiting[:, -rest:] if rest else self._next_piece()
        if frames:
            self._last = frames[-1][:, :, -1:].clone()
        if missing:
            frames.append(self._last.expand(-1, -1, missing, -1, -1))
        return torch.cat(frames, dim=2)

    def _next_piece(self) -> Tensor | None:
        piece = next((piece for piece in self._pieces if piece.shape[1]), None)
        if piece is not None and (piece.ndim != 5 or piece.shape[2] != 3 or piece.shape[0] not in (1, self._size[0])):
            raise ValueError(
                f"the pose is {list(piece.shape)}; [{self._size[0]}, frames, 3, height, width] is needed, one clip per "
                "prompt (or one for all)"
            )
        return piece

    def _prepared(self, drawings: Tensor) -> Tensor:
        return prepare_drawings(drawings, self._size[1:]).to(self._device).expand(self._size[0], -1, -1, -1, -1)


def prepare_drawings(drawings: Tensor, size: tuple[int, int]) -> Tensor:
    """Drawings [B, F, 3, h, w], uint8 or floats in [0, 1] -> [B, 3, F, H, W] float32, stretched to size = (H, W)."""
    if drawings.dtype == torch.uint8:
        drawings = drawings.float() / 255
    elif drawings.numel() and float(drawings.max()) > 1.01:
        raise ValueError(
            f"a pose drawing reaches {float(drawings.max()):.0f}; give floats in [0, 1], or uint8 for 0 to 255"
        )
    drawings = drawings.float()
    if tuple(drawings.shape[-2:]) != tuple(size):
        stretched = F.interpolate(drawings.flatten(0, 1), size, mode="bilinear", antialias=True)
        drawings = stretched.unflatten(0, drawings.shape[:2])
    return drawings.transpose(1, 2)


class PoseNetworks(NamedTuple):
    """What a checkpoint holds for pose."""

    video: DWPoseEmbedding
    reference: RandomRefPoseEmbedding | None
    found: dict[str, int]  # tensors of each network


def load_pose_networks(path: str | Path, model: WanModel, device: torch.device) -> PoseNetworks:
    """Both pose networks of a checkpoint in float32, and its pose_proj, if it has one, into the model.

    Raises ValueError for a checkpoint without them, an incomplete one, or one whose width the model does not take.
    """
    tensors = read_tensors(path)
    weights = {
        name: pose_weights(tensors, name) for name in ("dwpose_embedding", "randomref_embedding_pose", "pose_proj")
    }
    found = {name: len(its) for name, its in weights.items() if its}
    if "dwpose_embedding" not in found:
        heads = ", ".join(sorted({name.split(".")[0] for name in tensors})[:5])
        raise ValueError(
            f"{path} holds no pose networks: none of its {len(tensors)} tensors is named dwpose_embedding.* (there "
            f"are {heads}); give UniAnimate's checkpoint or one that was trained here"
        )

    def network(name: str, kind: type[nn.Module], last: str) -> nn.Module:
        own = weights[name]
        if last not in own:
            raise ValueError(f"{path} does not fit this model: missing {name}.{last}")
        with torch.device("meta"):
            module = kind(len(own[last]))
        assign_weights(
            module, {key: tensor.to(device, torch.float32) for key, tensor in own.items()}, f"{path} ({name})"
        )
        return module.eval().requires_grad_(False)

    video = network("dwpose_embedding", DWPoseEmbedding, "12.weight")
    reference = None
    if "randomref_embedding_pose" in found:
        reference = network("randomref_embedding_pose", RandomRefPoseEmbedding, "10.weight")
    model.add_pose_proj(video.out_dim)
    if "pose_proj" in found:
        own = {key: tensor.to(model.device, model.dtype) for key, tensor in weights["pose_proj"].items()}
        assign_weights(model.pose_proj, own, f"{path} (pose_proj)")
        model.pose_proj.requires_grad_(False)
    logger.info("pose networks from %s: %s", path, ", ".join(f"{name} {number}" for name, number in found.items()))
    if isinstance(model.pose_proj, nn.Linear) and not model.pose_proj.weight.any():
        logger.warning(
            "pose_proj (%d -> %d) is all zeros: nobody trained it, and the pose will change nothing. It is exact where "
            "no projection is needed (14B) and learned elsewhere; see docs/control.md",
            *(model.pose_proj.in_features, model.pose_proj.out_features),
        )
    return PoseNetworks(video, reference, found)
