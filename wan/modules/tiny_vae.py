"""The tiny VAE of the TAEHV family (https://github.com/madebyollin/taehv, MIT), written for streaming.

It stands in for `WanVAE`: the same latents, a twentieth of the work, softer pictures. Images are convolved one by one;
time enters only where a `MemoryBlock` looks at the frame before, and where `TimeGrow` makes two frames of one.

    latents              0       |       1       |       2       | ...
    decoded   (x) (x) (x) 0      |  1   2   3  4 |  5   6   7  8 | ...    the first latent's first frames are dropped
    encoded   0   1   2   3      |  4   5   6  7 |  8   9  10 11 | ...    so one latent holds other frames than it shows

Submodule names and places are those of `taew2_1.pth`: they are the checkpoint.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.modules.vae import History, VAECache, check_continues, check_latents, load_as

BLOCKS_PER_LEVEL = 3  # memory blocks at each size, as published


class Squash(nn.Module):
    """Latents pressed into (-3, 3), smoothly: what lies further out is no picture."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def conv3x3(in_dim: int, out_dim: int, **options) -> nn.Conv2d:
    return nn.Conv2d(in_dim, out_dim, 3, padding=1, **options)


class MemoryBlock(nn.Module):
    """A residual block that sees each frame beside the one before it; before the first there is black (zeros)."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Sequential(
            conv3x3(2 * dim, dim), nn.ReLU(), conv3x3(dim, dim), nn.ReLU(), conv3x3(dim, dim)
        )  # fmt: skip
        self.slot = 0  # index in the History, numbered by the TinyVAE

    def forward(self, x: Tensor, batch: int, history: History | None) -> Tensor:
        """[B T, C, H, W] -> the same."""
        frames = x.unflatten(0, (batch, -1))  # [B, T, C, H, W]
        past = None if history is None else history[self.slot]
        before = torch.zeros_like(frames[:, :1]) if past is None else past
        if history is not None:
            # Not preserve_format: see wan.modules.vae.CausalConv3d.keep.
            history[self.slot] = frames[:, -1].detach().clone(memory_format=torch.channels_last)[:, None]
        before = torch.cat([before, frames[:, :-1]], dim=1).flatten(0, 1)
        return F.relu(self.conv(torch.cat([x, before], dim=1)) + x)


class TimeShrink(nn.Module):
    """One frame of `stride`: [B T, C, H, W] -> [B T / stride, C, H, W]."""

    def __init__(self, dim: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(stride * dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.unflatten(0, (-1, self.stride)).flatten(1, 2))


class TimeGrow(nn.Module):
    """`stride` frames of one: [B T, C, H, W] -> [B T stride, C, H, W]."""

    def __init__(self, dim: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(dim, stride * dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).unflatten(1, (self.stride, -1)).flatten(0, 1)


class TinyVAE(nn.Module):
    """[B, 3, T, H, W] in [-1, 1] <-> normalised latents [B, C, F, h, w], as `WanVAE` takes and gives them.

    decoder_channels: of the latents' own size and of the size after each step up; decoder_space_upscale and
    decoder_time_upscale: what a step doubles. The encoder goes the other way with encoder_channels at every size
    (None: the file has no encoder). patch_size: pixels folded into channels at the outer ends.
    The defaults are those of `taew2_1.pth`.
    """

    def __init__(
        self,
        latent_channels: int = 16,
        encoder_channels: int | None = 64,
        decoder_channels: Sequence[int] = (256, 128, 64, 64),
        decoder_space_upscale: Sequence[bool] = (True, True, True),
        decoder_time_upscale: Sequence[bool] = (False, True, True),
        patch_size: int = 1,
    ):
        super().__init__()
        if not len(decoder_channels) - 1 == len(decoder_space_upscale) == len(decoder_time_upscale):
            raise ValueError(
                f"{len(decoder_channels)} decoder_channels have {len(decoder_channels) - 1} steps between them, but "
                f"decoder_space_upscale names {len(decoder_space_upscale)} and decoder_time_upscale "
                f"{len(decoder_time_upscale)}"
            )
        self.latent_channels = latent_channels
        self.outer_channels = decoder_channels[-1]
        self.patch_size = patch_size
        self.spatial_stride = patch_size * 2 ** sum(decoder_space_upscale)
        self.temporal_stride = 2 ** sum(decoder_time_upscale)
        steps = list(zip(decoder_space_upscale, decoder_time_upscale, strict=True))
        pixel_dim = 3 * patch_size**2
        self.encoder = self._build_encoder(pixel_dim, encoder_channels, steps) if encoder_channels else None
        self.decoder = self._build_decoder(pixel_dim, decoder_channels, steps)
        for part in filter(None, (self.encoder, self.decoder)):
            for slot, block in enumerate(memory_blocks(part)):
                block.slot = slot

    def _build_encoder(self, pixel_dim: int, dim: int, steps: list[tuple[bool, bool]]) -> nn.Sequential:
        layers: list[nn.Module] = [conv3x3(pixel_dim, dim), nn.ReLU()]
        for space, time in reversed(steps):
            layers += [TimeShrink(dim, 1 + time), conv3x3(dim, dim, stride=1 + space, bias=False)]
            layers += [MemoryBlock(dim) for _ in range(BLOCKS_PER_LEVEL)]
        return nn.Sequential(*layers, conv3x3(dim, self.latent_channels))

    def _build_decoder(self, pixel_dim: int, dims: Sequence[int], steps: list[tuple[bool, bool]]) -> nn.Sequential:
        layers: list[nn.Module] = [Squash(), conv3x3(self.latent_channels, dims[0]), nn.ReLU()]
        for (in_dim, out_dim), (space, time) in zip(pairwise(dims), steps, strict=True):
            layers += [MemoryBlock(in_dim) for _ in range(BLOCKS_PER_LEVEL)]
            layers += [nn.Upsample(scale_factor=1 + space), TimeGrow(in_dim, 1 + time)]
            layers += [conv3x3(in_dim, out_dim, bias=False)]
        return nn.Sequential(*layers, nn.ReLU(), conv3x3(dims[-1], pixel_dim))

    def make_cache(self) -> VAECache:
        """Memory for a new video, for either direction."""
        counts = (0 if part is None else len(memory_blocks(part)) for part in (self.encoder, self.decoder))
        return VAECache(*([None] * count for count in counts))

    def decode(self, latents: Tensor, cache: VAECache | None = None) -> Tensor:
        """Pixels of normalised latents [B, C, F, h, w]: a clip, or the next frames of one if a cache is given.

        Returns [B, 3, T, H, W], around [-1, 1] but not clamped; the first latent of a video gives 1 frame, every other
        one `temporal_stride`. Raises ValueError for other shapes.
        """
        history = None if cache is None else cache.decoder
        check_latents(latents, self.latent_channels)
        check_continues(history, latents)
        is_first = history is None or history[0] is None
        frames = self.decode_frames(latents, history)
        return frames[:, :, self.temporal_stride - 1 :] if is_first else frames

    def decode_frames(self, latents: Tensor, history: History | None = None) -> Tensor:
        """`temporal_stride` frames of every latent, those that a video does not show included."""
        x = 2 * run(self.decoder, latents, history) - 1
        return x if self.patch_size == 1 else per_frame_shuffle(x, F.pixel_shuffle, self.patch_size)

    def encode(self, video: Tensor, cache: VAECache | None = None) -> Tensor:
        """Normalised latents of a clip [B, 3, T, H, W] in [-1, 1], or of its next frames if a cache is given.

        A length that does not divide by temporal_stride is filled up with the last frame, so only the last chunk of a
        video may have one. Returns [B, C, F, h, w].
        """
        if self.encoder is None:
            raise ValueError("this tiny VAE has no encoder; encode with the full VAE, whose latents are the same")
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[2] == 0:
            raise ValueError(f"a video is [B, 3, T, H, W] with T > 0, got {list(video.shape)}")
        history = None if cache is None else cache.encoder
        check_continues(history, video)
        missing = -video.shape[2] % self.temporal_stride
        x = torch.cat([video, video[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2) / 2 + 0.5
        x = x if self.patch_size == 1 else per_frame_shuffle(x, F.pixel_unshuffle, self.patch_size)
        return run(self.encoder, x, history)


def memory_blocks(part: nn.Module) -> list[MemoryBlock]:
    return [layer for layer in part if isinstance(layer, MemoryBlock)]


def run(part: nn.Sequential, x: Tensor, history: History | None) -> Tensor:
    """[B, C, T, H, W] through layers that take [B T, C, H, W], channels last."""
    batch = x.shape[0]
    x = x.movedim(1, -1).flatten(0, 1).movedim(-1, 1).contiguous(memory_format=torch.channels_last)
    for layer in part:
        x = layer(x, batch, history) if isinstance(layer, MemoryBlock) else layer(x)
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def per_frame_shuffle(x: Tensor, shuffle, patch_size: int) -> Tensor:
    """Pixels into channels or back: [B, C, T, H, W] -> [B, C', T, H', W']."""
    return shuffle(x.transpose(1, 2), patch_size).transpose(1, 2)


def load_tiny_vae(path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> TinyVAE:
    """The tiny VAE in a `.pth` or `.safetensors` file, in eval mode.

    Sizes come from `<stem>.json` beside it; without one they are those of `taew2_1.pth`. Raises FileNotFoundError, or
    ValueError with the first names and shapes that do not fit.
    """
    return load_as(TinyVAE, "tiny VAE", path, device, dtype)
