"""Pose backends: their joints in our order, the choice with its reason, what happens where no one is."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.pose import dwpose
from utils.pose.backends import ENVIRONMENT, MediaPipe, choose_backend, detect_pose, from_blazepose
from utils.pose.keypoints import LEFT_HAND, RIGHT_HAND

MEDIAPIPE = Path(os.environ.get("POSE_PYTHON", ENVIRONMENT / "bin/python"))


def test_mediapipes_joints_in_our_order():
    landmarks = torch.zeros(75, 3)
    landmarks[:, 0] = torch.arange(75) / 100  # each x names its landmark
    landmarks[:, 1:] = 0.5
    landmarks[12, 2] = 0.4
    points = from_blazepose(landmarks, 200, 100)
    body = [0, 11.5, 12, 14, 16, 11, 13, 15, 24, 26, 28, 23, 25, 27, 5, 2, 8, 7]
    assert torch.allclose(points[:18, 0], torch.tensor(body))
    assert points[1, 2] == pytest.approx(0.4)  # a neck is as sure as its less sure shoulder
    assert torch.allclose(points[:18, 1], torch.full((18,), 100.0))
    assert torch.allclose(points[LEFT_HAND, 0], torch.arange(33.0, 54))
    assert torch.allclose(points[RIGHT_HAND, 0], torch.arange(54.0, 75))
    landmarks[0, 0] = -0.1
    assert from_blazepose(landmarks, 200, 100)[0, 2] == 0  # guessed beyond the picture


def test_dwposes_joints_in_our_order():
    points = torch.zeros(133, 3)
    points[:, 0], points[:, 2] = torch.arange(133.0), 0.9
    out = dwpose.to_openpose(points, torch.tensor([10.0, 20.0]), 2.0)
    body = [0, 5.5, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3]
    assert torch.allclose(out[:18, 0], torch.tensor(body) * 2 + 10)
    assert torch.allclose(out[18:, 0], torch.arange(17.0, 133) * 2 + 10)
    assert torch.all(out[:, 1] == 20)


def test_dwposes_box_and_heat_maps():
    raw = torch.zeros(1, 8400, 85)
    assert dwpose.best_box(raw, 1.0) is None
    cell = 6400 + 10 * 40 + 20  # stride 16, row 10, column 20
    raw[0, cell, :6] = torch.tensor([0.5, 0.5, float(np.log(4)), float(np.log(8)), 0.9, 0.9])
    box = dwpose.best_box(raw, 0.5)
    assert torch.allclose(box, torch.tensor([328 - 32, 168 - 64, 328 + 32, 168 + 64]) / 0.5)
    x, y = torch.zeros(133, 576), torch.zeros(133, 768)
    x[:, 100], y[:, 300] = 0.8, 0.6
    assert dwpose.read_heat_maps(x, y)[0].tolist() == [50, 150, pytest.approx(0.6)]


def test_dwposes_crop_goes_back_to_the_picture():
    image = torch.zeros(3, 200, 300)
    image[:, 90:93, 160:163] = 255.0
    crop, origin, scale = dwpose.crop_box(image, torch.tensor([100.0, 40.0, 220.0, 180.0]))
    assert crop.shape == (3, 384, 288)
    at = crop[0].flatten().argmax()
    place = torch.tensor([float(at % 288), float(at // 288)]) * scale + origin
    assert torch.allclose(place, torch.tensor([161.0, 91.0]), atol=1.5)
    squeezed, ratio = dwpose.letterbox(image)
    assert squeezed.shape == (3, 640, 640)
    assert ratio == pytest.approx(640 / 300)
    assert torch.all(squeezed[:, 500:] == 114)


def test_the_choice_has_a_reason(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no pose backend.*scripts/pose_env\.py"):
        choose_backend()
    with pytest.raises(FileNotFoundError, match=r"lacks yolox_l\.onnx and dw-ll_ucoco_384\.onnx"):
        choose_backend(tmp_path)
    python = tmp_path / ENVIRONMENT / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    backend, reason = choose_backend()
    assert isinstance(backend, MediaPipe)
    assert "no DWPose files were named" in reason
    for name in dwpose.FILES:
        (tmp_path / name).touch()
    backend, reason = choose_backend(tmp_path)
    assert isinstance(backend, dwpose.DWPose)
    assert reason.startswith("DWPose from")


class Nobody:
    """A backend that sees someone in some pictures only."""

    def __init__(self, *seen: bool):
        self.seen = iter(seen)
        self.begun: list[bool] = []

    def detect(self, picture, *, begins):
        self.begun.append(begins)
        return torch.full((134, 3), float(next(self.seen)))


def test_no_person_found(caplog):
    pictures = [np.zeros((4, 4, 3), np.uint8)] * 3
    with pytest.raises(ValueError, match="no person found in any of 3 pictures"):
        [*detect_pose(pictures, Nobody(False, False, False))]
    backend = Nobody(True, False, True)
    assert len([*detect_pose(pictures, backend)]) == 3
    assert backend.begun == [True, False, False]
    assert "no person found in 1 of 3 pictures" in caplog.text
    with pytest.raises(ValueError, match="no pictures"):
        [*detect_pose([], Nobody())]


def test_a_sidecar_that_breaks_says_why(tmp_path):
    import sys

    broken = tmp_path / "python"
    broken.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'raise SystemExit(\"no mediapipe here\")'\n")
    broken.chmod(0o755)
    with pytest.raises(ValueError, match=r"no mediapipe here.*scripts/pose_env\.py"):
        MediaPipe(broken).__enter__()


@pytest.mark.skipif(not MEDIAPIPE.is_file(), reason="MediaPipe's environment is not made: python scripts/pose_env.py")
def test_mediapipe_answers():
    with MediaPipe(MEDIAPIPE) as backend:
        for size in ((64, 48), (96, 96)):
            points = backend.detect(np.zeros((*size, 3), np.uint8))
            assert points.shape == (134, 3)
            assert not points[:, 2].any()  # no one in a black picture
