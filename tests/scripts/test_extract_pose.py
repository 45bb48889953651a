"""A video of no one, through the real sidecar where its environment is made; the mistakes before it, always."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.scripts.loading import load_script
from tests.utils.pose.test_backends import MEDIAPIPE
from utils.pose.keypoints import read_keypoints
from utils.video import write_video

SCRIPT = load_script(Path(__file__).parents[2] / "scripts" / "extract_pose.py")
# A stand-in for MediaPipe's process: one person, surest where a video begins.
ANSWERS = """
import struct, sys
sys.stdout.buffer.write(b"ready"); sys.stdout.buffer.flush()
while len(header := sys.stdin.buffer.read(12)) == 12:
    height, width, begins = struct.unpack("<3i", header)
    sys.stdin.buffer.read(height * width * 3)
    points = [v for i in range(75) for v in (0.3 + 0.005 * i, 0.2 + 0.009 * i, 0.9 if begins else 0.8)]
    sys.stdout.buffer.write(struct.pack("<225f", *points)); sys.stdout.buffer.flush()
"""


@pytest.fixture
def python(tmp_path) -> Path:
    path, program = tmp_path / "python", tmp_path / "answers.py"
    program.write_text(ANSWERS)
    path.write_text(f"#!/bin/sh\nexec {sys.executable} {program}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def video(tmp_path) -> Path:
    return write_video(tmp_path / "dance.mp4", torch.zeros(9, 3, 480, 320), fps=16)


def test_a_video_becomes_keypoints_on_the_references_body(python, video, tmp_path, capsys):
    from PIL import Image

    out = tmp_path / "dance.npz"
    assert SCRIPT.main([str(video), str(out), "--mediapipe", str(python)]) == 0
    assert "no DWPose files were named" in capsys.readouterr().out
    track = read_keypoints(out)
    assert (track.num_frames, track.num_joints, track.width, track.height) == (9, 134, 320, 480)
    (points,) = track.pieces()
    torch.testing.assert_close(points[:, 0, 2], torch.tensor([0.9] + 8 * [0.8]))
    image = tmp_path / "me.png"
    Image.fromarray(np.zeros((960, 640, 3), np.uint8)).save(image)
    assert SCRIPT.main([str(video), str(out), "--mediapipe", str(python), "--reference", str(image)]) == 0
    moved = read_keypoints(out)
    assert (moved.width, moved.height) == (640, 960)  # the same body in a picture twice as large
    torch.testing.assert_close(next(moved.pieces())[..., :2], points[..., :2] * 2, atol=0.01, rtol=1e-3)
    with Image.open(tmp_path / "dance_reference.png") as drawing:
        assert drawing.size == (512, 768)


def test_a_folder_is_gone_through_and_gone_on_with(python, video, tmp_path, capsys):
    folder = tmp_path / "videos"
    for name in ("a.mp4", "deeper/c.mov"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(video.read_bytes())
    (folder / "b.mp4").write_bytes(video.read_bytes()[:400])
    assert SCRIPT.main([str(folder), "--mediapipe", str(python)]) == 1
    said = capsys.readouterr().out
    assert f"2 of 3: left out: {folder / 'b.mp4'}" in said and "2 videos done, 1 left out" in said
    assert sorted(path.name for path in folder.rglob("*.npz")) == ["a.npz", "c.npz"]
    (last,) = read_keypoints(folder / "deeper" / "c.npz").pieces()
    torch.testing.assert_close(last[:, 0, 2], torch.tensor([0.9] + 8 * [0.8]))  # it begins anew after a.mp4
    (folder / "b.mp4").write_bytes(video.read_bytes())
    written = (folder / "a.npz").stat().st_mtime_ns
    assert SCRIPT.main([str(folder), "--mediapipe", str(python)]) == 0
    said = capsys.readouterr().out
    assert "2 of 3 videos" in said and "1 videos done, 0 left out" in said
    assert (folder / "a.npz").stat().st_mtime_ns == written
    assert SCRIPT.main([str(folder), "a.npz", "--mediapipe", str(python)]) == 1
    assert "is a folder: keypoints lie beside its videos" in capsys.readouterr().err


def test_mistakes(video, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert SCRIPT.main([str(video), "a.npz"]) == 1
    assert "no pose backend" in capsys.readouterr().err


@pytest.mark.skipif(not MEDIAPIPE.is_file(), reason="MediaPipe's environment is not made: python scripts/pose_env.py")
def test_no_person_in_a_real_run(video, tmp_path, capsys):
    assert SCRIPT.main([str(video), str(tmp_path / "a.npz"), "--mediapipe", str(MEDIAPIPE)]) == 1
    assert "no person found in any of 9 pictures" in capsys.readouterr().err
