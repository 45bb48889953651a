"""Keypoints, drawn videos and folders through one door."""

import pytest
import torch
from PIL import Image

from utils.pose.draw import LEGACY_SIZE, draw
from utils.pose.keypoints import read_keypoints, save_keypoints
from utils.pose.source import open_pose, open_reference_pose

SIZE = (64, 48)


def body(scale: float = 1.0, x: float = 60.0) -> torch.Tensor:
    """[18, 3]: a person with a neck at (x, 30), in a picture of 100x120 (h, w)."""
    offsets = [(0, -8), (0, 0), (-8, 0), (-10, 12), (-10, 22), (8, 0), (10, 12), (10, 22), (-5, 25), (-5, 42), (-5, 58)]
    offsets += [(5, 25), (5, 42), (5, 58), (-2, -10), (2, -10), (-4, -9), (4, -9)]
    return torch.tensor([(x + scale * dx, 30 + scale * dy, 1.0) for dx, dy in offsets])


@pytest.fixture
def track(tmp_path):
    points = torch.stack([body(x=60 + frame) for frame in range(10)])
    save_keypoints(tmp_path / "dance.npz", points, 120, 100, 16)
    return tmp_path / "dance.npz"


def test_keypoints_are_drawn(track):
    for profile, size in (("legacy", LEGACY_SIZE), ("native", SIZE)):
        source = open_pose(track, 16, SIZE, profile)
        pieces = torch.cat(list(source.pieces()))
        assert source.num_frames == len(pieces) == 10 and pieces.shape[1:] == (3, *size)
        points = torch.cat(list(read_keypoints(track).pieces()))
        assert torch.equal(pieces, draw(points, (100, 120), SIZE, profile))


def test_a_reference_of_the_same_body_changes_only_its_place(tmp_path, track):
    save_keypoints(tmp_path / "same.npz", body(x=60.0)[None], 120, 100, 16)
    fitted = next(open_pose(track, 16, (100, 120), "native", tmp_path / "same.npz").pieces())
    plain = next(open_pose(track, 16, (100, 120), "native").pieces())
    assert (fitted.float() - plain.float()).abs().mean() < 0.5
    save_keypoints(tmp_path / "small.npz", body(0.6)[None], 120, 100, 16)
    small = next(open_pose(track, 16, (100, 120), "native", tmp_path / "small.npz").pieces())
    assert small.gt(40).sum() < 0.8 * plain.gt(40).sum()


def test_a_reference_moves_with_its_image(tmp_path):
    """A picture of 100x120 covers 64x48 at scale 0.64 and loses 14.4 pixels left and right."""
    save_keypoints(tmp_path / "ref.npz", body()[None], 120, 100, 16)
    expected = body()
    expected[:, 0], expected[:, 1] = 0.64 * expected[:, 0] - 14.4, 0.64 * expected[:, 1]
    drawn = open_reference_pose(tmp_path / "ref.npz", SIZE, "native")
    assert (drawn.float() - draw(expected[None], SIZE, SIZE, "native")[0].float()).abs().max() <= 1


def test_drawings_are_taken_as_they_are(tmp_path):
    for index in range(3):
        Image.new("RGB", (6, 4), (index, 0, 0)).save(tmp_path / f"{index}.png")
    source = open_pose(tmp_path, 16, SIZE)
    assert source.num_frames == 3 and next(source.pieces()).shape == (3, 3, 4, 6)
    assert open_reference_pose(tmp_path / "2.png", SIZE)[0].unique().tolist() == [2]


def test_another_rate_keeps_the_speed(track):
    source = open_pose(track, 8, SIZE, "native")
    plain = torch.cat([*open_pose(track, 16, SIZE, "native").pieces()])
    assert source.num_frames == 5
    assert torch.equal(torch.cat([*source.pieces()]), plain[::2])
    with pytest.raises(FileNotFoundError):
        open_pose("absent.npz", 16, SIZE)
