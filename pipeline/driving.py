"""Video to video: a video that another one is made after, encoded as fast as the walk asks for it."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from pipeline.rollout import FrameBlock
from utils.wan_wrapper import WanVAEWrapper


class DrivingVideo:
    """Latents of a video, block by block, in constant memory: its end need not be known when the walk begins.

    pixels: the whole video [B, F_px, 3, H, W] in [-1, 1], or chunks of it with any number of frames. size: (B, H, W)
    that they must have. A last block that the video does not fill is filled up with its last frame; `num_frames` counts
    the frames that really came, so that what is made can be cut to them.
    """

    def __init__(self, vae: WanVAEWrapper, pixels: Tensor | Iterable[Tensor], size: tuple[int, int, int]):
        self.vae = vae
        self.num_frames = 0
        self.latents: Tensor | None = None  # [B, f, C, h, w] of the block that the walk is at
        self._size = size
        self._chunks = iter([pixels] if isinstance(pixels, Tensor) else pixels)
        self._waiting = self._next_chunk()
        self._cache = vae.make_encoder_cache()
        if self._waiting is None:
            raise ValueError("the driving video has no frames")

    def follow(self, blocks: Iterable[FrameBlock], num_hidden: int = 0) -> Iterator[FrameBlock]:
        """The blocks as long as the video goes on; `latents` are those of the block last given out.

        num_hidden: leading frames of the walk that are no part of the video.
        """
        for block in blocks:
            num_latents = block.stop - max(block.start, num_hidden)
            if num_latents > 0:
                if self._waiting is None:
                    return
                self.latents = self._encode(num_latents)
            yield block

    def _next_chunk(self) -> Tensor | None:
        chunk = next((chunk for chunk in self._chunks if chunk.shape[1]), None)
        if chunk is not None:
            batch, _, channels, height, width = chunk.shape
            if (batch, channels, height, width) != (self._size[0], 3, *self._size[1:]):
                batch, height, width = self._size
                raise ValueError(
                    f"the driving video is {list(chunk.shape)}, [{batch}, frames, 3, {height}, {width}] is needed: one "
                    "per prompt, in the size of the video that is made"
                )
        return chunk

    def _encode(self, num_latents: int) -> Tensor:
        stride = self.vae.model.temporal_stride
        wanted = num_latents * stride - (stride - 1 if self.num_frames == 0 else 0)  # the first latent is one frame
        frames, missing = [], wanted
        while missing and self._waiting is not None:
            frames.append(self._waiting[:, :missing])
            self._waiting = self._waiting[:, missing:] if self._waiting.shape[1] > missing else self._next_chunk()
            missing -= frames[-1].shape[1]
        self.num_frames += wanted - missing
        if missing:
            frames.append(frames[-1][:, -1:].expand(-1, missing, -1, -1, -1))
        return self.vae.encode_to_latent(torch.cat(frames, dim=1), cache=self._cache)


def skipped_steps(num_steps: int, strength: float) -> int:
    """Denoising steps that a driving video spares: all but the share `strength` of them, and never the last.

    strength 1 takes every step from pure noise, so that nothing of the driving video is left.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}; it lies in (0, 1]: little keeps the driving video, 1 ignores it")
    return num_steps - max(1, round(strength * num_steps))


def latents_for(num_frames: int, stride: int) -> int:
    """Latents that hold so many pixel frames."""
    return 1 + -(-(num_frames - 1) // stride)


def whole_blocks(num_frames: int, sizes: Sequence[int]) -> int:
    """num_frames, or what makes whole blocks of it: sizes are (first block or given frames, every other block)."""
    first, block = sizes
    return first + max(1, -(-(num_frames - first) // block)) * block
