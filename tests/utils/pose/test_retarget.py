"""Retargeting: the same body stays; proportions are taken over; nothing is mirrored, explodes or appears."""

import pytest
import torch

from tests.world.test_pose import FIGURE
from utils.pose.retarget import BONES, bone_lengths, fit, retarget


def figure() -> torch.Tensor:
    return torch.tensor([[float(x), float(y), 0.9] for x, y in FIGURE])


def dance(num_frames=9) -> torch.Tensor:
    """The figure with its limbs turned as wholes about their parents: lengths stay."""
    frames = []
    for i in range(num_frames):
        points = figure()
        for joints, parent, turn in (([3, 4], 2, 0.3), ([6, 7], 5, -0.2), ([9, 10], 8, 0.1)):
            angle = torch.tensor(turn * (i - 4) / 4)
            turned = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
            points[joints, :2] = points[parent, :2] + (points[joints, :2] - points[parent, :2]) @ turned.T
        frames.append(points)
    return torch.stack(frames)


def test_the_same_body_is_unchanged():
    how = fit(dance(), figure())
    torch.testing.assert_close(how(dance()), dance() - (dance()[0, 1] - figure()[1]) * torch.tensor([1.0, 1.0, 0.0]))
    assert how.unknown == ()
    assert how.scale == pytest.approx(1, abs=1e-4)


def long_armed() -> torch.Tensor:
    """Twice as large, with arms half as long again, elsewhere on the canvas."""
    points = figure()
    points[:, :2] = points[:, :2] * 2 + torch.tensor([30.0, 10.0])
    for parent, child, *rest in ((2, 3, 4), (3, 4), (5, 6, 7), (6, 7)):
        points[[child, *rest], :2] += 0.5 * (points[child, :2] - points[parent, :2])
    return points


def test_proportions_are_the_references():
    reference, how = long_armed(), fit(dance(), long_armed())
    moved, wanted = bone_lengths(how(dance())), bone_lengths(reference[None])
    assert moved == {bone: pytest.approx(wanted[bone], rel=1e-3) for bone in BONES}
    assert torch.allclose(how(dance())[0, 1, :2], reference[1, :2])


def test_a_turned_dancer_is_not_mirrored():
    back = dance()
    back[..., 0] = 128 - back[..., 0]  # seen from behind: left and right change places
    out = fit(back, figure())(back)
    assert ((out[:, 2, 0] > out[:, 5, 0]) == (back[:, 2, 0] > back[:, 5, 0])).all()


def test_one_bad_frame_decides_nothing():
    clean = dance(11)
    broken = clean.clone()
    broken[0, [3, 4, 9], :2] = 5000.0  # a detector's slip in the very first frame
    ours, theirs = fit(broken, long_armed()), fit(clean, long_armed())
    assert ours.ratios == {bone: pytest.approx(ratio, rel=0.05) for bone, ratio in theirs.ratios.items()}


def test_limbs_do_not_explode():
    reference = figure()
    reference[4, :2] = reference[3, :2] + 400.0  # a wrist found at the other end of the picture
    how = fit(dance(), reference)
    assert how.ratios[3, 4] == 2.0
    assert max(bone_lengths(how(dance())).values()) < 2.1 * max(bone_lengths(dance()).values())


def test_missing_joints_stay_missing_and_take_the_other_sides_ratio():
    reference = long_armed()
    reference[[6, 7], 2] = 0.0  # the left arm is hidden in the reference
    how = fit(dance(), reference)
    assert how.ratios[5, 6] == how.ratios[2, 3]
    points = dance()
    points[3, 4] = 0.0  # a sentinel
    assert torch.equal(how(points)[3, 4], torch.zeros(3))
    assert torch.equal(how(points)[..., 2], points[..., 2])
    reference[[3, 4], 2] = 0.0  # both arms hidden
    assert "left forearm" in fit(dance(), reference).unknown


def test_hands_and_feet_hang_on_their_limbs():
    whole = torch.zeros(2, 134, 3)
    whole[:, :18] = figure()
    whole[:, 18:, :2] = 50.0
    whole[:, 18:, 2] = 0.9
    whole[:, 92:113, :2] = figure()[7, :2]
    reference = torch.zeros(134, 3)
    reference[:18] = long_armed()
    out = retarget(whole, fit(whole, reference))
    assert torch.allclose(out[:, 92:113, :2], out[:, 7:8, :2].expand(-1, 21, -1), atol=1e-3)
    assert out.isfinite().all()


def test_no_one_in_the_reference_is_refused():
    with pytest.raises(ValueError, match="share no bone with both ends visible"):
        fit(dance(), torch.zeros(18, 3))
    with pytest.raises(ValueError, match="share no bone"):
        fit(torch.zeros(3, 18, 3), figure())
