"""The renderer: the same pixels in any chunks and any stretch; a mask that knows the puppet; left lighter."""

import dataclasses

import pytest
import torch

from world.puppet import BACKGROUNDS, BODY_COLOURS, JOINT_NAMES, joints, sample_scenes
from world.render import BACKGROUND_RGB, BODY_RGB, render


def test_every_colour_has_a_value():
    assert tuple(BODY_RGB) == BODY_COLOURS
    assert tuple(BACKGROUND_RGB) == BACKGROUNDS


def test_shapes_ranges_and_chunks():
    scenes = sample_scenes(3, 0)
    video, mask = render(scenes, 5, return_mask=True)
    assert video.shape == (3, 5, 3, 128, 128)
    assert mask.shape == (3, 5, 1, 128, 128)
    assert video.min() >= -1 and video.max() <= 1
    assert mask.min() >= 0 and mask.max() <= 1
    for frames_per_chunk in (1, 2, 7):
        assert torch.allclose(render(scenes, 5, frames_per_chunk=frames_per_chunk), video, atol=1e-5)
    assert torch.allclose(render(scenes.select([2]), 5), video[2:], atol=1e-5)


def test_any_stretch_of_a_video_is_a_slice_of_the_whole():
    scenes = sample_scenes(1, 1)
    whole = render(scenes, 46)
    assert torch.allclose(render(scenes, 6, start_frame=40), whole[:, 40:], atol=1e-4)
    assert torch.allclose(render(scenes, 3, start_frame=40, frame_stride=2), whole[:, 40::2], atol=1e-4)


def test_other_sizes_show_the_same_picture():
    scenes = sample_scenes(2, 2)
    large = torch.nn.functional.avg_pool2d(render(scenes, 1, size=256)[:, 0], 2)
    assert (render(scenes, 1)[:, 0] - large).abs().mean() < 0.02


def test_the_mask_is_where_the_puppet_is():
    scenes = sample_scenes(8, 3)
    video, mask = render(scenes, 1, return_mask=True)
    points = joints(scenes, torch.arange(1))[:, 0, :14, :2].round().long()
    for i in range(len(scenes)):
        assert (mask[i, 0, 0, points[i, :, 1], points[i, :, 0]] > 0.9).all()
    changed = dataclasses.replace(scenes, body=(scenes.body + 1) % 8)
    different = (render(changed, 1) - video).abs().amax(2) > 0.02
    assert (mask[:, :, 0][different] > 0).all()


@pytest.mark.parametrize("body", range(len(BODY_COLOURS)))
def test_left_limbs_are_lighter(body):
    scenes = dataclasses.replace(sample_scenes(1, 4), body=torch.tensor([body]), action=torch.tensor([7]))
    picture = render(scenes, 1)[0, 0].mean(0)
    points = joints(scenes, torch.arange(1))[0, 0, :, :2].round().long()
    for part in ("elbow", "knee"):
        (xr, yr), (xl, yl) = (points[JOINT_NAMES.index(f"{side} {part}")] for side in ("right", "left"))
        assert picture[yl, xl] > picture[yr, xr] + 0.1


def test_scenes_without_a_prop_have_no_prop():
    scenes = sample_scenes(1, 5)
    with_ball = dataclasses.replace(scenes, prop=torch.tensor([1]))
    without = dataclasses.replace(scenes, prop=torch.tensor([0]))
    (_, ball), (_, none) = (render(s, 1, return_mask=True) for s in (with_ball, without))
    assert ball.sum() > none.sum() + 150
