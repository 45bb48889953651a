"""From pictures of people to joints: DWPose's ONNX models from local files, or MediaPipe in an environment of its own.

A backend is a context manager with `detect(picture uint8 [H, W, 3]) -> Tensor [134, 3]` (x, y in pixels, confidence;
zeros where no one is): one person, the clearest one. With `begins` the picture has nothing to do with the one before.
"""

import contextlib
import logging
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from utils.pose import mediapipe_worker
from utils.pose.dwpose import FILES, DWPose
from utils.pose.keypoints import CONFIDENT, LEFT_FOOT, LEFT_HAND, NUM_WHOLE, RIGHT_FOOT, RIGHT_HAND

logger = logging.getLogger(__name__)

ENVIRONMENT = Path(".pose_env")  # made by scripts/pose_env.py
# OpenPose-18 from BlazePose-33 (https://arxiv.org/abs/2006.10204); the neck is the middle of the shoulders.
BLAZE_BODY = (0, None, 12, 14, 16, 11, 13, 15, 24, 26, 28, 23, 25, 27, 5, 2, 8, 7)
BLAZE_SHOULDERS, BLAZE_FEET = (11, 12), ((LEFT_FOOT, 31), (RIGHT_FOOT, 32))


class PoseBackend(Protocol):
    def __enter__(self) -> Self: ...

    def __exit__(self, *exception) -> None: ...

    def detect(self, picture: np.ndarray, *, begins: bool = False) -> Tensor: ...


class MediaPipe:
    """MediaPipe Holistic in a process of its own."""

    def __init__(self, python: str | Path):
        self.python = Path(python)

    def __enter__(self) -> "MediaPipe":
        self._log = tempfile.TemporaryFile()  # not a pipe: nobody reads it, and it would fill
        self._process = subprocess.Popen(
            [str(self.python), mediapipe_worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self._answer(5)
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(BrokenPipeError):  # it may have ended already
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._log.close()

    def detect(self, picture: np.ndarray, *, begins: bool = False) -> Tensor:
        height, width = picture.shape[:2]
        try:
            self._process.stdin.write(mediapipe_worker.HEADER.pack(height, width, begins) + picture.tobytes())
            self._process.stdin.flush()
        except BrokenPipeError:
            self._answer(1)
        raw = np.frombuffer(self._answer(75 * 3 * 4), np.float32).reshape(75, 3)
        return from_blazepose(torch.from_numpy(raw.copy()), height, width)

    def _answer(self, size: int) -> bytes:
        answer = self._process.stdout.read(size)
        if len(answer) < size:
            self._process.wait()
            self._log.seek(0)
            last = self._log.read().decode(errors="replace").strip().splitlines()[-1:]
            raise ValueError(
                f"MediaPipe in {self.python} ended ({last[0] if last else 'without a word'}); make its environment "
                "again: python scripts/pose_env.py"
            )
        return answer


def from_blazepose(landmarks: Tensor, height: int, width: int) -> Tensor:
    """MediaPipe's [75, 3] (body, left hand, right hand) -> [134, 3] in pixels; the face stays empty."""
    landmarks = landmarks * torch.tensor([width, height, 1.0])
    points = torch.zeros(NUM_WHOLE, 3)
    for joint, source in enumerate(BLAZE_BODY):
        if source is not None:
            points[joint] = landmarks[source]
    shoulders = landmarks[list(BLAZE_SHOULDERS)]
    points[1] = torch.cat([shoulders[:, :2].mean(0), shoulders[:, 2].amin()[None]])
    for group, source in BLAZE_FEET:
        points[group] = landmarks[source]
    points[LEFT_HAND], points[RIGHT_HAND] = landmarks[33:54], landmarks[54:75]
    outside = (points[:, :2] < 0).any(1) | (points[:, 0] > width) | (points[:, 1] > height)
    points[outside, 2] = 0.0  # MediaPipe also guesses what lies beyond the picture
    return points


def choose_backend(dwpose: str | Path | None = None, mediapipe: str | Path | None = None) -> tuple[PoseBackend, str]:
    """The best backend there is, and why it is that one. ValueError where there is none.

    dwpose: folder with DWPose's two ONNX files, the detector that pose weights were trained with. mediapipe: the Python
    of an environment with MediaPipe; none: the one that scripts/pose_env.py makes.
    """
    if dwpose is not None:
        missing = [name for name in FILES if not (Path(dwpose) / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{dwpose} lacks {' and '.join(missing)} (Hugging Face: yzd-v/DWPose)")
        return DWPose(dwpose), f"DWPose from {dwpose}: what pose weights were trained with"
    places = [Path(mediapipe)] if mediapipe else [ENVIRONMENT / "bin/python", ENVIRONMENT / "Scripts/python.exe"]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ValueError(
            "no pose backend: give the folder of DWPose's ONNX files, or make MediaPipe's environment with "
            "`python scripts/pose_env.py`; a keypoint file or drawn skeletons need neither"
        )
    return MediaPipe(found), f"MediaPipe in {found}: no DWPose files were named"


def detect_pose(
    pictures: Iterable[np.ndarray], backend: PoseBackend, *, look: Callable[[int], None] | None = None
) -> Iterator[Tensor]:
    """Joints [134, 3] of each picture uint8 [H, W, 3] of one video; ValueError at the end if there was no one in any.

    look(n) is called with the number of pictures done.
    """
    done = empty = 0
    for picture in pictures:
        points = backend.detect(picture, begins=done == 0)
        done += 1
        empty += not (points[:, 2] > CONFIDENT).any()
        if look is not None:
            look(done)
        yield points
    if not done:
        raise ValueError("no pictures to look for a pose in")
    if empty == done:
        raise ValueError(f"no person found in any of {done} pictures; give a video in which one is seen whole")
    if empty:
        logger.warning("no person found in %d of %d pictures; no skeleton is drawn there", empty, done)
