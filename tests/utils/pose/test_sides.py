"""Left and right are put right where a detector exchanged them, and left alone where a body moves or turns."""

import torch

from utils.pose.keypoints import LEFT_FOOT, LEFT_HAND, RIGHT_FOOT, RIGHT_HAND
from utils.pose.retarget import MIRROR
from utils.pose.sides import put_sides_right
from world.puppet import ACTIONS, joints, sample_scenes

TWINS = [MIRROR[joint] for joint in range(18)]


def dance(num_frames: int = 48) -> torch.Tensor:
    return joints(sample_scenes(1, 0, moving_camera=0.0), torch.arange(num_frames))[0]


def exchange(points: torch.Tensor, frames: list[int]) -> torch.Tensor:
    points = points.clone()
    points[frames] = points[frames][:, TWINS]
    return points


def test_exchanged_frames_are_put_right():
    points, wrong = dance(), [20, 21, 22, 24]
    fixed, exchanged = put_sides_right(exchange(points, wrong))
    assert exchanged.nonzero()[:, 0].tolist() == wrong
    assert torch.equal(fixed, points)
    beginning = list(range(10))  # the first frame is not trusted more than others
    assert torch.equal(put_sides_right(exchange(points, beginning))[0], points)


def test_hands_and_feet_go_along_and_the_face_stays():
    points = torch.zeros(48, 134, 3)
    points[:, :18] = dance()
    points[:, 18:] = torch.rand(116, 3, generator=torch.Generator().manual_seed(0))
    wrong = points.clone()
    wrong[30:33, :18] = wrong[30:33][:, TWINS]
    for left, right in ((LEFT_FOOT, RIGHT_FOOT), (LEFT_HAND, RIGHT_HAND)):
        wrong[30:33, left], wrong[30:33, right] = points[30:33, right], points[30:33, left]
    assert torch.equal(put_sides_right(wrong)[0], points)


def test_what_moves_or_turns_round_is_left_alone():
    for seed in range(len(ACTIONS)):
        scenes = sample_scenes(20, seed, moving_camera=0.0)
        for track in joints(scenes, torch.arange(64)):
            assert not put_sides_right(track)[1].any()
    turning = dance()
    middle = turning[:, 1:2, 0]
    turning[..., 0] = middle + (turning[..., 0] - middle) * torch.linspace(1, -1, len(turning))[:, None]
    assert not put_sides_right(turning)[1].any()


def test_nothing_is_said_across_a_gap():
    points = dance()
    points[24] = 0.0
    other = exchange(points, list(range(25, 48)))  # as one who turned round unseen
    assert not put_sides_right(other)[1].any()
    assert put_sides_right(exchange(other, [40]))[1].nonzero().tolist() == [[40]]
    assert not put_sides_right(torch.zeros(3, 134, 3))[1].any()
