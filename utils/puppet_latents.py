"""Endless puppet clips, rendered and encoded while the run goes on."""

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

from utils.dataset import Samples, TrainingData
from utils.distributed import SampleRngs, mix_seed
from world.captions import captions
from world.puppet import sample_scenes
from world.render import render

logger = logging.getLogger(__name__)

CAPTIONS_PER_CLIP = 4
CLIPS_PER_RANK = 2**32  # scene numbers set aside for each rank


class PuppetLatents(TrainingData):
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
        tokenize: Callable[[list[str]], tuple[Tensor, Tensor]],
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
        split: str = "train",
    ):
        """encode: pixels [B, F_px, 3, size, size] in [-1, 1] -> latents [B, F, C, h, w]; size: side of a frame.
        tokenize: prompts -> ids and mask, int64 [B, T] each, of one length T; done once per caption, not once per draw.
        """
        if pool_size % chunk_size:
            raise ValueError(
                f"data.pool_size {pool_size} is no multiple of data.encode_batch_size {chunk_size}; "
                f"use {max(1, pool_size // chunk_size) * chunk_size}"
            )
        if not 0 < min_fill <= pool_size:
            raise ValueError(f"data.min_fill is {min_fill}; it lies between 1 and data.pool_size = {pool_size}")
        self.encode, self.tokenize, self.split = encode, tokenize, split
        self.seed, self.first_clip = seed, rank * CLIPS_PER_RANK
        self.num_frames, self.size = 1 + 4 * (num_latent_frames - 1), size
        self.pool_size, self.min_fill, self.refresh_per_step = pool_size, min_fill, refresh_per_step
        self.chunk_size, self.device, self.dtype = chunk_size, device, dtype
        self.latents: Tensor | None = None  # [pool_size, F, C, h, w]
        self.tokens: Tensor | None = None  # int32 [pool_size, CAPTIONS_PER_CLIP, 2, T]: ids and mask
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

    def draw(self, rngs: SampleRngs) -> Samples:
        """For every sample any clip of this rank's pool, and any of its captions."""
        clip, caption = rngs.rand(2).unbind(1)
        newest = self.num_chunks * self.chunk_size - 1
        clips = (newest - (clip * len(self)).long()) % self.pool_size
        ids, mask = self.tokens[clips, (caption * CAPTIONS_PER_CLIP).long()].long().unbind(1)
        return Samples(ids, mask, latents=self.latents[clips])

    def _chunks_at(self, step: int) -> int:
        return -(-(self.min_fill + step * self.refresh_per_step) // self.chunk_size)

    @torch.no_grad()
    def _make_chunk(self, chunk: int) -> None:
        first = self.first_clip + chunk * self.chunk_size
        scenes = sample_scenes(self.chunk_size, self.seed, self.split, start=first, device=self.device)
        told = scenes.to("cpu")  # before the rendering is queued: the host words captions while the device renders
        latents = self.encode(render(scenes, self.num_frames, size=self.size)).to(self.dtype)
        variants = [captions(told, mix_seed(self.seed, first, v)) for v in range(CAPTIONS_PER_CLIP)]
        ids_and_mask = torch.stack(self.tokenize([text for texts in variants for text in texts]), dim=1)
        tokens = ids_and_mask.int().unflatten(0, (CAPTIONS_PER_CLIP, self.chunk_size)).transpose(0, 1)
        if self.latents is None:
            self.latents = latents.new_zeros(self.pool_size, *latents.shape[1:])
            self.tokens = torch.zeros(self.pool_size, *tokens.shape[1:], dtype=tokens.dtype, device=self.device)
        place = chunk * self.chunk_size % self.pool_size
        self.latents[place : place + self.chunk_size] = latents
        self.tokens[place : place + self.chunk_size] = tokens.to(self.device)
