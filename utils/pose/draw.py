"""Skeletons to the drawings that pose networks read, in three profiles.

legacy  768 x 512 whatever the video's aspect, in whole pixels: what UniAnimate's released weights were trained on
native  the video's own size, smooth edges (world.pose)
body    native without hands and feet: puppets have none, and the embedded model learns from puppets

All show channels reversed (limb 0 is blue): the published drawings went through a writer that takes BGR.
"""

import colorsys
import math
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from utils.pose.keypoints import CONFIDENT, LEFT_FOOT, LEFT_HAND, NUM_BODY, NUM_WHOLE, RIGHT_FOOT, RIGHT_HAND, Keypoints
from world.pose import FEET, LIMB_BRIGHTNESS, LIMBS, PALETTE, draw_pose

PROFILES = ("legacy", "native", "body")
LEGACY_SIZE = (768, 512)  # height, width
HAND_EDGES = [(finger, finger + 1) if i else (0, finger + 1) for f in range(5) for i, finger in
              enumerate(range(4 * f, 4 * f + 4))]  # fmt: skip
HAND_COLOURS = [tuple(round(255 * c) for c in colorsys.hsv_to_rgb(i / 20, 1, 1)) for i in range(20)]


def drawings(
    track: Keypoints, size: tuple[int, int], profile: str = "legacy", *, change=None, hands: bool = True
) -> Iterator[Tensor]:
    """Pieces uint8 [1, f, 3, h, w] of a track, as `dwpose_data` takes them.

    size: (height, width) of the video; legacy draws in its own. change: a function on points [f, K, 3], such as a
    Retargeting, whose result is in the pixels of `size`.
    """
    for piece in track.pieces():
        source = (track.height, track.width)
        if change is not None:
            piece, source = change(piece), size
        for part in piece.split(8):
            yield draw(part, source, size, profile, hands=hands)[None]


def draw(
    points: Tensor, source: tuple[int, int], size: tuple[int, int], profile: str = "legacy", *, hands: bool = True
) -> Tensor:
    """points [F, 18 or 134, 3] in pixels of source = (height, width) -> drawings uint8 [F, 3, h, w]."""
    if profile not in PROFILES:
        raise ValueError(f"drawing profile {profile!r} is unknown; use one of {', '.join(PROFILES)}")
    height, width = LEGACY_SIZE if profile == "legacy" else size
    if profile == "body":
        points = points[:, :NUM_BODY]
    body = with_feet(points)
    body[..., :2] *= body.new_tensor([width / source[1], height / source[0]])
    if profile == "legacy":
        frames = torch.stack([_legacy_body(frame, height, width) for frame in body])
    else:
        half = max(4.0 * min(height, width) / 512, 1.75)
        smooth = draw_pose(body[None], (height, width), canvas=(height, width), stick_width=half)[0]
        frames = smooth.mul(255).round().to(torch.uint8)
    if hands and points.shape[1] == NUM_WHOLE:
        scaled = points.cpu() * torch.tensor([width / source[1], height / source[0], 1.0])
        thickness = 2 if profile == "legacy" else max(1, round(min(height, width) / 256))
        with_hands = [_with_hands(f, p, thickness) for f, p in zip(frames.cpu(), scaled, strict=True)]
        frames = torch.stack(with_hands).to(points.device)
    return frames


def with_feet(points: Tensor) -> Tensor:
    """[F, K, 3] -> [F, 18 or 20, 3] with visibility 0 or 1: a foot is the middle of its toes, the left one first."""
    body = points[:, :18].clone()
    if points.shape[1] == NUM_WHOLE:
        toes = [points[:, group][:, :2] for group in (LEFT_FOOT, RIGHT_FOOT)]
        feet = [torch.cat([t[..., :2].mean(1), t[..., 2:].amin(1)], dim=-1) for t in toes]
        body = torch.cat([body, torch.stack(feet, dim=1)], dim=1)
    body[..., 2] = (body[..., 2] > CONFIDENT).float()
    return body


def _legacy_body(joints: Tensor, height: int, width: int) -> Tensor:
    image = Image.new("RGB", (width, height))
    brush = ImageDraw.Draw(image)
    seen = joints[:, 2] > 0.5
    limbs = LIMBS + (FEET if len(joints) == 20 else ())
    for (start, end), colour in zip(limbs, PALETTE, strict=False):
        if seen[start] and seen[end]:
            brush.polygon(_ellipse(joints[start].tolist(), joints[end].tolist(), 4), fill=colour[::-1])
    image = Image.fromarray((np.asarray(image) * LIMB_BRIGHTNESS).astype(np.uint8))
    brush = ImageDraw.Draw(image)
    for (x, y, visible), colour in zip(joints.tolist(), PALETTE, strict=False):
        if visible > 0.5:
            _disc(brush, int(x), int(y), 4, colour[::-1])
    return _pixels(image)


def _ellipse(start: list[float], end: list[float], half: int) -> list[tuple[int, int]]:
    """Outline of a limb: centre, length and angle in whole numbers, as the published drawings have them."""
    (x0, y0, _), (x1, y1, _) = start, end
    centre_x, centre_y = int((x0 + x1) / 2), int((y0 + y1) / 2)
    along = int(math.hypot(x1 - x0, y1 - y0) / 2)
    angle = math.radians(int(math.degrees(math.atan2(y1 - y0, x1 - x0))))
    points = []
    for degree in range(360):
        u, v = along * math.cos(math.radians(degree)), half * math.sin(math.radians(degree))
        points.append(
            (
                round(centre_x + u * math.cos(angle) - v * math.sin(angle)),
                round(centre_y + u * math.sin(angle) + v * math.cos(angle)),
            )
        )
    return points


def _with_hands(frame: Tensor, points: Tensor, thickness: int) -> Tensor:
    image = Image.fromarray(frame.permute(1, 2, 0).numpy())
    brush = ImageDraw.Draw(image)
    for group in (LEFT_HAND, RIGHT_HAND):
        hand = points[group].tolist()
        # A point that is not there, or lies at the edge of the canvas, leaves out its lines: the published test.
        seen = [c > CONFIDENT and int(x) > 0 and int(y) > 0 for x, y, c in hand]
        for (start, end), colour in zip(HAND_EDGES, HAND_COLOURS, strict=True):
            if seen[start] and seen[end]:
                line = [tuple(int(value) for value in hand[i][:2]) for i in (start, end)]
                brush.line(line, fill=colour[::-1], width=thickness)
        for (x, y, _), there in zip(hand, seen, strict=True):
            if there:
                _disc(brush, int(x), int(y), 2 * thickness, (255, 0, 0))
    return _pixels(image)


def _disc(brush: ImageDraw.ImageDraw, x: int, y: int, radius: int, colour: tuple[int, ...]) -> None:
    brush.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(colour))


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
