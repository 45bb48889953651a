"""Left and right of a track: detectors take a body that faces us for one seen from behind, a few frames at a time."""

import torch
from torch import Tensor

from utils.pose.keypoints import CONFIDENT, LEFT_FOOT, LEFT_HAND, NUM_BODY, NUM_WHOLE, RIGHT_FOOT, RIGHT_HAND
from utils.pose.retarget import MIRROR

LIMBS = list(range(2, 14))  # what is compared: shoulders to wrists, hips to ankles
TRUNK = ((2, 8), (5, 11))
MIN_SHARED = 6  # of LIMBS that two frames must both show to be compared
MIN_STEP = 0.2  # of the trunk's length: smaller steps are a body seen from its side, whose left lies on its right


def put_sides_right(points: Tensor) -> tuple[Tensor, Tensor]:
    """points [F, 18 or 134, 3] with each frame's left and right as most of the frames around it have them.

    Nobody turns round within a frame: where exchanging the sides halves the way of the limbs from one frame to the
    next, the sides are exchanged between the two. Of the frames between two gaps (no one is seen, or too little) the
    fewer are put right. Also returns which were, [F] of bool. A cut from the front to the back of one who stands still
    would be taken for a mistake, too.
    """
    wrong = _exchanged(points)
    begin = 0
    turned = torch.zeros(len(points), dtype=torch.bool)
    for frame in range(1, len(points) + 1):
        if frame == len(points) or wrong[frame] is None:
            part = turned[begin:frame]
            turned[begin:frame] = part ^ (part.float().mean() > 0.5)
            begin = frame
        else:
            turned[frame] = turned[frame - 1] ^ wrong[frame]
    return torch.where(turned[:, None, None], points[:, _mirror(points.shape[1])], points), turned


def _exchanged(points: Tensor) -> list[bool | None]:
    """Whether the sides of each frame are the other way round than those of the frame before; None: not comparable."""
    before, after = points[:-1, LIMBS], points[1:, LIMBS]
    other = points[1:][:, [MIRROR[joint] for joint in LIMBS]]
    shared = (torch.stack([before[..., 2], after[..., 2], other[..., 2]]) > CONFIDENT).all(0)
    count = shared.sum(1)
    straight, crossed = (
        ((there[..., :2] - before[..., :2]).norm(dim=-1) * shared).sum(1) / count.clamp(min=1)
        for there in (after, other)
    )
    trunk = torch.stack([(points[:-1, a, :2] - points[:-1, b, :2]).norm(dim=-1) for a, b in TRUNK]).mean(0)
    exchanged = (straight > 2 * crossed) & (straight > MIN_STEP * trunk)
    known = count >= MIN_SHARED
    return [None, *(bool(e) if k else None for e, k in zip(exchanged, known, strict=True))]


def _mirror(num_joints: int) -> list[int]:
    """Where each joint's twin is; the face stays as it is, since nothing draws it."""
    order = [MIRROR[joint] for joint in range(NUM_BODY)]
    if num_joints == NUM_WHOLE:
        order += range(NUM_BODY, NUM_WHOLE)
        for left, right in ((LEFT_FOOT, RIGHT_FOOT), (LEFT_HAND, RIGHT_HAND)):
            order[left], order[right] = range(NUM_WHOLE)[right], range(NUM_WHOLE)[left]
    return order
