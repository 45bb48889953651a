"""Training data: endless puppet clips, rendered and encoded while the run goes on."""

import logging
import random
import time
from collections.abc import Callable

import torch
from torch import Tensor

from utils.distributed import mix_seed
from world.captions import captions
from world.puppet import sample_scenes
from world.render import Painter, render

logger = logging.getLogger(__name__)

CAPTIONS_PER_CLIP = 4
CLIPS_PER_RANK = 2**32  # scene numbers set aside for each rank


class PuppetLatents:
    """A pool of encoded puppet clips that is renewed as training goes on.

    Clip n of a rank is the same in every run of a seed. At step s the clips 0 .. min_fill + s * refresh_per_step - 1
    have been made (rounded up to whole chunks) and the newest pool_size of them are in the pool:

        step 0   [0 1 2 3 . . . .]      min_fill 4, pool_size 8, refresh_per_step 2
        step 1   [0 1 2 3 4 5 . .]
        step 3   [8 9 2 3 4 5 6 7]

    so that a resumed run finds the pool of the interrupted one by making its clips again.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        *,
        seed: int,
        rank: int,
        num_latent_frames: int,
        size: int,
        pool_size: int,
        min_fill: int,
        refresh_per_step: int,
        chunk_size: int,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        painter: Painter | None = None,
        split: str = "train",
    ):
        """encode: pixels [B, F_px, 3, size, size] in [-1, 1] -> latents [B, F, C, h, w]; size: side of a frame."""
        if pool_size % chunk_size:
            raise ValueError(
                f"data.pool_size {pool_size} is no multiple of data.encode_batch_size {chunk_size}; "
                f"use {max(1, pool_size // chunk_size) * chunk_size}"
            )
        if not 0 < min_fill <= pool_size:
            raise ValueError(f"data.min_fill is {min_fill}; it lies between 1 and data.pool_size = {pool_size}")
        self.encode, self.painter, self.split = encode, painter, split
        self.seed, self.first_clip = seed, rank * CLIPS_PER_RANK
        self.num_frames, self.size = 1 + 4 * (num_latent_frames - 1), size
        self.pool_size, self.min_fill, self.refresh_per_step = pool_size, min_fill, refresh_per_step
        self.chunk_size, self.device, self.dtype = chunk_size, device, dtype
        self.latents: Tensor | None = None  # [pool_size, F, C, h, w]
        self.captions: list[list[str]] = [[] for _ in range(pool_size)]
        self.oldest_chunk = self.num_chunks = 0  # the pool holds (some of) the chunks oldest_chunk .. num_chunks - 1

    def __len__(self) -> int:
        """Clips in the pool."""
        return min((self.num_chunks - self.oldest_chunk) * self.chunk_size, self.pool_size)

    def fill(self, step: int, *, whole: bool = True) -> None:
        """Make the clips that the pool of `step` holds (not whole: the newest min_fill of them); log the rate."""
        started = time.monotonic()
        wanted = self._chunks_at(step)
        held = self.pool_size // self.chunk_size if whole else self._chunks_at(0)
        self.oldest_chunk = self.num_chunks = max(0, wanted - held)
        made = (wanted - self.num_chunks) * self.chunk_size
        self.advance(step)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.monotonic() - started
        logger.info("%d clips rendered and encoded in %.0f s (%.0f clips/s)", made, seconds, made / max(seconds, 1e-9))

    def advance(self, step: int) -> None:
        """Make the clips that are due by `step`."""
        while self.num_chunks < self._chunks_at(step):
            self._make_chunk(self.num_chunks)
            self.num_chunks += 1

    def draw(self, step: int, samples: range) -> tuple[Tensor, list[str]]:
        """Latents [B, F, C, h, w] and captions of the given samples of a step: any clip, any of its captions."""
        rngs = [random.Random(mix_seed(self.seed, self.first_clip, step, i)) for i in samples]
        newest = self.num_chunks * self.chunk_size - 1
        clips = [(newest - rng.randrange(len(self))) % self.pool_size for rng in rngs]
        prompts = [rng.choice(self.captions[clip]) for rng, clip in zip(rngs, clips, strict=True)]
        return self.latents[torch.tensor(clips, device=self.device)], prompts

    def _chunks_at(self, step: int) -> int:
        return -(-(self.min_fill + step * self.refresh_per_step) // self.chunk_size)

    @torch.no_grad()
    def _make_chunk(self, chunk: int) -> None:
        first = self.first_clip + chunk * self.chunk_size
        scenes = sample_scenes(self.chunk_size, self.seed, self.split, start=first, device=self.device)
        pixels = render(scenes, self.num_frames, size=self.size, painter=self.painter)
        latents = self.encode(pixels).to(self.dtype)
        if self.latents is None:
            self.latents = torch.zeros(self.pool_size, *latents.shape[1:], dtype=self.dtype, device=self.device)
        place = chunk * self.chunk_size % self.pool_size
        self.latents[place : place + self.chunk_size] = latents
        scenes = scenes.to("cpu")
        variants = [captions(scenes, mix_seed(self.seed, first, v)) for v in range(CAPTIONS_PER_CLIP)]
        self.captions[place : place + self.chunk_size] = [list(of_clip) for of_clip in zip(*variants, strict=True)]
