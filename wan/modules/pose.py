"""Pose networks of UniAnimate-DiT (arXiv 2504.11289) under their published names, and their exact streaming form.

    frames [B, 3, F_px, 8H, 8W] -> features [B, 64, F, H/2, W/2] -> tokens [B, out_dim, F, H/2, W/2]

The last convolution sees four positions of 16 channels and nothing else, so that 64 numbers say all about a token: they
are what is kept, and the matrix that makes out_dim of them is applied where they are read.
"""

from collections.abc import Mapping
from typing import Self

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

HIDDEN_DIM = 16
NUM_START_COPIES = 3  # the first frame comes three times more, so that 1 + 4n frames make 1 + n latents
PUSH_FRAMES = 8  # a long clip is pushed in pieces of this many frames: the memory of a clip does not grow with it


class DWPoseEmbedding(nn.Sequential):
    """Drawings of a moving skeleton to tokens that are added to the video's: state dict `{0, 2, ..., 12}.*`."""

    def __init__(self, out_dim: int = 5120):
        layers: list[nn.Module] = []
        channels = 3
        for stride in ((1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2)):
            layers += [nn.Conv3d(channels, HIDDEN_DIM, 3, stride=stride, padding=1), nn.SiLU()]
            channels = HIDDEN_DIM
        super().__init__(*layers, nn.Conv3d(HIDDEN_DIM, out_dim, (1, 2, 2), stride=(1, 2, 2)))

    @property
    def out_dim(self) -> int:
        return self[-1].out_channels

    @property
    def rank(self) -> int:
        """Numbers per token in front of the last matrix: 64."""
        return self[-1].weight[0].numel()

    def forward(self, frames: Tensor) -> Tensor:
        """frames [B, 3, F_px, 8H, 8W] in [0, 1] -> [B, out_dim, F, H/2, W/2], F = 1 + ceil((F_px - 1) / 4)."""
        frames = _with_start(frames)
        if frames.is_cuda:  # what cuDNN's kernels for few channels want
            frames = frames.contiguous(memory_format=torch.channels_last_3d)
        return super().forward(frames)

    def init_weights(self) -> Self:
        """Weights under which a drawing, black for the most part, makes tokens of about 0.6.

        SiLU halves what is small, hence N(0, 4 / fan_in); twice that deviation in front, where little is lit. Torch's
        own start would make tokens of a thousandth, and a pose_proj that begins at zero would wait long for them.
        """
        for place, layer in enumerate(self):
            if isinstance(layer, nn.Conv3d):
                gain = 4 if place == 0 else 1 if layer is self[-1] else 2
                nn.init.normal_(layer.weight, std=gain / layer.weight[0].numel() ** 0.5)
                nn.init.zeros_(layer.bias)
        return self

    def features(self, frames: Tensor) -> Tensor:
        """The same in front of the last matrix, [B, 64, F, H/2, W/2], in the memory of a few frames."""
        encoder = StreamingPoseEncoder(self)
        return torch.cat([encoder.push(frames), encoder.flush()], dim=2)

    @torch.no_grad()
    def last_linear(self) -> nn.Linear:
        """The last convolution as a matrix on features, 64 -> out_dim."""
        return fold_pose_proj(self, nn.Identity())


class RandomRefPoseEmbedding(nn.Sequential):
    """The drawing of a reference image's skeleton to what is added to `y`: state dict `{0, 2, ..., 10}.*`."""

    def __init__(self, out_dim: int = 20):
        layers: list[nn.Module] = []
        channels = 3
        for stride in (1, 1, 1, 2, 2):
            layers += [nn.Conv2d(channels, HIDDEN_DIM, 3, stride=stride, padding=1), nn.SiLU()]
            channels = HIDDEN_DIM
        super().__init__(*layers, nn.Conv2d(HIDDEN_DIM, out_dim, 3, stride=2, padding=1))

    def forward(self, drawing: Tensor) -> Tensor:
        """drawing [B, 3, 8H, 8W] in [0, 1] -> [B, out_dim, H, W]."""
        return super().forward(drawing)


