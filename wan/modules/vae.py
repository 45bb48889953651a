"""Wan 2.1's 3D causal VAE, written for streaming: pixels <-> latents in chunks of any size.

A causal convolution over time looks at its own frame and the two before it. Keeping those two frames between calls
is all it takes to go on where the last call stopped; a `VAECache` holds them, one tensor per convolution, and is
handed in by the caller. Without a cache a whole clip goes through in one pass.

The first frame is special, as images are: it makes one latent alone, and one latent gives one frame.

    pixel frames    0 | 1 2 3 4 | 5 6 7 8 | ...     1 + 4 (F - 1)
    latents         0 |    1    |    2    | ...     F

Submodule names are those of `Wan2.1_VAE.pth`: they are the checkpoint.
"""

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.modules.fused import fuses, norm_silu
from wan.modules.weights import load_weights

logger = logging.getLogger(__name__)

# Statistics of the published VAE's latents, per channel (Wan 2.1 model card and code, Apache 2.0).
WAN21_LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN21_LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

# PyTorch leaves one video of at most this many C·T·H to its native 3D convolution (ATen, Convolution.cpp, use_mkldnn).
# The same frames as a batch of images, with the taps in time stacked as channels, go to oneDNN: 4 times as fast.
NATIVE_CONV3D_LIMIT = 20480

# One entry per convolution with memory: None before the first chunk, then its last input frames [B, C, 1 or 2, H, W].
History = list[Tensor | None]


@dataclass
class VAECache:
    """Where one video stands on its way through the VAE: the last input frames of every causal convolution.

    Made by `WanVAE.make_cache`, changed by `encode` and `decode`. Both directions may share one object.
    Tensors are detached copies: no gradient passes from one chunk to the next.
    """

    encoder: History = field(default_factory=list)
    decoder: History = field(default_factory=list)

    def reset(self) -> None:
        """Forget the video; the next chunk is a first one."""
        self.encoder[:] = [None] * len(self.encoder)
        self.decoder[:] = [None] * len(self.decoder)


