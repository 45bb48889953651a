"""Drawings: golden pictures of both profiles, colours as the published weights saw them, no one is black."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.world.test_pose import FIGURE
from utils.pose.draw import draw, drawings
from utils.pose.keypoints import read_keypoints, save_keypoints
from utils.pose.retarget import fit
from world.pose import draw_pose

SOURCE = (128, 128)


def whole_figure() -> torch.Tensor:
    """The waving figure with feet and hands, in pixels of a 128 x 128 picture."""
    points = torch.zeros(1, 134, 3)
    points[0, :18] = torch.tensor([[float(x), float(y), 0.9] for x, y in FIGURE])
    for ankle, group in ((13, (18, 19)), (10, (21, 22))):
        points[0, list(group)] = points[0, ankle] + torch.tensor([4.0, 6.0, 0.0])
    for wrist, start in ((7, 92), (4, 113)):
        for finger in range(5):
            for joint in range(4):
                angle = torch.tensor(0.5 * finger - 1.0)
                step = torch.stack([angle.sin(), -angle.cos()]) * (2 + 2 * joint)
                points[0, start + 1 + 4 * finger + joint, :2] = points[0, wrist, :2] + step
        points[0, start, :2] = points[0, wrist, :2]
        points[0, start : start + 21, 2] = 0.9
    return points


@pytest.mark.parametrize("profile", ["legacy", "native"])
def test_the_drawings_are_the_golden_ones(profile):
    (ours,) = draw(whole_figure(), SOURCE, (192, 128), profile)
    golden = np.array(Image.open(Path(__file__).parent / f"{profile}.png"))
    theirs = torch.from_numpy(golden).permute(2, 0, 1)
    assert ours.shape == theirs.shape
    assert (ours.int() - theirs.int()).abs().float().mean() < 0.05


def test_legacy_is_what_the_released_weights_saw():
    points = torch.zeros(1, 134, 3)
    points[0, 2], points[0, 3] = torch.tensor([20.0, 64.0, 0.9]), torch.tensor([100.0, 64.0, 0.9])
    points[0, 92], points[0, 93] = torch.tensor([20.0, 20.0, 0.9]), torch.tensor([40.0, 20.0, 0.9])
    (image,) = draw(points, SOURCE, (480, 832), "legacy")
    assert image.shape == (3, 768, 512)  # whatever the video's size
    assert image[:, 384, 240].tolist() == [0, 102, 153]  # limb 2, (255, 170, 0), reversed, at 0.6
    assert image[:, 384, 400].tolist() == [0, 255, 255]  # joint 3, (255, 255, 0), reversed, in full
    assert image[:, 120, 80].tolist() == [255, 0, 0]  # hands' dots, (0, 0, 255), reversed
    assert image[:, 120, 120].tolist() == [0, 0, 255]  # their first line, hue 0, reversed
    assert draw(points, SOURCE, (480, 832), "legacy", hands=False)[0, :, 120, 80].sum() == 0


def test_native_is_the_worlds_drawing():
    body = whole_figure()[:, :18]
    ours = draw(body, SOURCE, (128, 128), "native")
    seen = torch.cat([body[..., :2], torch.ones(1, 18, 1)], dim=-1)
    assert torch.equal(ours, draw_pose(seen[None])[0].mul(255).round().to(torch.uint8))
    assert draw(body, SOURCE, (96, 160), "native").shape == (1, 3, 96, 160)
    assert torch.equal(draw(whole_figure(), SOURCE, (128, 128), "body"), ours)


def test_no_one_is_a_black_picture():
    for profile in ("legacy", "native"):
        assert not draw(torch.zeros(2, 134, 3), SOURCE, (64, 64), profile).any()


def test_a_track_becomes_pieces(tmp_path):
    points = whole_figure().expand(20, -1, -1)
    save_keypoints(tmp_path / "a.npz", points, 128, 128, 16)
    track = read_keypoints(tmp_path / "a.npz")
    pieces = [*drawings(track, (64, 48), "native")]
    assert torch.cat(pieces, dim=1).shape == (1, 20, 3, 64, 48)
    smaller = points[0] * torch.tensor([0.25, 0.25, 1.0]) + torch.tensor([8.0, 8.0, 0.0])
    (first, *_) = drawings(track, (64, 48), "native", change=fit(points, smaller))
    assert (first[0, 0].int() - draw(smaller[None], (64, 48), (64, 48), "native")[0].int()).abs().float().mean() < 0.5


def test_an_unknown_profile_is_refused():
    with pytest.raises(ValueError, match="use one of legacy, native, body"):
        draw(whole_figure(), SOURCE, (64, 64), "modern")
