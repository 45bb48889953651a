"""Keypoint files: lazily read, never unpickled, gaps are gaps, clear refusals."""

import json
import tracemalloc

import numpy as np
import pytest
import torch

from utils.pose.keypoints import at_fps, read_keypoints, save_keypoints


def walk(num_frames=5, joints=18) -> torch.Tensor:
    points = torch.rand(num_frames, joints, 3, generator=torch.Generator().manual_seed(0)) * 100 + 1
    points[..., 2] = 0.9
    return points


def test_npz_comes_back(tmp_path):
    save_keypoints(tmp_path / "a.npz", walk(600, 134), 512, 768, 25)
    track = read_keypoints(tmp_path / "a.npz")
    assert (track.width, track.height, track.fps, track.num_frames, track.num_joints) == (512, 768, 25, 600, 134)
    for _ in range(2):  # it can be walked over again
        assert torch.equal(torch.cat([*track.pieces()]), walk(600, 134))


def test_json_with_gaps(tmp_path):
    frames = walk(4).tolist()
    frames[1][3] = None
    frames[1][4] = [None, None, None]
    frames[2] = []
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"width": 100, "height": 100, "fps": 16, "keypoints": frames}))
    (points,) = read_keypoints(path).pieces()
    assert points[1, :, 2].tolist() == [pytest.approx(0.9)] * 3 + [0, 0] + [pytest.approx(0.9)] * 13
    assert not points[2].any()  # no one is there
    assert torch.allclose(points[[0, 3]], walk(4)[[0, 3]])


def test_the_clearest_of_two_people(tmp_path):
    two = torch.stack([walk(3), walk(3) + 50], dim=1)
    two[:, 0, :, 2], two[:, 1, :, 2] = 0.4, 0.8
    two[2, :, :, 2] = two[2].flip(0)[:, :, 2]
    for name in ("a.npz", "a.json"):
        path = tmp_path / name
        if name.endswith("npz"):
            save_keypoints(path, two, 100, 100, 16)
        else:
            path.write_text(json.dumps({"width": 100, "height": 100, "keypoints": two.tolist()}))
        (points,) = read_keypoints(path).pieces()
        assert torch.allclose(points[:, :, :2], torch.stack([two[0, 1], two[1, 1], two[2, 0]])[..., :2])


def test_missing_joints_stay_missing(tmp_path):
    points = walk(2)
    points[0, 4] = torch.tensor([-1.0, -1.0, 0.9])  # DWPose's sentinel
    points[1, 5, 0] = float("nan")
    save_keypoints(tmp_path / "a.npz", points, 100, 100, 16)
    (read,) = read_keypoints(tmp_path / "a.npz").pieces()
    assert read[0, 4].tolist() == [0, 0, 0]
    assert read[1, 5].tolist() == [0, 0, 0]


def test_100_000_frames_cost_the_memory_of_one_piece(tmp_path):
    np.savez(tmp_path / "a.npz", keypoints=np.zeros((100_000, 18, 3), np.float32), width=1, height=1, fps=16)
    tracemalloc.start()
    track = read_keypoints(tmp_path / "a.npz")
    assert sum(len(piece) for piece in track.pieces()) == track.num_frames == 100_000
    assert tracemalloc.get_traced_memory()[1] < 2_000_000  # the file has 21 MB
    tracemalloc.stop()


def refused(path, message):
    with pytest.raises(ValueError, match=message):
        [*read_keypoints(path).pieces()]


def test_what_is_no_track_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(FileNotFoundError, match="no keypoints at"):
        read_keypoints(path)
    np.savez(path, keypoints=np.array([[{"evil": 1}] * 18], dtype=object), width=1, height=1)
    refused(path, "not Python objects")
    save_keypoints(path, torch.zeros(3, 17, 3), 1, 1, 16)
    refused(path, r"shape \[3, 17, 3\].* with 18 or 134 joints")
    np.savez(path, points=np.zeros(3))
    refused(path, "lacks keypoints, width, height")
    save_keypoints(path, walk(), 0, 1, 16)
    refused(path, "width is .*a number above 0")
    path.write_bytes(b"PK no")
    refused(path, "cannot be read")
    path = tmp_path / "a.json"
    path.write_text('{"keypoints": [')
    refused(path, "not valid JSON")
    path.write_text(json.dumps({"width": 1, "height": 1, "keypoints": [[[0, 0, 1]] * 18, [[0, 0, 1]] * 17]}))
    refused(path, "do not all have the same joints")
    path.write_text("[]")
    refused(path, "expected")
    refused_suffix = tmp_path / "a.pkl"
    refused_suffix.write_bytes(b"x")
    refused(refused_suffix, r"\.npz or \.json")


@pytest.mark.parametrize(
    ("fps", "expected"), [(16, range(600)), (8, range(0, 600, 2)), (32, sorted([*range(600)] * 2))]
)
def test_a_track_at_another_rate(tmp_path, fps, expected):
    points = walk(600)
    points[:, 0, 0] = torch.arange(600.0)
    save_keypoints(tmp_path / "a.npz", points, 512, 768, 16)
    track = at_fps(read_keypoints(tmp_path / "a.npz"), fps)
    assert torch.cat([*track.pieces()])[:, 0, 0].int().tolist() == [*expected]
    assert track.num_frames == len(expected)