@dataclass(frozen=True)
class Strip:
    """Columns [first, last) of latents that are `width` wide: the part of all pictures that one of many ranks makes."""

    first: int
    last: int
    width: int

    @classmethod
    def of(cls, rank: int, num_ranks: int, width: int) -> "Strip":
        return cls(width * rank // num_ranks, width * (rank + 1) // num_ranks, width)

    def window(self, scale: int, margin: int) -> tuple[int, int]:
        """The strip with so many columns on both sides, in maps `scale` times as wide; never past their edge."""
        return max(0, self.first * scale - margin), min(self.width * scale, self.last * scale + margin)


class RMSNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma over the channels of each position; dims is the number of axes after the channels."""

    def __init__(self, dim: int, dims: int = 3):
        super().__init__()
        self.scale = math.sqrt(dim)
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        # The sum of squares is taken in float32: bfloat16 would lose the small channels of a wide layer.
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min(1e-12)
        return x * (self.scale / length).to(x.dtype) * self.gamma


def per_frame(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply an image module to every frame: [B, C, T, H, W] -> [B, C', T, H', W'] (no copy if channels are last)."""
    # By way of [B, T, H, W, C]: merged directly, a single frame gets a stride from which eager and compiled
    # convolutions guess different layouts (wrong results with torch 2.13's aot_eager).
    frames = x.movedim(1, -1).flatten(0, 1).movedim(-1, 1)
    return module(frames).movedim(1, -1).unflatten(0, x.shape[:1] + (-1,)).movedim(-1, 1)


class CausalConv3d(nn.Conv3d):
    """Convolution that pads space on all sides and time only in front, with the past if there is one, else zeros."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int] = (3, 3, 3)):
        super().__init__(in_channels, out_channels, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.num_past = kernel[0] - 1
        self.slot = 0  # index in the History, numbered by the encoder or decoder that holds this layer

    def forward(self, x: Tensor, history: History | None) -> Tensor:
        return self.convolve(self.after_past(x, history))

    def of_activated(self, x: Tensor, norm: RMSNorm, history: History | None) -> Tensor:
        """`forward` of SiLU(norm(x))."""
        if not fuses(x):
            return self(F.silu(norm(x)), history)
        past = None if history is None else history[self.slot]
        x = norm_silu(x, norm.gamma, past, self.num_past)
        self.keep(x, history)
        return self.convolve(x)

    def keep(self, x: Tensor, history: History | None) -> None:
        """The last `num_past` frames of x become the next chunk's past."""
        if history is not None:
            past = x[:, :, -self.num_past :].detach()
            # Not preserve_format, which keeps the batch's stride of the longer x: chunks of another length would make
            # compiled code anew for a number that means nothing.
            history[self.slot] = past.clone(memory_format=torch.channels_last_3d)

    def convolve(self, x: Tensor) -> Tensor:
        """[B, C, num_past + T, H, W] -> [B, C', T, H, W]"""
        if x.device.type != "cpu" or x.shape[0] > 1 or x[0, :, :, :, 0].numel() > NATIVE_CONV3D_LIMIT:
            return super().forward(x)
        num_frames = x.shape[2] - self.num_past
        taps = torch.cat([x[:, :, tap : tap + num_frames] for tap in range(self.kernel_size[0])], dim=1)
        weight = self.weight.transpose(1, 2).flatten(1, 2)  # [C', 3 C, kh, kw], as the taps are stacked
        return per_frame(lambda frames: F.conv2d(frames, weight, self.bias, padding=self.padding[1:]), taps)

    def after_past(self, x: Tensor, history: History | None) -> Tensor:
        """x with `num_past` frames in front; the last `num_past` of the result become the next chunk's past."""
        past = None if history is None else history[self.slot]
        if past is None:
            x = F.pad(x, (0, 0, 0, 0, self.num_past, 0))
        else:
            x = torch.cat([past, x], dim=2)
        self.keep(x, history)
        return x


class TemporalUpConv(CausalConv3d):
    """Two frames for each frame, except the first of the video, which stays single and is no one's past.

    in   0 | 1   2   3          The past of frame 1 is therefore zero, not frame 0.
    out  0 | a b a b a b        a: first half of the channels, b: second half.
    """

    def __init__(self, dim: int):
        super().__init__(dim, 2 * dim, (3, 1, 1))

    def forward(self, x: Tensor, history: History | None) -> Tensor:
        is_first = history is None or history[self.slot] is None
        single, x = (x[:, :, :1], x[:, :, 1:]) if is_first else (x[:, :, :0], x)
        num_frames = x.shape[2]
        x = self.after_past(x, history)
        if num_frames == 0:
            return single
        pairs = self.convolve(x).movedim(1, -1).unflatten(-1, (2, -1))  # [B, T, H, W, 2, C]
        frames = pairs.movedim(4, 2).flatten(1, 2).movedim(-1, 1)
        return torch.cat([single, frames], dim=2) if is_first else frames  # a cat with nothing would copy everything


class TemporalDownConv(nn.Conv3d):
    """One frame for two, except the first of the video, which passes unchanged and is the past of the next two.

    in   0 | 1 2 | 3 4
    out  0 |  a  |  b           a sees 0 1 2, b sees 2 3 4.
    """

    def __init__(self, dim: int):
        super().__init__(dim, dim, (3, 1, 1), stride=(2, 1, 1))
        self.slot = 0

    def forward(self, x: Tensor, history: History | None) -> Tensor:
        past = None if history is None else history[self.slot]
        if history is not None:
            history[self.slot] = x[:, :, -1:].detach().clone()
        if past is not None:
            return super().forward(torch.cat([past, x], dim=2))
        if x.shape[2] == 1:
            return x
        return torch.cat([x[:, :, :1], super().forward(x)], dim=2)


class Downsample(nn.Module):
    """Halve height and width, then (temporal) the frames."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = TemporalDownConv(dim) if temporal else None

    def forward(self, x: Tensor, history: History | None) -> Tensor:
        x = per_frame(self.resample, x)
        return x if self.time_conv is None else self.time_conv(x, history)


class Upsample(nn.Module):
    """Double (temporal) the frames, then height and width, and halve the channels."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(dim, dim // 2, 3, padding=1))
        self.time_conv = TemporalUpConv(dim) if temporal else None

    def forward(self, x: Tensor, history: History | None) -> Tensor:
        x = x if self.time_conv is None else self.time_conv(x, history)
        return per_frame(self.resample, x)


class CausalSequential(nn.Sequential):
    """Layers in a row, of which the ones that look back in time are handed the history."""

    def forward(self, x: Tensor, history: History | None) -> Tensor:
        for layer in self:
            x = layer(x, history) if isinstance(layer, REMEMBERING) else layer(x)
        return x


class ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.residual = CausalSequential(
            RMSNorm(in_dim),
            nn.SiLU(),
            CausalConv3d(in_dim, out_dim),
            RMSNorm(out_dim),
            nn.SiLU(),
            nn.Identity(),  # the checkpoint counts a dropout here; it was published with rate 0
            CausalConv3d(out_dim, out_dim),
        )
        self.shortcut = nn.Identity() if in_dim == out_dim else nn.Conv3d(in_dim, out_dim, 1)

    def forward(self, x: Tensor, history: History | None) -> Tensor:
        norm1, _, conv1, norm2, _, _, conv2 = self.residual
        hidden = conv1.of_activated(x, norm1, history)
        return self.shortcut(x) + conv2.of_activated(hidden, norm2, history)


class FrameAttention(nn.Module):
    """Single-head self-attention among the positions of each frame, with a residual."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim, dims=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + per_frame(self.attend, x)

    def attend(self, frames: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]"""
        tokens = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2)[:, None]  # [N, 1, HW, 3C]
        attended = F.scaled_dot_product_attention(*tokens.chunk(3, dim=-1))
        return self.proj(attended[:, 0].unflatten(1, frames.shape[2:]).movedim(-1, 1))


