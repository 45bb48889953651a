"""Endless puppet clips, rendered and encoded while the run goes on."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from utils.config import ControlConfig
from utils.dataset import Controls, Samples, TrainingData, upload
from utils.distributed import SampleRngs, mix_seed
from utils.pose.draw import draw
from world.captions import captions
from world.hashing import hash_int, hash_tensor, uniform
from world.puppet import ACTIONS, CANVAS, JOINT_NAMES, Scenes, joints, sample_scenes
from world.render import render

logger = logging.getLogger(__name__)

CAPTIONS_PER_CLIP = 4
STEERED_CAPTIONS = 2  # of a clip with controls, of each of two kinds besides: another action; the action only
HIDDEN = 0.2  # of the joints of a skeleton that lacks some
MOMENTS = 160  # frames after a clip among which its reference is taken
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
        control: ControlConfig | None = None,
    ):
        """control: clips come with drawings of their skeletons and a picture of the same puppet, `Samples.controls`.
        The drawings take 4 MB a clip of 81 frames at 128 x 128.

        encode: pixels [B, F_px, 3, size, size] in [-1, 1] -> latents [B, F, C, h, w]; size: side of a frame.
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
        self.chunk_size, self.device, self.dtype, self.control = chunk_size, device, dtype, control
        self.latents: Tensor | None = None  # [pool_size, F, C, h, w]
        self.tokens: Tensor | None = None  # int32 [pool_size, captions of a clip, 2, T]: ids and mask
        self.drawings: Tensor | None = None  # uint8 [pool_size, F_px, 3, size, size]
        self.references: Tensor | None = None  # [pool_size, 1, C, h, w]
        self.reference_drawings: Tensor | None = None  # uint8 [pool_size, 1, 3, size, size]
        self._places: dict[range, tuple[Tensor, Tensor, Tensor]] = {}
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
        clip, caption, *steer = rngs.rand(2 if self.control is None else 6).unbind(1)
        newest = self.num_chunks * self.chunk_size - 1
        clips = (newest - (clip * len(self)).long()) % self.pool_size
        variant, controls = (caption * CAPTIONS_PER_CLIP).long(), None
        if self.control is not None:
            steered = (caption * STEERED_CAPTIONS).long() + CAPTIONS_PER_CLIP
            variant, controls = self._steer(clips, variant, steered, steer, rngs.samples)
        ids, mask = self.tokens[clips, variant].long().unbind(1)
        return Samples(ids, mask, latents=self.latents[clips], controls=controls)

    def _steer(
        self, clips: Tensor, variant: Tensor, steered: Tensor, numbers: list[Tensor], samples: range
    ) -> tuple[Tensor, Controls]:
        """Controls of the samples, and the captions that go with them.

        Who has a pose or an image depends on the sample's number, so that every batch holds as many and a captured pass
        finds its shapes again; what it is depends on drawn numbers, [B] each.
        """
        control, (wrong, unsaid, kind, told) = self.control, numbers
        if samples not in self._places:
            self._places[samples] = tuple(upload(places, self.device) for places in who(samples, control))
        posed, plain, imaged = self._places[samples]
        none = torch.zeros_like(clips, dtype=torch.bool)
        is_posed, is_imaged = none.index_fill(0, posed, True), none.index_fill(0, imaged, True)
        variant = torch.where(is_posed & (wrong < control.wrong_action), steered, variant)
        variant = torch.where(is_imaged & (unsaid < control.unsaid_looks), steered + STEERED_CAPTIONS, variant)
        shown = clips[imaged]
        return variant, Controls(
            drawings=self.drawings[clips[posed]],
            posed=posed,
            plain=plain,
            imaged=imaged,
            references=self.references[shown],
            reference_drawings=self.reference_drawings[shown],
            reference_posed=~is_posed[imaged] | (told[imaged] >= control.reference_pose_dropout),
            first_frame=kind[imaged] < control.first_frame,
        )

    def _chunks_at(self, step: int) -> int:
        return -(-(self.min_fill + step * self.refresh_per_step) // self.chunk_size)

    @torch.no_grad()
    def _make_chunk(self, chunk: int) -> None:
        first = self.first_clip + chunk * self.chunk_size
        scenes = sample_scenes(self.chunk_size, self.seed, self.split, start=first, device=self.device)
        told = scenes.to("cpu")  # before the rendering is queued: the host words captions while the device renders
        latents = self.encode(render(scenes, self.num_frames, size=self.size)).to(self.dtype)
        variants = [captions(told, mix_seed(self.seed, first, v)) for v in range(CAPTIONS_PER_CLIP)]
        place = chunk * self.chunk_size % self.pool_size
        if self.control is not None:
            variants += self._steered_captions(told, first)
            shown = self._shown_joints(first)
            self._keep("drawings", skeletons(scenes, self.num_frames, size=self.size, shown=shown), place)
            moment = self.num_frames + mix_seed(self.seed, first) % MOMENTS
            still = self.encode(render(scenes, 1, moment, size=self.size)).to(self.dtype)
            self._keep("references", still, place)
            self._keep("reference_drawings", skeletons(scenes, 1, moment, size=self.size), place)
        ids_and_mask = torch.stack(self.tokenize([text for texts in variants for text in texts]), dim=1)
        tokens = ids_and_mask.int().unflatten(0, (len(variants), self.chunk_size)).transpose(0, 1)
        self._keep("latents", latents, place)
        self._keep("tokens", tokens.to(self.device), place)

    def _steered_captions(self, told: Scenes, first: int) -> list[list[str]]:
        """Captions that tell of another action, and then captions that tell of the action only."""
        index = torch.arange(first, first + len(told)) + hash_int(self.seed)
        others = 1 + hash_tensor(index) % (len(ACTIONS) - 1)
        wrong = replace(told, action=(told.action + others) % len(ACTIONS))
        seeds = [mix_seed(self.seed, first, CAPTIONS_PER_CLIP + v) for v in range(2 * STEERED_CAPTIONS)]
        return [captions(wrong, seed) for seed in seeds[:STEERED_CAPTIONS]] + [
            captions(told, seed, looks=False) for seed in seeds[STEERED_CAPTIONS:]
        ]

    def _shown_joints(self, first: int) -> Tensor:
        """Which joints the skeletons of a chunk show, bool [B, 18]."""
        index = torch.arange(first, first + self.chunk_size, device=self.device)[:, None] + hash_int(self.seed + 1)
        drawn = uniform(hash_tensor(hash_tensor(index) + torch.arange(1 + len(JOINT_NAMES), device=self.device)))
        return (drawn[:, :1] >= self.control.hidden_joints) | (drawn[:, 1:] >= HIDDEN)

    def _keep(self, name: str, values: Tensor, place: int) -> None:
        """A chunk's values in the pool of that name, from `place` on."""
        if getattr(self, name) is None:
            setattr(self, name, values.new_zeros(self.pool_size, *values.shape[1:]))
        getattr(self, name)[place : place + len(values)] = values


def skeletons(
    scenes: Scenes, num_frames: int, start_frame: int = 0, *, size: int, shown: Tensor | None = None
) -> Tensor:
    """Drawings of the scenes' skeletons as inference makes them of keypoints: uint8 [B, F, 3, size, size].

    shown: bool [B, 18], the joints that they have; None: all.
    """
    frames = torch.arange(start_frame, start_frame + num_frames, device=scenes.device)
    points = joints(scenes, frames)
    if shown is not None:
        points[..., 2] *= shown[:, None]
    drawn = draw(points.flatten(0, 1), (CANVAS, CANVAS), (size, size), "body")
    return drawn.unflatten(0, points.shape[:2])


def who(samples: range, control: ControlConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Places in the batch, int64, of the samples with a pose, without an image, and with one.

    Every stretch of samples holds as many as any other of its length, and among those with a pose and those without the
    same share has an image.
    """
    has_pose, has_image = [], []
    for n in samples:
        num_before = _whole(n * (1 - control.pose_dropout))  # samples with a pose among 0 .. n - 1
        posed = _whole((n + 1) * (1 - control.pose_dropout)) > num_before
        rank, share = num_before if posed else n - num_before, 1 - control.image_dropout
        has_pose.append(posed)
        has_image.append(_whole((rank + 1) * share) > _whole(rank * share))
    posed, imaged = torch.tensor(has_pose), torch.tensor(has_image)
    return posed.nonzero()[:, 0], (~imaged).nonzero()[:, 0], imaged.nonzero()[:, 0]


def _whole(number: float) -> int:
    """Rounded down; 5 * (1 - 0.8), a little below 1 in binary, is 1."""
    return math.floor(number + 1e-6)
