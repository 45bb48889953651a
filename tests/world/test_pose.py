"""Pose drawings: colours, order and brightness of DWPose, and a picture that does not change unnoticed."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from world.pose import draw_pose
from world.puppet import joints, sample_scenes

GOLDEN = Path(__file__).parent / "pose_drawing.png"


# A waving figure, in OpenPose-18 order.
FIGURE = (
    (64, 36), (64, 50), (52, 52), (40, 44), (36, 30), (76, 52), (84, 64), (88, 78), (57, 78), (54, 94), (56, 108),
    (71, 78), (75, 92), (72, 108), (60, 32), (68, 32), (53, 34), (75, 34),
)  # fmt: skip


def test_the_drawing_is_the_golden_one():
    figure = torch.tensor([[*point, 1.0] for point in FIGURE])
    drawing = draw_pose(figure[None, None])[0, 0]
    golden = torch.from_numpy(np.array(Image.open(GOLDEN))).permute(2, 0, 1) / 255
    assert (drawing - golden).abs().max() < 0.02


def test_limbs_are_dimmed_and_joints_are_not():
    points = torch.full((1, 1, 18, 3), 5.0)
    points[..., 2] = 0
    points[0, 0, 2] = torch.tensor([40.0, 64.0, 1.0])
    points[0, 0, 3] = torch.tensor([90.0, 64.0, 1.0])
    drawing = draw_pose(points, stick_width=3.0)[0, 0]
    # limb 2 (right upper arm) is (255, 170, 0), seen channel-reversed; joint 3 is palette colour 3.
    assert torch.allclose(drawing[:, 63, 65], torch.tensor([0.0, 170, 255]) / 255 * 0.6, atol=1e-3)
    assert torch.allclose(drawing[:, 63, 89], torch.tensor([0.0, 255, 255]) / 255, atol=1e-3)
    assert drawing[:, :20].sum() == 0  # unseen joints leave no trace


def test_size_scales_the_drawing():
    tracks = joints(sample_scenes(2, 0), torch.arange(2))
    assert draw_pose(tracks, 256).shape == (2, 2, 3, 256, 256)
    small = draw_pose(tracks, 128, stick_width=3.0)
    large = torch.nn.functional.avg_pool2d(draw_pose(tracks, 256, stick_width=6.0).flatten(0, 1), 2).view_as(small)
    assert (small - large).abs().mean() < 0.005
