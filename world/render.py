"""From scenes to pixels: a fold of signed distances, painted back to front.

Every limb is a polyline of three points with a radius at each; its distance is exact up to the taper, its edge is one
pixel of anti-aliasing, its outline a darker rim. `shapes` computes parameters once per frame; `paint` is then pure
per-pixel arithmetic over a fixed list of layers, without branches on data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from world.puppet import CANVAS, FLOOR, JOINT_NAMES, PROP_RADIUS, Scenes, pose

# sRGB, 0 .. 255
BODY_RGB = {
    "red": (214, 48, 52),
    "orange": (245, 132, 31),
    "yellow": (250, 211, 52),
    "green": (66, 168, 76),
    "teal": (28, 170, 178),
    "blue": (50, 96, 220),
    "purple": (136, 70, 190),
    "pink": (244, 118, 178),
}
BACKGROUND_RGB = {
    "cream": (246, 234, 206),
    "mint": (178, 228, 202),
    "sky blue": (160, 208, 244),
    "lavender": (204, 190, 240),
    "rose": (246, 196, 198),
    "grey": (158, 162, 170),
    "navy": (48, 58, 104),
    "brown": (150, 108, 80),
}
SKIN_RGB = ((255, 224, 196), (246, 205, 168), (226, 178, 136), (196, 142, 102), (164, 114, 82), (134, 92, 68))

_HORIZON = 98.0
_J = {name: i for i, name in enumerate(JOINT_NAMES)}


@dataclass(frozen=True)
class Layer:
    """A line of the painting order: number of segments (1 or 2), outline and softness of the edge (px), opacity, relief
    (how much lighter the middle of the shape is than its rim)."""

    segments: int
    outline: float = 1.5
    softness: float = 1.5
    opacity: float = 1.0
    relief: float = 0.16


_SMALL = Layer(1, outline=0.0, relief=0.0)
LAYERS = (
    Layer(2),  # left leg
    Layer(1),  # left shoe
    Layer(2),  # right leg
    Layer(1),  # right shoe
    Layer(2, relief=0.12),  # torso
    Layer(2),  # left arm
    Layer(1),  # left hand
    Layer(2),  # right arm
    Layer(1),  # right hand
    Layer(1),  # pompom
    Layer(1),  # ears: one bar behind the head
    Layer(1, relief=0.10),  # head
    _SMALL,  # right eye
    _SMALL,  # left eye
    Layer(1, outline=0.0, softness=3.0, opacity=0.30, relief=0.0),  # right cheek
    Layer(1, outline=0.0, softness=3.0, opacity=0.30, relief=0.0),  # left cheek
    Layer(2, outline=0.0, opacity=0.85, relief=0.0),  # mouth
)
_CAP_AFTER = 11  # the cap is painted on the head, under the face


@dataclass(frozen=True)
class Shapes:
    """Per-frame parameters of `paint`; B scenes, T frames, L layers. Colours in 0 .. 1, a zero after them.

    points [L, B, T, 3, 2], radii [L, B, T, 3], colours [L, B, 4]; cap [B, T, 6]: centre, up vector, radius, cut;
    cap_colour [B, 4]; prop [B, T, 6]: centre, radius, cos and sin of its turn, squash; prop_kind [B, 4]: one-hot;
    prop_colour, background [B, 4]; stage [B, T, 6]: horizon y, puppet's shadow x, y, width, prop's shadow x, width.
    """

    points: Tensor
    radii: Tensor
    colours: Tensor
    cap: Tensor
    cap_colour: Tensor
    prop: Tensor
    prop_kind: Tensor
    prop_colour: Tensor
    background: Tensor
    stage: Tensor


def render(
    scenes: Scenes,
    num_frames: int,
    start_frame: int = 0,
    size: int = CANVAS,
    *,
    frame_stride: int = 1,
    return_mask: bool = False,
    frames_per_chunk: int = 4096,
) -> Tensor | tuple[Tensor, Tensor]:
    """Videos [B, T, 3, size, size] in [-1, 1] of num_frames frames from start_frame on, every frame_stride-th.

    return_mask: also the coverage [B, T, 1, size, size] in [0, 1] of the puppet and its prop.
    frames_per_chunk: frames (over all scenes) painted at once, which bounds memory: 0.2 MB x 40 each.
    """
    frames = start_frame + frame_stride * torch.arange(num_frames, device=scenes.device)
    if scenes.device.type == "cpu":
        frames_per_chunk = min(frames_per_chunk, 8)  # stay in the cache: three times faster than all at once
    scenes_at_once = max(1, frames_per_chunk // num_frames)
    frames_at_once = min(num_frames, frames_per_chunk)
    videos, masks = [], []
    for first in range(0, len(scenes), scenes_at_once):
        some = scenes.select(slice(first, first + scenes_at_once))
        parts = [
            paint(shapes(some, frames[t : t + frames_at_once]), size) for t in range(0, num_frames, frames_at_once)
        ]
        videos.append(torch.cat([video for video, _ in parts], dim=1))
        masks.append(torch.cat([mask for _, mask in parts], dim=1))
    video = torch.cat(videos)
    return (video, torch.cat(masks)) if return_mask else video


def shapes(scenes: Scenes, frames: Tensor) -> Shapes:
    """Where every layer is in each of `frames` [T], with the camera applied."""
    body = _rgb(BODY_RGB.values(), scenes.body)
    skin = _rgb(SKIN_RGB, scenes.skin)
    background = _rgb(BACKGROUND_RGB.values(), scenes.background)
    dark = skin.new_tensor([0.17, 0.12, 0.16]).expand_as(skin)
    lighter, darker = _tint(body, 0.30), body * 0.80
    shoe = body * 0.42 + 0.05
    blush = skin.new_tensor([0.95, 0.35, 0.36]).expand_as(skin)

    now = pose(scenes, frames)
    zoom = now.zoom[..., None]
    girth, width, head = (scenes.proportions[:, i, None, None] for i in (4, 6, 3))
    up = torch.stack([now.tilt.sin(), -now.tilt.cos()], -1)
    across = torch.stack([now.tilt.cos(), now.tilt.sin()], -1)
    spine = torch.stack([now.lean.sin(), -now.lean.cos()], -1)
    size = 13.5 * head * zoom  # radius of the head
    centre = now.head

    def joint(name: str) -> Tensor:
        return now.joints[:, :, _J[name]]

    lines: list[tuple[Tensor, Tensor]] = []  # ([B, T, 3, 2], [B, T, 3])

    def line(a: Tensor, b: Tensor, c: Tensor, *radii) -> None:
        ones = torch.ones_like(zoom[..., 0])
        radius = [(ones * (r[..., 0] if isinstance(r, Tensor) else r)) for r in radii]
        lines.append((torch.stack([a, b, c], 2), torch.stack(radius, -1)))

    thick = girth * zoom
    for side in ("left", "right"):
        line(joint(f"{side} hip"), joint(f"{side} knee"), joint(f"{side} ankle"), 6.0 * thick, 5.3 * thick, 4.6 * thick)
        toe = torch.stack([(1.0 if side == "left" else -1.0) * (1 - now.look.abs()) + 1.6 * now.look, 0 * now.look], -1)
        ankle = joint(f"{side} ankle") + torch.stack([0 * now.look, zoom[..., 0] * 0.6], -1)
        line(ankle - 1.2 * toe * zoom, ankle + 2.6 * toe * zoom, ankle, 4.3 * zoom, 4.3 * zoom, 4.3 * zoom)
    neck = joint("neck")
    pelvis = (joint("left hip") + joint("right hip")) / 2
    chest = neck - spine * 9.0 * zoom
    line(neck + spine * 1.0, chest, pelvis - spine * 1.0, 6.5 * zoom * width, 10.8 * zoom * width, 9.6 * zoom * width)
    for side in ("left", "right"):
        shoulder, elbow, wrist = (joint(f"{side} {name}") for name in ("shoulder", "elbow", "wrist"))
        inner = shoulder + (neck - shoulder) * 0.12
        line(inner, elbow, wrist, 5.1 * thick, 4.6 * thick, 4.5 * thick)
        onward = (wrist - elbow) / (wrist - elbow).norm(dim=-1, keepdim=True).clamp(min=1e-3)
        hand = wrist + onward * 3.2 * zoom
        line(hand, hand + onward * 0.5, hand, 5.2 * zoom, 5.0 * zoom, 5.0 * zoom)

    pompom = centre + up * (size + 1.6 * zoom)
    line(pompom, pompom + across * 0.1, pompom, 4.4 * zoom, 4.4 * zoom, 4.4 * zoom)
    right_ear, left_ear = joint("right ear"), joint("left ear")
    line(right_ear - up * 1.5, left_ear - up * 1.5, left_ear, 3.2 * zoom, 3.2 * zoom, 3.2 * zoom)
    line(centre, centre + up * 0.5, centre, size, size, size)
    for side in ("right", "left"):
        eye = joint(f"{side} eye")
        line(eye - up * 1.2 * zoom, eye + up * 1.2 * zoom, eye, 2.2 * zoom, 2.2 * zoom, 2.2 * zoom)
    nose = joint("nose")
    for s in (-1, 1):
        cheek = nose + across * s * size * 0.58 - up * size * 0.20
        line(cheek - across, cheek + across, cheek, 2.2 * zoom, 2.2 * zoom, 2.2 * zoom)
    mouth = nose - up * size * 0.20
    smile = across * size * 0.25
    line(
        mouth - smile + up * 0.8 * zoom, mouth - up * 0.5 * zoom, mouth + smile + up * 0.8 * zoom, *(3 * (0.8 * zoom,))
    )

    colours = [
        lighter, _tint(shoe, 0.12), darker, shoe, body, lighter, skin, darker, skin * 0.93,
        _tint(body, 0.45), skin * 0.92, skin, dark, dark, blush, blush, dark,
    ]  # fmt: skip
    cap = torch.cat([centre, up, size + 0.9, size * 0.36], -1)
    squash = now.squash[..., None]
    prop = torch.cat(
        [now.prop, PROP_RADIUS * zoom, now.turn.cos()[..., None], now.turn.sin()[..., None], 0.16 * squash], -1
    )
    ground = (FLOOR + 0.5 - CANVAS / 2) * zoom + CANVAS / 2 + now.pan[..., 1:]
    horizon = (_HORIZON - CANVAS / 2) * zoom + CANVAS / 2 + now.pan[..., 1:]
    feet = (joint("left ankle") + joint("right ankle"))[..., :1] / 2 * 0.5 + pelvis[..., :1] * 0.5
    spread = (joint("left ankle") - joint("right ankle"))[..., :1].abs()
    shadow = (17.0 + 0.30 * spread) * zoom * (1 - 0.022 * now.hop[..., None])
    under_prop = 9.0 + 4.0 * squash
    stage = torch.cat([horizon, feet, ground, shadow, now.prop[..., :1], under_prop], -1)
    return Shapes(
        points=torch.stack([points for points, _ in lines]),
        radii=torch.stack([radii for _, radii in lines]),
        colours=_four_channels(torch.stack(colours)),
        cap=cap,
        cap_colour=_four_channels(body * 0.92),
        prop=prop,
        prop_kind=torch.nn.functional.one_hot(scenes.prop, 4).to(cap.dtype),
        prop_colour=_four_channels(_rgb(BODY_RGB.values(), scenes.prop_colour)),
        background=_four_channels(background),
        stage=stage,
    )


def paint(shapes: Shapes, size: int) -> tuple[Tensor, Tensor]:
    """Pixels [B, T, 3, size, size] in [-1, 1] and coverage [B, T, 1, size, size] of puppet and prop.

    A backdrop, then strokes on a canvas [B, T, 4, size, size] (r, g, b, uncovered). Eager: an H200 paints 20,000
    frames/s, more than training asks for, and compiling the strokes takes a minute.
    """
    canvas = _backdrop(shapes.stage, shapes.background, shapes.prop_kind, size)
    canvas = _prop(canvas, shapes.prop, shapes.prop_kind, shapes.prop_colour)
    for i, layer in enumerate(LAYERS):
        canvas = _limb(canvas, shapes.points[i], shapes.radii[i], shapes.colours[i], layer)
        if i == _CAP_AFTER:
            canvas = _cap(canvas, shapes.cap, shapes.cap_colour)
    return canvas[:, :, :3].clamp(0, 1) * 2 - 1, 1 - canvas[:, :, 3:]


def _pixels(size: int, like: Tensor) -> tuple[Tensor, Tensor, float]:
    """Centres of pixels in canvas px, x [size] and y [size, 1], and canvas px per output px."""
    pixel = CANVAS / size
    axis = (torch.arange(size, device=like.device, dtype=like.dtype) + 0.5) * pixel
    return axis, axis[:, None], pixel


def _per_frame(values: Tensor) -> Tensor:
    """[B, T] -> [B, T, 1, 1, 1], to meet [B, T, channels, size, size]."""
    return values[:, :, None, None, None]


def _backdrop(stage: Tensor, background: Tensor, prop_kind: Tensor, size: int) -> Tensor:
    """The empty canvas: a wall that darkens downwards, a floor that lightens towards us, two soft shadows."""
    x, y, _ = _pixels(size, stage)
    horizon, feet_x, ground, shadow_width, prop_x, prop_width = (_per_frame(stage[..., i]) for i in range(6))
    wall = 1.05 - 0.13 * y / CANVAS
    floor = 0.76 + 0.14 * (y - horizon) / (CANVAS - _HORIZON)
    on_floor = ((y - horizon) / 2.0 + 0.5).clamp(0, 1)
    line = 0.10 * torch.exp(-(((y - horizon) / 1.6) ** 2))
    depth = ((y - ground) / 3.4) ** 2
    has_prop = 1 - prop_kind[:, 0, None, None, None, None]
    shade = 1 - 0.42 * torch.exp(-(((x - feet_x) / shadow_width) ** 2) - depth)
    shade = shade - 0.34 * has_prop * torch.exp(-(((x - prop_x) / prop_width) ** 2) - depth)
    light = (wall * (1 - on_floor) + floor * on_floor - line) * shade
    colour = background[:, None, :, None, None]
    uncovered = torch.arange(4, device=stage.device)[:, None, None] == 3
    return colour * light + uncovered


def _over(canvas, distance, colour, radius, outline, softness, opacity, relief) -> Tensor:
    """Paint a shape of signed `distance` (px, negative inside) on the canvas: its outline, and its lit inside.

    What counts as uncovered shrinks by the outline's coverage. Layers without an outline lie on others that have one.
    """
    fill = (0.5 - distance / softness).clamp(0, 1) * opacity
    rim = (0.5 - (distance - outline) / softness).clamp(0, 1) * opacity
    lit = 1 + relief * ((-distance / radius).clamp(0, 1) - 0.35)
    ink = rim - fill
    colour = colour[:, None, :, None, None]
    visible = torch.arange(4, device=canvas.device)[:, None, None] < 3
    return canvas * (1 - rim) + (fill * lit + 0.42 * ink) * colour + 0.02 * ink * visible


def _limb(canvas: Tensor, points: Tensor, radii: Tensor, colour: Tensor, layer: Layer) -> Tensor:
    """One or two tapered capsules; points [B, T, 3, 2], radii [B, T, 3]."""
    x, y, pixel = _pixels(canvas.shape[-1], canvas)

    def segment(i: int, j: int) -> Tensor:
        ax, ay = _per_frame(points[:, :, i, 0]), _per_frame(points[:, :, i, 1])
        dx, dy = _per_frame(points[:, :, j, 0]) - ax, _per_frame(points[:, :, j, 1]) - ay
        ra, rb = _per_frame(radii[:, :, i]), _per_frame(radii[:, :, j])
        px, py = x - ax, y - ay
        along = ((px * dx + py * dy) * (1 / (dx * dx + dy * dy + 1e-6))).clamp(0, 1)
        ex, ey = px - along * dx, py - along * dy
        return (ex * ex + ey * ey + 1e-6).sqrt() - (ra + (rb - ra) * along)

    distance = segment(0, 1)
    if layer.segments == 2:
        distance = torch.minimum(distance, segment(1, 2))
    radius, softness = _per_frame(radii[:, :, 1]), layer.softness * pixel
    return _over(canvas, distance, colour, radius, layer.outline, softness, layer.opacity, layer.relief)


def _cap(canvas: Tensor, cap: Tensor, colour: Tensor) -> Tensor:
    """The part of a disc above a line across the head."""
    x, y, pixel = _pixels(canvas.shape[-1], canvas)
    cx, cy, ux, uy, radius, cut = (_per_frame(cap[..., k]) for k in range(6))
    disc = ((x - cx) ** 2 + (y - cy) ** 2 + 1e-6).sqrt() - radius
    brim = cut - ((x - cx) * ux + (y - cy) * uy)
    return _over(canvas, torch.maximum(disc, brim), colour, radius, 1.4, pixel, 1.0, 0.2)


def _prop(canvas: Tensor, prop: Tensor, kind: Tensor, colour: Tensor) -> Tensor:
    x, y, pixel = _pixels(canvas.shape[-1], canvas)
    distance = _prop_distance(x, y, [_per_frame(prop[..., i]) for i in range(6)], kind)
    return _over(canvas, distance, colour, PROP_RADIUS, 1.4, pixel, 1.0, 0.22)


def _prop_distance(x: Tensor, y: Tensor, prop: list[Tensor], kind: Tensor) -> Tensor:
    """Signed distance to the ball, cube or star of each scene; far outside everywhere when there is none."""
    cx, cy, radius, cos, sin, squash = prop
    px, py = (x - cx) / (1 + 0.7 * squash), (y - cy - radius * squash) / (1 - squash)
    qx, qy = px * cos + py * sin, py * cos - px * sin
    ball = (px * px + py * py + 1e-6).sqrt() - radius
    bx, by = qx.abs() - 0.62 * radius, qy.abs() - 0.62 * radius
    inside = torch.maximum(bx, by).clamp(max=0)
    cube = (bx.clamp(min=0) ** 2 + by.clamp(min=0) ** 2 + 1e-6).sqrt() + inside - 0.24 * radius
    star = _star_distance(qx, qy, radius * 1.16) - 0.8
    none, is_ball, is_cube, is_star = (kind[:, i, None, None, None, None] for i in range(4))
    return none * 1e3 + is_ball * ball + is_cube * cube + is_star * star


def _star_distance(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to a five-pointed star: fold the plane into half a point, then measure to its one edge."""
    wedge = 2 * math.pi / 5
    angle = torch.atan2(x, -y) / wedge
    angle = (angle - (angle + 0.5).floor()).abs() * wedge  # 0 at a tip, wedge / 2 in a notch
    reach = (x * x + y * y + 1e-6).sqrt()
    px, py = reach * angle.cos() - radius, reach * angle.sin()  # relative to the tip
    notch = 0.52
    ex, ey = radius * (notch * math.cos(wedge / 2) - 1), radius * (notch * math.sin(wedge / 2))
    along = ((px * ex + py * ey) / (ex * ex + ey * ey)).clamp(0, 1)
    distance = ((px - along * ex) ** 2 + (py - along * ey) ** 2 + 1e-6).sqrt()
    return torch.where(px * ey - py * ex > 0, distance, -distance)


def _tint(colour: Tensor, amount: float) -> Tensor:
    return colour + (1 - colour) * amount


def _rgb(table, index: Tensor) -> Tensor:
    return torch.tensor(list(table), dtype=torch.float32, device=index.device)[index] / 255


def _four_channels(colour: Tensor) -> Tensor:
    """r, g, b and a zero for the canvas's fourth plane, what is still uncovered."""
    return torch.nn.functional.pad(colour, (0, 1))