class StreamingPoseEncoder:
    """DWPoseEmbedding over frames that arrive in pieces of any size: the features of the whole clip, in fixed memory.

    Every convolution over time keeps the one or two input frames that its next output still needs; the zero frames that
    padded the whole clip are the first it ever sees and the last, which `flush` brings. Latent v comes with frame
    4v + 4 (a latent looks four frames ahead), the last one with `flush`.

    Nothing is changed in place: `peek` can look into a future that is only supposed.
    """

    def __init__(self, embedding: DWPoseEmbedding):
        self.embedding = embedding
        self._convolutions = [layer for layer in [*embedding][:-1] if isinstance(layer, nn.Conv3d)]
        self._waiting: list[Tensor | None] = [None] * len(self._convolutions)
        self._newest: Tensor | None = None

    def push(self, frames: Tensor) -> Tensor:
        """frames [B, 3, n, 8H, 8W] in [0, 1] -> features [B, 64, f, H/2, W/2] of the latents that are now certain."""
        if not frames.shape[2]:
            raise ValueError("no frames to push: give at least one")
        if self._newest is None:
            frames = _with_start(frames)
        self._newest = frames[:, :, -1:].clone()
        return torch.cat([self._advance(piece) for piece in frames.split(PUSH_FRAMES, dim=2)], dim=2)

    def flush(self) -> Tensor:
        """Features of the latents that waited for frames which will not come. The stream is then at its end."""
        if self._newest is None:
            raise ValueError("no frames were pushed: a pose needs at least one")
        return self._advance(None)

    def peek(self) -> Tensor:
        """Features of the next latent, should the newest frame stay as it is. The stream does not move."""
        waiting, newest = list(self._waiting), self._newest
        ahead = self.push(self._newest.expand(-1, -1, 4, -1, -1))
        self._waiting, self._newest = waiting, newest
        return ahead

    @property
    def num_bytes(self) -> int:
        """Memory of what waits."""
        return sum(tensor.nbytes for tensor in (*self._waiting, self._newest) if tensor is not None)

    def _advance(self, x: Tensor | None) -> Tensor:
        """One piece through all layers; None: the zero frame on every layer's right."""
        at_end = x is None
        for i, layer in enumerate(self._convolutions):
            if at_end:
                zero = torch.zeros_like(self._waiting[i][:, :, :1])
                x = zero if x is None else torch.cat([x, zero], dim=2)
            before = self._waiting[i]
            if before is None:
                before = x.new_zeros(*x.shape[:2], 1, *x.shape[3:])  # the zero frame on its left
            x = torch.cat([before, x], dim=2)
            stride = layer.stride[0]
            num_outputs = max(0, (x.shape[2] - 3) // stride + 1)
            self._waiting[i] = x[:, :, num_outputs * stride :].clone()  # a copy: a view would keep the whole piece
            if num_outputs:
                # Time is padded already; space as the layer says.
                x = F.conv3d(x, layer.weight, layer.bias, layer.stride, (0, *layer.padding[1:]))
                x = F.silu(x)
            else:
                size = [(side - 1) // step + 1 for side, step in zip(x.shape[3:], layer.stride[1:], strict=True)]
                x = x.new_zeros(x.shape[0], layer.out_channels, 0, *size)
        return _to_features(x)


def fold_pose_proj(embedding: DWPoseEmbedding, pose_proj: nn.Module) -> nn.Linear:
    """The last convolution and a model's pose_proj in one matrix [dim, 64], float32: P (W f + b) + p, exactly.

    pose_proj: a Linear out_dim -> dim, or Identity (14B, whose tokens are as wide as the embedding's).
    """
    last = embedding[-1]
    with torch.no_grad():
        weight, bias = last.weight.flatten(1).float(), last.bias.float()
        if isinstance(pose_proj, nn.Linear):
            if pose_proj.in_features != embedding.out_dim:
                raise ValueError(
                    f"the pose embedding makes {embedding.out_dim} numbers per token, pose_proj takes "
                    f"{pose_proj.in_features}; load the embedding that the model was trained with"
                )
            matrix = pose_proj.weight.to(weight)
            weight, bias = matrix @ weight, matrix @ bias + pose_proj.bias.to(bias)
        folded = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
        folded.weight.copy_(weight)
        folded.bias.copy_(bias)
    return folded.requires_grad_(False)


def project_features(features: Tensor, matrix: nn.Linear) -> Tensor:
    """Features [B, 64, F, H/2, W/2] -> [B, dim, F, H/2, W/2]."""
    return matrix(features.movedim(1, -1)).movedim(-1, 1)


def pose_weights(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one network (`dwpose_embedding` or `randomref_embedding_pose`) in a checkpoint of many things.

    Found by `name.` anywhere in a key, as the published loader does, so that prefixes of any kind may stand before it.
    """
    return {key.split(f"{name}.", 1)[1]: tensor for key, tensor in tensors.items() if f"{name}." in key}


def _with_start(frames: Tensor) -> Tensor:
    return torch.cat([frames[:, :, :1].expand(-1, -1, NUM_START_COPIES, -1, -1), frames], dim=2)


def _to_features(x: Tensor) -> Tensor:
    """[B, 16, F, H, W] -> [B, 64, F, H/2, W/2]: what the last convolution's (16, 1, 2, 2) weights are laid over."""
    batch, channels, frames, height, width = x.shape
    x = x[..., : height // 2 * 2, : width // 2 * 2]  # as that convolution does with an odd row
    x = x.reshape(batch, channels, frames, height // 2, 2, width // 2, 2)
    return x.permute(0, 1, 4, 6, 2, 3, 5).reshape(batch, channels * 4, frames, height // 2, width // 2)
