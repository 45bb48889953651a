"""The motion of one body on the proportions of another: bone by bone, from what is surely seen, never mirrored.

Bone lengths are medians over the frames in which both ends are confident, so that one bad frame decides nothing; a bone
that the reference hides takes its mirror image's ratio; ratios stay in [0.5, 2].
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.pose.keypoints import CONFIDENT, FACE, LEFT_FOOT, LEFT_HAND, NUM_WHOLE, RIGHT_FOOT, RIGHT_HAND

logger = logging.getLogger(__name__)

RATIO_LIMITS = (0.5, 2.0)
MIN_LENGTH = 1.0  # pixels: shorter bones point at the camera and say nothing about length
# (parent, child): joints that hang on the child. OpenPose-18; the names are for messages.
ARM_R, ARM_L, LEG_R, LEG_L = (3, 4), (6, 7), (9, 10), (12, 13)
BONES = {
    (1, 0): ("neck", [0, 14, 15, 16, 17], [FACE]),
    (1, 2): ("right shoulder", [2, *ARM_R], [RIGHT_HAND]),
    (1, 5): ("left shoulder", [5, *ARM_L], [LEFT_HAND]),
    (2, 3): ("right upper arm", [3, 4], [RIGHT_HAND]),
    (3, 4): ("right forearm", [4], [RIGHT_HAND]),
    (5, 6): ("left upper arm", [6, 7], [LEFT_HAND]),
    (6, 7): ("left forearm", [7], [LEFT_HAND]),
    (0, 14): ("right eye", [14, 16], []),
    (0, 15): ("left eye", [15, 17], []),
    (14, 16): ("right ear", [16], []),
    (15, 17): ("left ear", [17], []),
    (1, 8): ("right trunk", [8, *LEG_R], [RIGHT_FOOT]),
    (1, 11): ("left trunk", [11, *LEG_L], [LEFT_FOOT]),
    (8, 9): ("right thigh", [9, 10], [RIGHT_FOOT]),
    (9, 10): ("right shin", [10], [RIGHT_FOOT]),
    (11, 12): ("left thigh", [12, 13], [LEFT_FOOT]),
    (12, 13): ("left shin", [13], [LEFT_FOOT]),
}
MIRROR = {1: 1, 0: 0, 2: 5, 3: 6, 4: 7, 8: 11, 9: 12, 10: 13, 14: 15, 16: 17}
MIRROR |= {right: left for left, right in MIRROR.items()}


@dataclass(frozen=True)
class Retargeting:
    """What maps a driving body onto a reference: out = ratios and scale about its neck, then the shift."""

    scale: float
    ratios: dict[tuple[int, int], float]  # after the scale
    shift: Tensor  # [2] pixels: reference's neck - scale * driving neck at the start
    unknown: tuple[str, ...]  # bones that only the scale changes

    def __call__(self, points: Tensor) -> Tensor:
        """points [F, K, 3] of the driving body -> on the reference's body, in its pixels. Confidences stay."""
        return retarget(points, self)


def bone_lengths(points: Tensor) -> dict[tuple[int, int], float]:
    """Median length in pixels of every bone that is confident in some frame of points [F, K, 3]."""
    lengths = {}
    for parent, child in BONES:
        seen = (points[:, [parent, child], 2] > CONFIDENT).all(1)
        length = (points[seen, child, :2] - points[seen, parent, :2]).norm(dim=-1)
        length = length[length > MIN_LENGTH]
        if len(length):
            lengths[parent, child] = float(length.median())
    return lengths


def fit(points: Tensor, reference: Tensor) -> Retargeting:
    """How the body in points [F, K, 3] (all of the clip, or its beginning) becomes the reference's [K, 3].

    ValueError where the two share too little to compare.
    """
    theirs, own = bone_lengths(points), bone_lengths(reference[None])
    low, high = RATIO_LIMITS
    common = [bone for bone in theirs if bone in own]
    if not common:
        raise ValueError(
            "the reference and the driving pose share no bone with both ends visible; give a reference image in which "
            "the body is seen, or leave retargeting out"
        )
    scale = float(torch.tensor([own[bone] / theirs[bone] for bone in common]).median())
    ratios, unknown = {}, []
    for bone, (name, *_) in BONES.items():
        twin = (MIRROR[bone[0]], MIRROR[bone[1]])
        known = next((b for b in (bone, twin) if b in own and b in theirs), None)
        if known is None:
            unknown.append(name)
            continue
        ratios[bone] = min(high, max(low, own[known] / (scale * theirs[known])))
    if unknown:
        logger.info("not retargeted, because hidden in the reference or the pose: %s", ", ".join(unknown))
    return Retargeting(scale, ratios, _shift(points, reference, scale), tuple(unknown))


def _shift(points: Tensor, reference: Tensor, scale: float) -> Tensor:
    """Neck on neck in the first frame that shows it; without necks, middle on middle of what both show."""
    seen = points[:, 1, 2] > CONFIDENT
    if seen.any() and reference[1, 2] > CONFIDENT:
        return reference[1, :2] - scale * points[seen][0, 1, :2]
    both = (points[..., 2] > CONFIDENT) & (reference[:, 2] > CONFIDENT)
    frame = int(both.sum(1).argmax())
    return (reference[both[frame], :2] - scale * points[frame, both[frame], :2]).mean(0)


def retarget(points: Tensor, how: Retargeting) -> Tensor:
    """See Retargeting."""
    out = points.clone()
    out[..., :2] = how.scale * points[..., :2] + how.shift
    for (parent, child), ratio in how.ratios.items():
        _, joints, groups = BONES[parent, child]
        moved = torch.zeros(points.shape[1], dtype=torch.bool)
        moved[joints] = True
        if points.shape[1] == NUM_WHOLE:
            for group in groups:
                moved[group] = True
        seen = (points[:, [parent, child], 2] > CONFIDENT).all(1)
        step = (ratio - 1) * (out[:, child, :2] - out[:, parent, :2]) * seen[:, None]
        out[..., :2] = out[..., :2] + step[:, None] * moved[None, :, None]
    hidden = points[..., 2] <= CONFIDENT
    out[..., :2] = torch.where(hidden[..., None], points[..., :2], out[..., :2])
    return out