REMEMBERING = (CausalConv3d, TemporalDownConv, Downsample, Upsample, ResidualBlock, CausalSequential)


def number_slots(module: nn.Module) -> int:
    """Give each convolution with memory its place in the History; returns how many there are."""
    convs = [layer for layer in module.modules() if isinstance(layer, CausalConv3d | TemporalDownConv)]
    for slot, conv in enumerate(convs):
        conv.slot = slot
    return len(convs)


class Encoder3d(nn.Module):
    """[B, pixel_dim, T, H, W] -> [B, 2 z_dim, F, h, w]: mean and log-variance."""

    def __init__(
        self,
        pixel_dim: int,
        dim: int,
        z_dim: int,
        dim_mult: tuple[int, ...],
        num_res_blocks: int,
        temporal_downsample: tuple[bool, ...],
    ):
        super().__init__()
        dims = [dim, *(dim * mult for mult in dim_mult)]
        self.conv1 = CausalConv3d(pixel_dim, dims[0])
        layers = []
        for level, (in_dim, out_dim) in enumerate(pairwise(dims)):
            layers += [ResidualBlock(in_dim if i == 0 else out_dim, out_dim) for i in range(num_res_blocks)]
            if level < len(temporal_downsample):
                layers.append(Downsample(out_dim, temporal_downsample[level]))
        self.downsamples = CausalSequential(*layers)
        top = dims[-1]
        self.middle = CausalSequential(ResidualBlock(top, top), FrameAttention(top), ResidualBlock(top, top))
        self.head = CausalSequential(RMSNorm(top), nn.SiLU(), CausalConv3d(top, 2 * z_dim))
        self.num_slots = number_slots(self)

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        x = self.conv1(x, history)
        x = self.downsamples(x, history)
        x = self.middle(x, history)
        return self.head(x, history)


