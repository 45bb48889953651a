"""Whatever holds a pose, as drawings in order: a keypoint file, a video of drawn skeletons, a folder of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from utils.drawings import count_drawings, drawing_pieces, load_drawing
from utils.pose.draw import draw, drawings
from utils.pose.keypoints import SUFFIXES, Keypoints, at_fps, read_keypoints
from utils.pose.retarget import fit

FIT_FRAMES = 256  # of a track that its proportions are measured on


@dataclass(frozen=True)
class PoseSource:
    """Drawings of a moving skeleton, read when `pieces` is walked over: uint8 [f, 3, h, w]."""

    num_frames: int
    pieces: Callable[[], Iterator[Tensor]]


def open_pose(
    path: str | Path, fps: float, size: tuple[int, int], profile: str = "legacy", reference: str | Path | None = None
) -> PoseSource:
    """A pose for a video of size = (height, width).

    Keypoints are drawn in `profile` (utils.pose.draw) and, where the reference is a keypoint file too, fitted to its
    body first. Drawings are taken as they are. Raises FileNotFoundError or ValueError.
    """
    path = Path(path)
    if not is_keypoints(path):
        return PoseSource(count_drawings(path, fps), lambda: drawing_pieces(path, fps))
    track = at_fps(read_keypoints(path), fps)
    change = None
    if reference is not None and is_keypoints(reference):
        body, _ = reference_body(reference, size)
        change = fit(_beginning(track), body)
    return PoseSource(track.num_frames, lambda: (piece[0] for piece in drawings(track, size, profile, change=change)))


def open_reference_pose(path: str | Path, size: tuple[int, int], profile: str = "legacy") -> Tensor:
    """The drawing of a reference image's skeleton, uint8 [3, h, w]: of a keypoint file's first frame, or a picture."""
    if not is_keypoints(path):
        return load_drawing(path)
    points, source = reference_body(path, size)
    return draw(points[None], source, size, profile)[0]


def reference_body(path: str | Path, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Joints [K, 3] of a keypoint file's first frame in the pixels of size, and size.

    They move as the image does that they belong to: scaled to cover the video and cut around the centre.
    """
    track = read_keypoints(path)
    return cover(next(track.pieces())[0], (track.height, track.width), size), size


def cover(points: Tensor, source: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Joints [..., 3] in pixels of source = (height, width), as pictures of it are scaled to cover size and cut."""
    scale = max(new / old for new, old in zip(size, source, strict=True))
    offset = points.new_tensor([(scale * source[1] - size[1]) / 2, (scale * source[0] - size[0]) / 2])
    return torch.cat([scale * points[..., :2] - offset, points[..., 2:]], dim=-1)


def is_keypoints(path: str | Path) -> bool:
    return Path(path).suffix.lower() in SUFFIXES


def _beginning(track: Keypoints) -> Tensor:
    return next(track.pieces())[:FIT_FRAMES]
