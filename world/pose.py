"""Skeletons drawn the DWPose way: limbs, palette and order of the drawings that pose networks were trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from world.puppet import CANVAS

# Joint pairs of OpenPose-18 in painting order, and the palette they walk through.
LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),
    (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
PALETTE = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85),
    (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255),
    (255, 0, 170), (255, 0, 85), (170, 255, 255), (255, 255, 0),
)  # fmt: skip
FEET = ((13, 18), (10, 19))  # ankle to toes, the left one first: drawn where joints 18 and 19 are given
LIMB_BRIGHTNESS = 0.6


def draw_pose(
    joints: Tensor,
    size: int | tuple[int, int] = CANVAS,
    *,
    canvas: tuple[float, float] = (CANVAS, CANVAS),
    stick_width: float | None = None,
) -> Tensor:
    """Drawings [B, T, 3, height, width] in [0, 1] of joints [B, T, 18 or 20, 3] (x, y in px of the canvas, visible).

    size: (height, width), or one number for both; canvas: (height, width) that x and y are in.

    Limbs are ellipses, painted in order at 0.6 of their colour; then discs at the joints at full colour. Channels are
    reversed (limb 0 is blue): the published drawings went through a BGR writer, and the networks learned what came out.
    stick_width: half-width of limbs and radius of discs in output px; 4 px on a 512-px canvas, not below 1.75 px here.
    """
    joints = joints.to(torch.float32)
    height, width = (size, size) if isinstance(size, int) else size
    half = stick_width if stick_width is not None else max(4.0 * min(height, width) / 512, 1.75)
    points = joints[..., :2] * joints.new_tensor([width / canvas[1], height / canvas[0]])
    visible = joints[..., 2] > 0.5
    columns, rows = (torch.arange(n, device=joints.device, dtype=torch.float32) + 0.5 for n in (width, height))
    x, y = columns[None, None, None, :], rows[None, None, :, None]
    palette = torch.tensor(PALETTE, device=joints.device, dtype=torch.float32).flip(-1) / 255
    image = points.new_zeros(*joints.shape[:2], 3, height, width)

    def over(image: Tensor, distance: Tensor, shown: Tensor, colour: Tensor) -> Tensor:
        coverage = (0.5 - distance).clamp(0, 1) * shown[:, :, None, None]
        return image + coverage[:, :, None] * (colour[:, None, None] - image)

    def at(values: Tensor) -> Tensor:
        return values[:, :, None, None]

    limbs = LIMBS + (FEET if joints.shape[2] > 18 else ())
    for i, (start, end) in enumerate(limbs):
        a, b = points[:, :, start], points[:, :, end]
        middle, offset = (a + b) / 2, b - a
        length = offset.norm(dim=-1).clamp(min=1e-3)
        cos, sin = offset[..., 0] / length, offset[..., 1] / length
        px, py = x - at(middle[..., 0]), y - at(middle[..., 1])
        u, v = px * at(cos) + py * at(sin), py * at(cos) - px * at(sin)
        along = at((length / 2).clamp(min=half))
        # First-order distance to an ellipse: k0 (k0 - 1) / |grad k0^2| / 2.
        k0 = ((u / along) ** 2 + (v / half) ** 2 + 1e-9).sqrt()
        k1 = ((u / along**2) ** 2 + (v / half**2) ** 2 + 1e-9).sqrt()
        image = over(image, k0 * (k0 - 1) / k1, visible[:, :, start] & visible[:, :, end], palette[i])
    image = image * LIMB_BRIGHTNESS
    for i in range(joints.shape[2]):
        px, py = x - at(points[:, :, i, 0]), y - at(points[:, :, i, 1])
        image = over(image, (px * px + py * py + 1e-9).sqrt() - half, visible[:, :, i], palette[i])
    return image
