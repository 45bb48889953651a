"""The puppet: one scene whatever the batch, disjoint splits, closed formulas, feet on the ground, joints in sight."""

import dataclasses

import pytest
import torch

from world.puppet import (
    _SOLE,
    ACTION_HZ,
    ACTIONS,
    CANVAS,
    FLOOR,
    FPS,
    JOINT_NAMES,
    SPEED_FACTORS,
    is_heldout,
    is_heldout_style,
    joints,
    sample_scenes,
)

ANKLES = [JOINT_NAMES.index("right ankle"), JOINT_NAMES.index("left ankle")]


def still_camera(scenes):
    return dataclasses.replace(scenes, camera=torch.zeros_like(scenes.camera))


def combinations(scenes):
    return scenes.body, scenes.background, scenes.action, scenes.prop, scenes.prop_colour


def test_a_scene_depends_on_seed_and_index_only():
    whole = sample_scenes(20, seed=3)
    part = sample_scenes(5, seed=3, start=10)
    for field in dataclasses.fields(whole):
        assert torch.equal(getattr(whole, field.name)[10:15], getattr(part, field.name)), field.name
    assert not torch.equal(whole.body, sample_scenes(20, seed=4).body)


def test_splits_are_disjoint_and_both_show_every_attribute():
    train, heldout = sample_scenes(3000, 0), sample_scenes(3000, 0, "heldout")
    assert not is_heldout(*combinations(train)).any()
    assert is_heldout(*combinations(heldout)).all()
    for name in ("body", "background", "action", "prop", "speed", "skin"):
        assert torch.equal(getattr(train, name).unique(), getattr(heldout, name).unique()), name


def test_a_tenth_of_combinations_and_some_motion_styles_are_held_out():
    scenes = sample_scenes(4000, 1, "heldout")
    body, background, action, prop, colour = torch.cartesian_prod(*(torch.arange(n) for n in (8, 8, 10, 4, 8))).T
    share = is_heldout(body, background, action, prop, colour).float().mean()
    assert 0.08 < share < 0.12
    styles = is_heldout_style(*torch.cartesian_prod(torch.arange(4), torch.arange(4), torch.arange(3)).T)
    assert 4 <= styles.sum() <= 20
    shown = {tuple(row) for row in scenes.pose_centres[:, 5:9].tolist()}
    assert not shown & {tuple(row) for row in sample_scenes(4000, 1).pose_centres[:, 5:9].tolist()} or len(shown) < 48


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'train' or 'heldout'"):
        sample_scenes(1, 0, "test")


def test_no_motion_is_faster_than_the_vae_can_see():
    beats = [2 if name in ("walk", "dance") else 1 for name in ACTIONS]
    assert max(hz * n for hz, n in zip(ACTION_HZ, beats, strict=True)) * max(SPEED_FACTORS) < 0.8


def test_joints_are_a_formula_in_time():
    scenes = sample_scenes(12, 5)
    whole = joints(scenes, torch.arange(60))
    assert torch.allclose(joints(scenes, torch.arange(40, 60)), whole[:, 40:], atol=1e-4)
    hour = joints(scenes, torch.arange(3600 * FPS, 3600 * FPS + 3))
    assert (hour[:, 1:] - hour[:, :-1]).abs().max() < 12  # still smooth after an hour


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_joints_stay_in_the_picture(split):
    tracks = joints(sample_scenes(400, 7, split), torch.arange(0, 200, 5))
    assert tracks.shape == (400, 40, 18, 3)
    assert (tracks[..., 2] == 1).all()
    assert tracks[..., :2].min() > 2
    assert tracks[..., :2].max() < CANVAS - 2


def test_a_foot_stands_unless_the_puppet_jumps():
    scenes = still_camera(sample_scenes(300, 8))
    tracks = joints(scenes, torch.arange(0, 100, 2))
    lowest = tracks[:, :, ANKLES, 1].amax(2)
    standing = scenes.action != ACTIONS.index("jump")
    assert (lowest[standing] - (FLOOR - _SOLE)).abs().max() < 1.0
    assert (lowest <= FLOOR - _SOLE + 1e-3).all()  # and nobody sinks into the floor
    assert lowest[~standing].min() < FLOOR - _SOLE - 6


def test_a_walking_foot_does_not_slide():
    scenes = still_camera(sample_scenes(400, 9))
    scenes = scenes.select(scenes.action == ACTIONS.index("walk"))
    tracks = joints(scenes, torch.arange(100))[:, :, ANKLES]
    on_ground = (tracks[:, 1:, :, 1] > FLOOR - _SOLE - 0.05) & (tracks[:, :-1, :, 1] > FLOOR - _SOLE - 0.05)
    steps = (tracks[:, 1:, :, 0] - tracks[:, :-1, :, 0]).abs()
    assert steps[on_ground].max() < 0.6
    assert steps[~on_ground].max() > 1.0


def test_bones_keep_their_length_where_the_puppet_is_flat():
    scenes = still_camera(sample_scenes(200, 10))
    tracks = joints(scenes, torch.arange(0, 80, 4))
    for a, b in ((2, 3), (3, 4), (5, 6), (6, 7)):
        length = (tracks[:, :, a, :2] - tracks[:, :, b, :2]).norm(dim=-1)
        assert (length - length[:, :1]).abs().max() < 1e-2
