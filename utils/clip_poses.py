"""What steers clips of a folder of videos: skeletons from keypoint files beside them, and pictures of other moments."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils.config import ControlConfig
from utils.dataset import Controls, upload
from utils.distributed import SampleRngs, mix_seed
from utils.pose.draw import draw
from utils.pose.keypoints import Keypoints, at_fps, read_keypoints
from utils.pose.source import cover
from utils.puppet_latents import who
from utils.shards import Item

logger = logging.getLogger(__name__)

SUFFIX = ".npz"  # of the keypoints beside dance.mp4
FRAMES_AT_ONCE = 8  # that are drawn: a frame's drawing passes through floats, forty times the bytes it ends as


def find_tracks(folder: str | Path, names: Sequence[str], fps: float, *, skip: bool = True) -> dict[str, Keypoints]:
    """The keypoints beside the videos of these names (dance.mp4 + dance.npz), at fps, by the video's name.

    A file that cannot be read is left out with a sentence (skip), or stops the run. Raises ValueError if none is left.
    """
    tracks = {}
    for name in names:
        path = (Path(folder) / name).with_suffix(SUFFIX)
        try:
            tracks[name] = at_fps(read_keypoints(path), fps)
        except FileNotFoundError:
            continue
        except ValueError as error:
            if not skip:
                raise
            logger.warning("learned without a pose: %s", error)
    if not tracks:
        raise ValueError(
            f"control.pose_dim is set, but none of the {len(names)} videos in {folder} has keypoints beside it "
            f"(dance.mp4, dance{SUFFIX}); find them with scripts/extract_pose.py {folder}, or set control.pose_dim: 0"
        )
    logger.info(
        "%d of %d videos have keypoints; the others are learned without a pose. wrong_action, hidden_joints and "
        "unsaid_looks of control are about puppets and mean nothing here",
        len(tracks),
        len(names),
    )
    return tracks


class ClipPoses:
    """Controls of clips that were cut from videos one after the other, as puppets' (utils/puppet_latents.py).

    Who is to have a pose or an image depends on the sample's number; a clip whose frames its keypoints do not cover has
    no pose all the same. A reference is the first picture of another clip of the video, whose latent is the first one
    there; where keypoints tell of no other, the image is the clip's own first frame. Nothing is remembered: a skeleton
    is read and drawn when its clip is drawn, and takes 3 bytes a pixel as long as the batch is there.
    """

    def __init__(
        self,
        tracks: dict[str, Keypoints],
        control: ControlConfig,
        *,
        profile: str,
        size: tuple[int, int],
        num_frames: int,
        clip_frames: int,
        seed: int,
        device: torch.device,
    ):
        """tracks: by video. size: (height, width). num_frames: of a training clip, clip_frames: of a stored one."""
        self.tracks, self.control, self.profile, self.size = tracks, control, profile, size
        self.num_frames, self.clip_frames, self.seed, self.device = num_frames, clip_frames, seed, device

    def __call__(
        self, clips: Sequence[tuple[Item, int]], latents: Tensor, read: Callable[[Item, int], Tensor], rngs: SampleRngs
    ) -> Controls:
        """clips: item and number of each sample; latents: theirs, [B, F, C, h, w] on the device; read: any other's."""
        wanted, plain, imaged = who(rngs.samples, self.control)
        posed = [p for p in wanted.tolist() if self.covers(clips[p], self.num_frames)]
        references, skeletons, told, own = [], [], [], []
        for place in imaged.tolist():
            (item, number), seed = clips[place], mix_seed(self.seed, rngs.stream, rngs.step, rngs.samples[place])
            kind, hidden, which = torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()
            others = [(item, n) for n in range(item.row["num_clips"]) if n != number and self.covers((item, n), 1)]
            first_frame = kind < self.control.first_frame or not others
            shown = (item, number) if first_frame else others[int(which * len(others))]
            references.append(latents[place, :1] if first_frame else upload(read(*shown)[:1], self.device).to(latents))
            skeletons.append(self.drawings(shown, 1) if not first_frame else self.empty(1))
            told.append(place not in posed or hidden >= self.control.reference_pose_dropout)
            own.append(first_frame)
        moving = [self.drawings(clips[place], self.num_frames) for place in posed]
        return Controls(
            drawings=torch.stack(moving) if posed else self.empty(self.num_frames)[None][:0],
            posed=upload(torch.tensor(posed, dtype=torch.long), self.device),
            plain=upload(plain, self.device),
            imaged=upload(imaged, self.device),
            references=torch.stack(references) if own else latents[:0, :1],
            reference_drawings=torch.stack(skeletons) if own else self.empty(1)[None][:0],
            reference_posed=upload(torch.tensor(told, dtype=torch.bool), self.device),
            first_frame=upload(torch.tensor(own, dtype=torch.bool), self.device),
        )

    def covers(self, clip: tuple[Item, int], num_frames: int) -> bool:
        """Whether there are keypoints of a clip's first frames; the last may be missing, where clocks round."""
        item, number = clip
        track = self.tracks.get(item.row["key"])
        return track is not None and track.num_frames >= number * self.clip_frames + max(1, num_frames - 1)

    def drawings(self, clip: tuple[Item, int], num_frames: int) -> Tensor:
        """The skeletons of a clip's first frames, uint8 [num_frames, 3, H, W] on the device."""
        item, number = clip
        track, start = self.tracks[item.row["key"]], number * self.clip_frames
        points = cover(points_between(track, start, start + num_frames), (track.height, track.width), self.size)
        parts = points.to(self.device).split(FRAMES_AT_ONCE)
        return torch.cat([draw(part, self.size, self.size, self.profile) for part in parts])

    def empty(self, num_frames: int) -> Tensor:
        return torch.zeros(num_frames, 3, *self.size, dtype=torch.uint8, device=self.device)


def points_between(track: Keypoints, start: int, stop: int) -> Tensor:
    """Joints [stop - start, K, 3] of frames [start, stop) of a track; past its end the last ones stay."""
    parts, first = [], 0
    for piece in track.pieces():
        parts.append(piece[max(0, start - first) : max(0, stop - first)])
        first += len(piece)
        if first >= stop:
            break
    points = torch.cat(parts)
    return torch.cat([points, points[-1:].expand(stop - start - len(points), -1, -1)])