class Decoder3d(nn.Module):
    """[B, z_dim, F, h, w] -> [B, pixel_dim, T, H, W]."""

    def __init__(
        self,
        pixel_dim: int,
        dim: int,
        z_dim: int,
        dim_mult: tuple[int, ...],
        num_res_blocks: int,
        temporal_downsample: tuple[bool, ...],
    ):
        super().__init__()
        dims = [dim * mult for mult in reversed(dim_mult)]
        temporal_upsample = temporal_downsample[::-1]
        top = dims[0]
        self.conv1 = CausalConv3d(z_dim, top)
        self.middle = CausalSequential(ResidualBlock(top, top), FrameAttention(top), ResidualBlock(top, top))
        layers = []
        in_dim = top
        for level, out_dim in enumerate(dims):
            layers += [ResidualBlock(in_dim if i == 0 else out_dim, out_dim) for i in range(num_res_blocks + 1)]
            if level < len(temporal_upsample):
                layers.append(Upsample(out_dim, temporal_upsample[level]))
            in_dim = out_dim // 2  # an Upsample halves the channels
        self.upsamples = CausalSequential(*layers)
        self.head = CausalSequential(RMSNorm(out_dim), nn.SiLU(), CausalConv3d(out_dim, pixel_dim))
        self.num_slots = number_slots(self)

    def forward(self, x: Tensor, history: History | None = None, strip: Strip | None = None) -> Tensor:
        x = self.conv1(x, history)
        x = self.middle(x, history)
        if strip is not None:
            return self._finish_strip(x, history, strip)
        x = self.upsamples(x, history)
        norm, _, conv = self.head
        return conv.of_activated(x, norm, history)

    def _finish_strip(self, x: Tensor, history: History | None, strip: Strip) -> Tensor:
        """What follows the attention looks a few columns around: the strip alone, cut from wider and wider maps.

        Where a map is cut, convolutions find zeros in place of neighbours. What they spoil lies in the margin, which is
        cut off before the next enlargement.
        """
        scale, start = 1, 0
        for index, (layer, margin) in enumerate(zip([*self.upsamples, self.head], self.margins, strict=True)):
            if index == 0 or isinstance(layer, Upsample):
                first, last = strip.window(scale, margin)
                x, start = x[..., first - start : last - start], first
                x = x.contiguous(memory_format=torch.channels_last_3d)
            x = layer(x, history)
            if isinstance(layer, Upsample):
                scale, start = 2 * scale, 2 * start
        first, last = strip.window(scale, 0)
        return x[..., first - start : last - start]

    @property
    def margins(self) -> list[int]:
        """Columns beside a strip that each layer of `upsamples`, and the head, needs to make the strip right."""
        margins = [1]
        for layer in reversed(self.upsamples):
            needed = margins[0]
            margins.insert(0, -(-(needed + 1) // 2) if isinstance(layer, Upsample) else needed + 2)
        return margins


class WanVAE(nn.Module):
    """Wan 2.1's VAE: [B, 3, T, H, W] in [-1, 1] <-> normalised latents [B, z_dim, F, h, w].

    dim: channels at full resolution; dim_mult: their multiples, level by level; temporal_downsample: for each step
    between levels, whether it halves the frames too; the decoder has num_res_blocks + 1 blocks a level.
    patch_size: 2 folds 2x2 pixels into channels before the first convolution, as Wan 2.2 does.
    latents_mean, latents_std: per channel; None means the published ones.
    """

    def __init__(
        self,
        dim: int = 96,
        z_dim: int = 16,
        dim_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        temporal_downsample: Sequence[bool] = (False, True, True),
        patch_size: int = 1,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ):
        super().__init__()
        if len(temporal_downsample) != len(dim_mult) - 1:
            raise ValueError(
                f"{len(dim_mult)} levels (dim_mult {tuple(dim_mult)}) have {len(dim_mult) - 1} steps between them, "
                f"but temporal_downsample names {len(temporal_downsample)}"
            )
        mean = WAN21_LATENTS_MEAN if latents_mean is None else latents_mean
        std = WAN21_LATENTS_STD if latents_std is None else latents_std
        if not len(mean) == len(std) == z_dim:
            raise ValueError(f"latents_mean has {len(mean)} and latents_std {len(std)} values for {z_dim} channels")
        self.latent_channels = z_dim
        self.outer_channels = dim  # of the maps at full size: what memory is planned by
        self.patch_size = patch_size
        self.spatial_stride = patch_size * 2 ** len(temporal_downsample)
        self.temporal_stride = 2 ** sum(temporal_downsample)

        pixel_dim = 3 * patch_size**2
        sizes = (pixel_dim, dim, z_dim, tuple(dim_mult), num_res_blocks, tuple(temporal_downsample))
        self.encoder = Encoder3d(*sizes)
        self.conv1 = nn.Conv3d(2 * z_dim, 2 * z_dim, 1)
        self.conv2 = nn.Conv3d(z_dim, z_dim, 1)
        self.decoder = Decoder3d(*sizes)

        # On the CPU even when the rest is built on the meta device: no checkpoint brings these.
        for name, values in (("latents_mean", mean), ("latents_std", std)):
            statistics = torch.tensor(values, dtype=torch.float32, device="cpu").view(-1, 1, 1, 1)
            self.register_buffer(name, statistics, persistent=False)

    def make_cache(self) -> VAECache:
        """Memory for a new video, for either direction."""
        return VAECache([None] * self.encoder.num_slots, [None] * self.decoder.num_slots)

    def encode(self, video: Tensor, cache: VAECache | None = None) -> Tensor:
        """Normalised latents (the posterior's mean) of a clip, or of its next frames if a cache is given.

        video: [B, 3, T, H, W] in [-1, 1]. T = 1 + 4n for a clip or a first chunk, 4n for the chunks after it.
        Returns [B, z_dim, F, h, w]. Raises ValueError for other lengths.
        """
        mean, _ = self._moments(video, None if cache is None else cache.encoder)
        return (mean - self.latents_mean) / self.latents_std

    def encode_moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior of a whole clip, neither normalised: what a VAE is trained with."""
        return self._moments(video, None)

    def decode(self, latents: Tensor, cache: VAECache | None = None, strip: Strip | None = None) -> Tensor:
        """Pixels of normalised latents: a clip, or the next frames of one if a cache is given.

        latents: [B, z_dim, F, h, w]. Returns [B, 3, T, H, W], around [-1, 1] but not clamped; the first latent of a
        video gives 1 frame, every other one 4. strip: these columns only, of the whole latents; the same for a video.
        """
        history = None if cache is None else cache.decoder
        check_latents(latents, self.latent_channels)
        check_continues(history, latents)
        x = self.conv2(latents * self.latents_std + self.latents_mean)
        return self._unpatchify(self.decoder(self._arrange(x), history, strip))

    def _moments(self, video: Tensor, history: History | None) -> tuple[Tensor, Tensor]:
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"a video is [B, 3, T, H, W], got {list(video.shape)}")
        num_frames, height, width = video.shape[2:]
        is_first = history is None or history[0] is None
        if num_frames % self.temporal_stride != is_first or num_frames == 0:
            wanted = f"1 + {self.temporal_stride}n" if is_first else f"{self.temporal_stride}n, n > 0"
            below = num_frames - (num_frames - is_first) % self.temporal_stride
            raise ValueError(
                f"{num_frames} frames cannot be encoded: a {'first' if is_first else 'later'} chunk has {wanted}; "
                f"use {' or '.join(str(n) for n in (below, below + self.temporal_stride) if n > 0)}"
            )
        if height % self.spatial_stride or width % self.spatial_stride:
            raise ValueError(f"{height}x{width} pixels do not divide by {self.spatial_stride}; resize or crop first")
        check_continues(history, video)
        return self.conv1(self.encoder(self._arrange(self._patchify(video)), history)).chunk(2, dim=1)

    def _arrange(self, x: Tensor) -> Tensor:
        # Channels last is the faster layout on the CPU (oneDNN) and for half precision on the GPU (cuDNN);
        # every layer keeps the layout it is given.
        return x.contiguous(memory_format=torch.channels_last_3d)

    def _patchify(self, video: Tensor) -> Tensor:
        """[B, 3, T, pH, pW] -> [B, 3 p p, T, H, W], channels ordered (colour, column, row) as in Wan 2.2."""
        p = self.patch_size
        if p == 1:
            return video
        x = video.unflatten(4, (-1, p)).unflatten(3, (-1, p))  # [B, 3, T, H, row, W, column]
        return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)

    def _unpatchify(self, x: Tensor) -> Tensor:
        p = self.patch_size
        if p == 1:
            return x
        x = x.unflatten(1, (-1, p, p))  # [B, 3, column, row, T, H, W]
        return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


def check_latents(latents: Tensor, channels: int) -> None:
    """Raise ValueError if these are not latents of so many channels."""
    if latents.ndim != 5 or latents.shape[1] != channels or latents.shape[2] == 0:
        raise ValueError(f"latents are {list(latents.shape)}, expected [B, {channels}, F, h, w] with F > 0")


def check_continues(history: History | None, x: Tensor) -> None:
    """Raise ValueError if a chunk is not of the batch that the history remembers."""
    past = None if history is None else history[0]
    if past is not None and past.shape[0] != x.shape[0]:
        raise ValueError(
            f"the cache holds a batch of {past.shape[0]} videos, the new chunk has {x.shape[0]}; "
            f"start another video with make_cache() or cache.reset()"
        )


def channels_last_weights_(vae: nn.Module) -> None:
    """Lay the weights out as the activations are: a third faster on the CPU."""
    for layer in vae.modules():
        if isinstance(layer, nn.Conv3d):
            layer.to(memory_format=torch.channels_last_3d)
        elif isinstance(layer, nn.Conv2d):
            layer.to(memory_format=torch.channels_last)


def load_vae(path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> WanVAE:
    """The VAE in a `.pth` or `.safetensors` file, in eval mode.

    Sizes and latent statistics come from `<stem>.json` beside it; without one they are Wan 2.1's.
    Raises FileNotFoundError, or ValueError with the first names and shapes that do not fit.
    """
    return load_as(WanVAE, "VAE", path, device, dtype)


def load_as(
    kind: Callable[..., nn.Module], title: str, path: str | Path, device: torch.device | str, dtype: torch.dtype
) -> nn.Module:
    """A frozen network of convolutions from a file of weights and its constructor's arguments in `<stem>.json`."""
    path = Path(path)
    sizes_file = path.with_suffix(".json")
    sizes = json.loads(sizes_file.read_text()) if sizes_file.is_file() else {}
    try:
        with torch.device("meta"):
            vae = kind(**sizes)
    except TypeError as error:
        raise ValueError(f"{sizes_file} must hold {kind.__name__}'s constructor arguments: {error}") from error
    load_weights(vae, [path], device=device, dtype=dtype)
    vae = vae.to(device, dtype).eval().requires_grad_(False)
    channels_last_weights_(vae)
    num_parameters = sum(parameter.numel() for parameter in vae.parameters())
    logger.info("%s %s: %.1fM parameters, %s on %s", title, path.name, num_parameters / 1e6, dtype, device)
    return vae
