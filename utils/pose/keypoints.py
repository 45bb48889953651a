"""Keypoint files: joints of one or more people over time, read piece by piece.

    .npz   keypoints [F, K, 3] or [F, people, K, 3] (x, y in pixels, confidence), width, height, fps
    .json  {"width": 512, "height": 768, "fps": 16, "keypoints": [frame, ...]} nested the same; null: no joint, no one

K is 18 (OpenPose) or 134 (DWPose: those 18, then 6 of the feet, 68 of the face, 21 of each hand, the left one first).
No file is unpickled.
"""

import json
import math
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SUFFIXES = (".npz", ".json")
NUM_BODY, NUM_WHOLE = 18, 134
LEFT_FOOT, RIGHT_FOOT = slice(18, 21), slice(21, 24)
FACE, LEFT_HAND, RIGHT_HAND = slice(24, 92), slice(92, 113), slice(113, 134)
CONFIDENT = 0.3  # DWPose's threshold: joints below it are not there
PIECE = 256  # frames that are read at a time


@dataclass(frozen=True)
class Keypoints:
    """A track of joints that is read when it is walked over; it can be walked over again."""

    width: int  # pixels of the pictures that x and y are in
    height: int
    fps: float
    num_frames: int
    num_joints: int
    read: Callable[[], Iterator[Tensor]]

    def pieces(self) -> Iterator[Tensor]:
        """Pieces [f, K, 3] float32 of the clearest person of each frame; confidence 0 where a joint is missing."""
        for piece in self.read():
            if piece.ndim == 4:
                best = piece[..., :NUM_BODY, 2].mean(2).argmax(1)
                piece = piece[torch.arange(len(piece)), best]
            missing = ~piece.isfinite().all(-1) | (piece[..., :2] < 0).any(-1)
            yield torch.where(missing[..., None], torch.zeros(()), piece)


def read_keypoints(path: str | Path) -> Keypoints:
    """The track of a file; ValueError or FileNotFoundError say what is wrong with it.

    An .npz of any length costs the memory of one piece.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no keypoints at {path}")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: keypoints come as {' or '.join(SUFFIXES)}")
    return _from_npz(path) if path.suffix == ".npz" else _from_json(path)


def at_fps(track: Keypoints, fps: float) -> Keypoints:
    """What is there at 0, 1 / fps, 2 / fps, ... until the track ends."""
    if fps == track.fps:
        return track
    step = track.fps / fps
    num_frames = max(1, math.ceil(track.num_frames / step - 1e-6))

    def read() -> Iterator[Tensor]:
        start, number = 0, 0
        for piece in track.read():
            wanted = []
            while number < num_frames and (index := int(number * step + 1e-6)) < start + len(piece):
                wanted.append(index - start)
                number += 1
            start += len(piece)
            if wanted:
                yield piece[wanted]

    return replace(track, fps=fps, num_frames=num_frames, read=read)


def save_keypoints(path: str | Path, points: Tensor, width: int, height: int, fps: float) -> None:
    """Write points [F, K, 3] as .npz."""
    np.savez_compressed(path, keypoints=points.numpy().astype(np.float32), width=width, height=height, fps=fps)


def _check_shape(path: Path, shape: tuple[int, ...]) -> None:
    if len(shape) not in (3, 4) or shape[-1] != 3 or shape[-2] not in (NUM_BODY, NUM_WHOLE) or 0 in shape:
        raise ValueError(
            f"{path} holds keypoints of shape {list(shape)}; [frames, joints, 3] or [frames, people, joints, 3] is "
            f"needed, with {NUM_BODY} or {NUM_WHOLE} joints of x, y and confidence"
        )


def _number(path: Path, name: str, value: object) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if not number > 0:
        raise ValueError(f"{path}: {name} is {value!r}; it is a number above 0")
    return number


def _from_npz(path: Path) -> Keypoints:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} cannot be read as an .npz file; write it with numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as file:
            if absent := [name for name in ("keypoints", "width", "height") if name not in file.files]:
                raise ValueError(f"{path} lacks {', '.join(absent)} (it holds {', '.join(file.files) or 'nothing'})")
            width, height = (_number(path, name, file[name]) for name in ("width", "height"))
            fps = _number(path, "fps", file["fps"]) if "fps" in file.files else 16.0
        with zipfile.ZipFile(path) as archive, archive.open("keypoints.npy") as member:
            shape, by_column, dtype = _npy_header(member)
    except (zipfile.BadZipFile, KeyError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an .npz file ({error})") from error
    if dtype.hasobject or by_column or dtype.kind not in "fiu":
        raise ValueError(f"{path}: keypoints are of type {dtype}; save plain numbers (float32), not Python objects")
    _check_shape(path, shape)

    def read() -> Iterator[Tensor]:
        with zipfile.ZipFile(path) as archive, archive.open("keypoints.npy") as member:
            _npy_header(member)
            frame = dtype.itemsize * int(np.prod(shape[1:]))
            for start in range(0, shape[0], PIECE):
                count = min(PIECE, shape[0] - start)
                raw = member.read(count * frame)
                if len(raw) != count * frame:
                    raise ValueError(f"{path} is cut off after frame {start + len(raw) // frame} of {shape[0]}")
                piece = np.frombuffer(raw, dtype).reshape(count, *shape[1:])
                yield torch.from_numpy(piece.astype(np.float32))

    return Keypoints(round(width), round(height), fps, shape[0], shape[-2], read)


def _npy_header(member) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(member)


def _from_json(path: Path) -> Keypoints:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(content, dict) or "keypoints" not in content:
        raise ValueError(f'{path}: expected {{"width": ..., "height": ..., "fps": ..., "keypoints": [...]}}')
    width, height = (_number(path, name, content.get(name)) for name in ("width", "height"))
    fps = _number(path, "fps", content.get("fps", 16))
    try:
        frames = [_without_gaps(frame) for frame in content["keypoints"]]
        nobody = np.zeros_like(next((np.array(frame, np.float32) for frame in frames if frame), np.zeros(0)))
        points = np.array([frame or nobody for frame in frames], dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: the frames do not all have the same joints of three numbers ({error})") from error
    _check_shape(path, points.shape)
    track = torch.from_numpy(points)
    return Keypoints(round(width), round(height), fps, len(track), points.shape[-2], lambda: iter(track.split(PIECE)))


def _without_gaps(frame: list | None) -> list:
    """A frame's joints (or people's), with zeros for a joint that is null; empty where there is no one."""
    if not frame:
        return []
    if _holds_people(frame):
        return [_without_gaps(person) for person in frame]
    return [[0.0, 0.0, 0.0] if joint is None or None in joint else joint for joint in frame]


def _holds_people(frame: list) -> bool:
    """Whether a frame's entries are people, whose own entries are joints, and not joints."""
    return any(isinstance(joint, list) for entry in frame if entry for joint in entry)
