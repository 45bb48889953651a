"""Latents on disk as training data: encoded clips of videos, and ODE trajectories of a teacher."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.clip_poses import ClipPoses
from utils.dataset import EpochSampler, Samples, TrainingData, Words, upload_stacked
from utils.distributed import SampleRngs
from utils.shards import Item, Shards, check_about

MOST_HELDOUT = 10  # at most one item in ten is held out


class LatentFolder(TrainingData):
    """Clips of videos with their captions, as `utils/video_folder.py` encoded them; walked in shuffled epochs.

    Row: prompt, num_clips. Tensors "clip0", "clip1", ...: [F, C, H, W]; a clip longer than asked for is cut.
    """

    kind = "latents"

    def __init__(
        self,
        folder: str | Path,
        words: Words,
        *,
        expected: Mapping[str, Any],
        num_latent_frames: int,
        seed: int,
        samples_per_step: int,
        device: torch.device,
        dtype: torch.dtype,
        split: str = "train",
        num_heldout: int = 0,
        captions: Mapping[str, str] | None = None,
        poses: ClipPoses | None = None,
    ):
        """expected: what the folder must say of itself, e.g. the fingerprint of the VAE and the size of the video.

        captions: by key, in place of those that were encoded; items that it lacks are left out.
        poses: what steers the clips besides, `Samples.controls`.

        split "heldout": the num_heldout items (at most a tenth) that "train" leaves out; the same ones for every seed.
        """
        self.shards = Shards(folder, self.kind)
        check_about(self.shards.folder, self.shards.about, expected)
        self.words, self.num_latent_frames, self.device, self.dtype = words, num_latent_frames, device, dtype
        self.check_frames(self.shards.about["num_frames"])
        if captions is None:
            captions = {item.row["key"]: item.row["prompt"] for item in self.shards.items}
        self.captions, self.poses = captions, poses
        items = self._of_split(split, num_heldout)
        self.clips = [(item, n) for item in items for n in range(item.row["num_clips"])]
        self.sampler = EpochSampler(len(self.clips), seed, samples_per_step)

    @property
    def prompts(self) -> list[str]:
        """Of all items, held-out ones too."""
        return [self.captions[item.row["key"]] for item in self.shards.items if item.row["key"] in self.captions]

    def draw(self, rngs: SampleRngs) -> Samples:
        drawn = [self.clips[n] for n in self.sampler(rngs)]
        clips = [self.read(*clip)[..., : self.num_latent_frames, :, :, :] for clip in drawn]
        latents = upload_stacked(clips, self.device).to(self.dtype)  # carried as stored: half the bytes, in bfloat16
        words = self.words([self.captions[item.row["key"]] for item, _ in drawn])
        controls = None if self.poses is None else self.poses(drawn, latents, self.read, rngs)
        return replace(words, latents=latents, controls=controls)

    def read(self, item: Item, number: int) -> Tensor:
        """Clip `number` of a video as it is stored, on the CPU."""
        return self.shards.read(item, f"clip{number}")

    def check_frames(self, num_frames: int) -> None:
        """num_frames: latent frames of each clip in the folder. Raises ValueError if training asks for others."""
        if num_frames < self.num_latent_frames:
            raise ValueError(
                f"{self.shards.folder} holds clips of {num_frames} latent frames, training needs "
                f"{self.num_latent_frames}; lower num_training_frames, or encode the videos into another folder"
            )

    def _of_split(self, split: str, num_heldout: int) -> list[Item]:
        items = [item for item in self.shards.items if item.row["key"] in self.captions]
        by_hash = sorted(items, key=lambda item: hashlib.sha256(item.row["key"].encode()).digest())
        heldout = {item.row["key"] for item in by_hash[: min(num_heldout, len(items) // MOST_HELDOUT)]}
        return [item for item in items if (item.row["key"] in heldout) == (split == "heldout")]


class ODEPairs(LatentFolder):
    """Trajectories of a teacher, as `scripts/generate_ode_pairs.py` wrote them.

    Samples.latents: [B, states, F, C, H, W], states at the student's times and, last, the clean clip. `shards.about`
    tells the grid: shift, steps, timesteps.
    """

    kind = "ode pairs"

    def check_frames(self, num_frames: int) -> None:
        if num_frames != self.num_latent_frames:  # a whole clip's trajectory is not that of its beginning
            raise ValueError(
                f"{self.shards.folder} holds trajectories of {num_frames} latent frames, training asks for "
                f"{self.num_latent_frames}; set num_training_frames={num_frames}, or make other pairs"
            )
