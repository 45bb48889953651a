"""Who is in the picture and where every joint is, as closed formulas in time.

A scene is a row of numbers; `sample_scenes` draws rows from a counter-based hash, so that scene i of a seed is the same
whatever the batch size, the order or the device. `pose` turns rows into joints for any frame index: nothing is
integrated over time, hence frame 10,000 costs what frame 0 costs.

Units: pixels of the 128 x 128 canvas, y down; 16 frames/s; angles in radians. The puppet faces us, so its right side
is on the left of the picture. Joints are OpenPose-18: nose, neck, R shoulder/elbow/wrist, L arm, R hip/knee/ankle, L
leg, R eye, L eye, R ear, L ear.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from world.hashing import hash_int, hash_tensor
from world.hashing import uniform as to_uniform

CANVAS = 128
FPS = 16
FLOOR = 113.0  # y of the ground under the soles

BODY_COLOURS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink")
BACKGROUNDS = ("cream", "mint", "sky blue", "lavender", "rose", "grey", "navy", "brown")
ACTIONS = ("wave", "walk", "jump", "squat", "dance", "spin arms", "bow", "cheer", "kick", "improvise")
SPEEDS = ("slow", "normal", "fast")
PROPS = ("none", "ball", "cube", "star")
NUM_SKINS = 6

# Hz at normal speed. Times 1.4 (fast), and doubled where a cycle holds two beats (walk, dance), all stay below 0.8 Hz:
# the VAE sees one latent per four frames, and a limb that swings far within four frames comes back blurred.
ACTION_HZ = (0.52, 0.28, 0.36, 0.30, 0.28, 0.28, 0.20, 0.46, 0.32, 0.21)
SPEED_FACTORS = (0.7, 1.0, 1.4)

JOINT_NAMES = (
    "nose", "neck", "right shoulder", "right elbow", "right wrist", "left shoulder", "left elbow", "left wrist",
    "right hip", "right knee", "right ankle", "left hip", "left knee", "left ankle",
    "right eye", "left eye", "right ear", "left ear",
)  # fmt: skip
NUM_BODY_JOINTS = 14

HELDOUT_EVERY = 10  # one attribute combination in ten is never shown in training
HELDOUT_STYLES_EVERY = 5  # one style of improvised motion in five

_NUM_WAVES = 3
_MOTION_CHANNELS = 12


@dataclass(frozen=True)
class Scenes:
    """A batch of B scenes. Integer fields index the tables above; `prop_colour` means nothing when `prop` is 0 (none).

    proportions [B, 7]: factors on leg, torso, arm, head, limb width, shoulder width, body width.
    side [B]: +1 or -1, the side that leads (waves, kicks, bows); the prop stands on the other.
    motion [B, 12, 3, 3]: (amplitude, frequency factor, phase) of the waves of an improvised motion; centres in
    `pose_centres`.
    camera [B, 4]: pan x, pan y (px), zoom (fraction), phase (turns).
    """

    body: Tensor
    background: Tensor
    skin: Tensor
    action: Tensor
    speed: Tensor
    prop: Tensor
    prop_colour: Tensor
    proportions: Tensor
    phase: Tensor
    side: Tensor
    motion: Tensor
    pose_centres: Tensor
    camera: Tensor

    def __len__(self) -> int:
        return self.body.shape[0]

    @property
    def device(self) -> torch.device:
        return self.body.device

    def to(self, device) -> Scenes:
        return self._map(lambda field: field.to(device))

    def select(self, idx) -> Scenes:
        """The scenes at `idx` (slice, list or tensor)."""
        return self._map(lambda field: field[idx])

    def _map(self, change) -> Scenes:
        return Scenes(**{f.name: change(getattr(self, f.name)) for f in dataclasses.fields(self)})


# ---- drawing scenes ----


def sample_scenes(
    n: int,
    seed: int,
    split: str = "train",
    *,
    start: int = 0,
    device: torch.device | str = "cpu",
    moving_camera: float = 0.2,
    no_prop: float = 0.3,
) -> Scenes:
    """Scenes start .. start + n - 1 of a seed; scene i does not depend on n, start or device.

    split: "train" never shows the held-out (body, background, action, prop) combinations nor the held-out styles of
    improvised motion; "heldout" shows only held-out combinations, and held-out styles when improvising.
    moving_camera: share of scenes with a slow pan and zoom; no_prop: share without a prop (before the split's
    rejection).
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split {split!r} is unknown; use 'train' or 'heldout'")
    index = torch.arange(start, start + n, device=device, dtype=torch.int64)

    def uniform(stream: int, count: int = 1) -> Tensor:
        counter = torch.arange(count, device=device, dtype=torch.int64)
        return to_uniform(hash_tensor(hash_tensor(index + hash_int(seed))[:, None] + hash_int(stream) + counter))

    def choice(stream: int, options: int) -> Tensor:
        return (uniform(stream)[:, 0] * options).long()

    # Draw many combinations and take the first that the split allows: .9 ** 256 < 1e-11 of finding none.
    candidates = 16 if split == "train" else 256
    drawn = [
        (uniform(stream, candidates) * options).long()
        for stream, options in (
            (1, len(BODY_COLOURS)),
            (2, len(BACKGROUNDS)),
            (3, len(ACTIONS)),
            (5, len(BODY_COLOURS)),
        )
    ]
    kind = uniform(4, candidates)
    prop = torch.where(kind < no_prop, 0, 1 + ((kind - no_prop) / (1 - no_prop) * 3).long().clamp(max=2))
    body, background, action, prop_colour = drawn
    prop_colour = torch.where(prop == 0, 0, prop_colour)
    allowed = is_heldout(body, background, action, prop, prop_colour) == (split == "heldout")
    first = allowed.int().argmax(1, keepdim=True)
    body, background, action, prop, prop_colour = (
        values.gather(1, first)[:, 0] for values in (body, background, action, prop, prop_colour)
    )

    centres, motion = _improvised_motion(uniform, split)
    camera = torch.stack(
        [
            (uniform(20)[:, 0] * 2 - 1) * 3.0,
            (uniform(21)[:, 0] * 2 - 1) * 1.5,
            uniform(22)[:, 0] * 0.06,
            uniform(23)[:, 0],
        ],
        dim=1,
    )
    camera[:, :3] *= (uniform(24) < moving_camera).float()
    return Scenes(
        body=body,
        background=background,
        skin=choice(6, NUM_SKINS),
        action=action,
        speed=choice(7, len(SPEEDS)),
        prop=prop,
        prop_colour=prop_colour,
        proportions=_proportions(uniform(8, 7)),
        phase=uniform(9)[:, 0],
        side=(choice(10, 2) * 2 - 1).float(),
        motion=motion,
        pose_centres=centres,
        camera=camera,
    )


def is_heldout(body: Tensor, background: Tensor, action: Tensor, prop: Tensor, prop_colour: Tensor) -> Tensor:
    """Whether a combination of attributes belongs to the held-out tenth; fixed for ever by a hash, not by a seed."""
    look = torch.where(prop == 0, 0, prop * len(BODY_COLOURS) + prop_colour + 1)
    key = ((body * len(BACKGROUNDS) + background) * len(ACTIONS) + action) * 64 + look
    return hash_tensor(key + hash_int(0x5CE7E)) % HELDOUT_EVERY == 0


def is_heldout_style(arms: Tensor, other_arm: Tensor, legs: Tensor) -> Tensor:
    """Whether a style of improvised motion (4 x 4 x 3 of them) is held out."""
    return hash_tensor((arms * 4 + other_arm) * 3 + legs + hash_int(0x57113)) % HELDOUT_STYLES_EVERY == 0


def _improvised_motion(uniform, split: str) -> tuple[Tensor, Tensor]:
    """Centres [n, 12] and waves [n, 12, 3, 3] of smooth random motion in one of 48 styles.

    The style is where each arm hovers (down, out, up, bent across) and what the legs do (stand, sway, step).
    """
    candidates = 32
    arms, other_arm = ((uniform(s, candidates) * 4).long() for s in (30, 31))
    legs = (uniform(32, candidates) * 3).long()
    first = (is_heldout_style(arms, other_arm, legs) == (split == "heldout")).int().argmax(1, keepdim=True)
    arms, other_arm, legs = (style.gather(1, first)[:, 0] for style in (arms, other_arm, legs))
    device = arms.device
    shoulder = torch.tensor([0.45, 1.35, 2.45, 0.75], device=device)
    elbow = torch.tensor([0.15, 0.25, 0.20, 1.50], device=device)
    n = arms.shape[0]
    centres = torch.zeros(n, _MOTION_CHANNELS, device=device)
    centres[:, _CH["arm_lead"]], centres[:, _CH["arm_other"]] = shoulder[arms], shoulder[other_arm]
    centres[:, _CH["elbow_lead"]], centres[:, _CH["elbow_other"]] = elbow[arms], elbow[other_arm]
    centres[:, _CH["foot_lead"]] = centres[:, _CH["foot_other"]] = 10.0

    # px, crouch, lean, tilt, look, arm, elbow, arm, elbow, feet do not slide; lifts of the feet belong to "step"
    reach = torch.tensor([5.0, 0.10, 0.12, 0.14, 0.4, 0.55, 0.55, 0.55, 0.55, 0.0, 0.0, 0.0], device=device)
    reach = reach.expand(n, -1).clone()
    reach[:, _CH["px"]] *= torch.tensor([0.4, 1.4, 1.0], device=device)[legs]
    reach[:, _CH["crouch"]] *= torch.tensor([0.5, 1.0, 0.8], device=device)[legs]
    reach[:, _CH["step"]] = torch.where(legs == 2, 7.0, 0.0)
    waves = uniform(33, _MOTION_CHANNELS * _NUM_WAVES * 3).view(n, _MOTION_CHANNELS, _NUM_WAVES, 3)
    share = torch.tensor([0.6, 0.3, 0.2], device=device)
    amplitude = reach[..., None] * share * (0.6 + 0.6 * waves[..., 0])
    frequency = torch.tensor([0.7, 1.3, 2.1], device=device) * (0.85 + 0.3 * waves[..., 1])
    return centres, torch.stack([amplitude, frequency, waves[..., 2]], dim=-1)


def _proportions(u: Tensor) -> Tensor:
    low = u.new_tensor([0.88, 0.90, 0.90, 0.90, 0.96, 0.90, 0.90])
    high = u.new_tensor([1.10, 1.10, 1.10, 1.10, 1.14, 1.14, 1.14])
    factors = low + (high - low) * u
    height = _SOLE + _LEG * factors[:, 0] + _TORSO * factors[:, 1] + _NECK + 2 * _HEAD * factors[:, 3] + _POMPOM
    shrink = (_MAX_HEIGHT / height).clamp(max=1.0)
    factors[:, :4] *= shrink[:, None]
    return factors


# ---- motion ----

# Lengths in px at proportion 1.
_SOLE, _LEG, _TORSO, _NECK, _HEAD, _POMPOM = 4.5, 33.0, 28.0, 1.5, 13.5, 4.0
_UPPER_ARM, _FOREARM = 15.0, 14.5
_SHOULDER, _HIP, _STANCE = 12.0, 6.5, 9.0
_MAX_HEIGHT = 99.0
_HOP = 9.5

# What an action says at each moment. "lead" is the side that leads; x-directions point to it.
#   px pelvis shift, crouch share of the leg folded away, lean and tilt of torso and head, look where the face turns;
#   arms: angle from hanging, outwards; elbow: further outwards (negative folds across the belly);
#   foot_*: px outwards from the middle of the stance; step: px, the lead (>0) or other (<0) foot lifted;
#   hop: px above ground; lift_*: px; path_*: px, feet walking; profile: 1 when knees bend towards the face.
_CHANNELS = (
    "px", "crouch", "lean", "tilt", "look", "arm_lead", "elbow_lead", "arm_other", "elbow_other",
    "foot_lead", "foot_other", "step", "hop", "lift_lead", "lift_other", "path_lead", "path_other", "profile",
)  # fmt: skip
_AT_REST = {
    "arm_lead": 0.30,
    "arm_other": 0.30,
    "elbow_lead": 0.12,
    "elbow_other": 0.12,
    "foot_lead": _STANCE,
    "foot_other": _STANCE,
}
_CH = {name: i for i, name in enumerate(_CHANNELS)}


@dataclass(frozen=True)
class Pose:
    """Everything the drawing needs: joints [B, T, 18, 2] px, and per frame [B, T] or [B, T, 2] extras.

    tilt: angle of the head, look: -1 .. 1 where the face turns (+ is the puppet's left, our right);
    head [B, T, 2]: its centre; prop [B, T, 2]: its centre; squash, turn: its flattening and rotation; hop: px above
    ground.
    """

    joints: Tensor
    head: Tensor
    tilt: Tensor
    look: Tensor
    lean: Tensor
    hop: Tensor
    prop: Tensor
    squash: Tensor
    turn: Tensor
    zoom: Tensor
    pan: Tensor


def joints(scenes: Scenes, frames: Tensor) -> Tensor:
    """Joints [B, T, 18, 3] (x, y in px of the 128 canvas, visible) at integer or fractional frame indices [T]."""
    points = pose(scenes, frames).joints
    visible = ((points >= 0) & (points < CANVAS)).all(-1, keepdim=True)
    return torch.cat([points, visible.to(points.dtype)], dim=-1)


def pose(scenes: Scenes, frames: Tensor) -> Pose:
    """What the action says -> feet, pelvis height from the legs' reach, knees by inverse kinematics, arms, head."""
    frames = torch.as_tensor(frames, device=scenes.device)
    seconds = frames.to(torch.float64)[None] / FPS
    hz = _lookup(ACTION_HZ, scenes.action) * _lookup(SPEED_FACTORS, scenes.speed)
    turns = hz.double()[:, None] * seconds + scenes.phase.double()[:, None]  # float64: endless streams stay smooth
    say = _act(scenes, turns)

    side = scenes.side[:, None]
    leg, torso, arm, head, _, shoulder, _ = (scenes.proportions[:, i, None] for i in range(7))
    has_prop = (scenes.prop > 0).float()[:, None]
    middle = CANVAS / 2 + side * 7.0 * has_prop
    look, lean, tilt = (side * say[name] for name in ("look", "lean", "tilt"))

    # Left is +1 on the picture's x axis. "lead" is left when side is +1.
    def of(name: str, s: int) -> Tensor:
        return torch.where(side == s, say[name + "_lead"], say[name + "_other"])

    narrow = 1 - 0.45 * say["profile"] * look.abs()  # a body seen from the side is narrower
    pelvis_x = middle + side * say["px"]
    step = {s: (side * s * say["step"]).clamp(min=0) for s in (-1, 1)}
    foot_x = {s: middle + s * of("foot", s) + side * of("path", s) for s in (-1, 1)}
    ankle_y = {s: FLOOR - _SOLE - say["hop"] - of("lift", s) - step[s] for s in (-1, 1)}
    hip_dx = _HIP * narrow

    # The pelvis hangs as high as the legs on the ground reach, less what the crouch folds away.
    length = _LEG * leg * 0.985
    raised = {s: (of("lift", s) + step[s]) / 4.0 for s in (-1, 1)}
    reach = [
        (length**2 - (foot_x[s] - pelvis_x - s * hip_dx) ** 2).clamp(min=1.0).sqrt() + 8.0 * raised[s] for s in (-1, 1)
    ]
    height = torch.minimum(torch.minimum(*reach), length) * (1 - say["crouch"])
    pelvis = torch.stack([pelvis_x, FLOOR - _SOLE - say["hop"] - height], -1)

    up = torch.stack([lean.sin(), -lean.cos()], -1)
    across = torch.stack([lean.cos(), lean.sin()], -1)
    neck = pelvis + up * (_TORSO * torso)[..., None]
    points: dict[str, Tensor] = {"neck": neck}
    for s, name in ((-1, "right"), (1, "left")):
        hip = pelvis + s * hip_dx[..., None] * torch.stack([(lean * 0.3).cos(), (lean * 0.3).sin()], -1)
        foot = torch.stack([foot_x[s], ankle_y[s]], -1)
        knee_side = torch.lerp(torch.full_like(look, float(s)), look, say["profile"])
        points[f"{name} hip"] = hip
        points[f"{name} knee"], points[f"{name} ankle"] = _bend(hip, foot, _LEG * leg / 2, knee_side)
        top = neck + s * across * (_SHOULDER * shoulder * narrow)[..., None] - up * 4.0
        angle = of("arm", s)
        elbow = top + _hang(s, angle, lean) * (_UPPER_ARM * arm)[..., None]
        points[f"{name} shoulder"], points[f"{name} elbow"] = top, elbow
        points[f"{name} wrist"] = elbow + _hang(s, angle + of("elbow", s), lean) * (_FOREARM * arm)[..., None]

    total = lean * 0.8 + tilt
    head_up = torch.stack([total.sin(), -total.cos()], -1)
    head_across = torch.stack([total.cos(), total.sin()], -1)
    radius = (_HEAD * head)[..., None]
    centre = neck + up * _NECK + head_up * radius * 0.9
    face = centre + head_across * (look[..., None] * 0.28 * radius) - head_up * 0.14 * radius
    points["nose"] = face - head_up * 0.14 * radius
    for s, name in ((-1, "right"), (1, "left")):
        points[f"{name} eye"] = face + s * head_across * 0.43 * radius * (1 - 0.12 * look.abs())[..., None]
        points[f"{name} ear"] = centre + s * head_across * 0.97 * radius - head_up * 0.05 * radius

    prop, squash, turn = _bounce(scenes, seconds, CANVAS / 2 - side * 46.0)
    zoom, pan = _camera(scenes, seconds)
    stacked = torch.stack([points[name] for name in JOINT_NAMES], dim=2)
    return Pose(
        joints=_view(stacked, zoom, pan),
        head=_view(centre, zoom, pan),
        tilt=total,
        look=look,
        lean=lean,
        hop=say["hop"],
        prop=_view(prop, zoom, pan),
        squash=squash,
        turn=turn,
        zoom=zoom,
        pan=pan,
    )


def _act(scenes: Scenes, turns: Tensor) -> dict[str, Tensor]:
    """What each scene's action says, per channel [B, T]. All actions are evaluated and one is picked: no branches."""
    cycle = (turns - turns.floor()).float()
    angle = cycle * (2 * math.pi)
    sin, cos = angle.sin(), angle.cos()
    swell = (1 - cos) / 2  # 0 .. 1 .. 0 once a cycle
    zero = torch.zeros_like(sin)

    def saying(**channels) -> Tensor:
        return torch.stack([zero + channels.get(name, _AT_REST.get(name, 0.0)) for name in _CHANNELS])

    wave = saying(
        arm_lead=2.05 + 0.12 * sin, elbow_lead=0.72 + 0.62 * sin, tilt=0.10 - 0.05 * sin, px=1.5 * sin, lean=0.03 * sin
    )

    # Walking to and fro: each foot stands where the pelvis passes over it in the middle of its stance.
    def path(at: Tensor) -> Tensor:
        return (17.0 * (at * (math.pi / 2)).sin()).float()

    def walking_foot(offset: float) -> tuple[Tensor, Tensor]:
        step = (turns + offset).floor()
        swing = (((turns + offset - step).float() - 0.5) * 2).clamp(min=0)
        eased = swing * swing * (3 - 2 * swing)
        here, there = path(step + 0.25 - offset), path(step + 1.25 - offset)
        return torch.lerp(here, there, eased), (swing * math.pi).sin() ** 2

    path_lead, lift_lead = walking_foot(0.0)
    path_other, lift_other = walking_foot(0.5)
    pace = (turns * (math.pi / 2)).cos().float()  # the path's velocity, -1 .. 1
    facing = torch.tanh(2.5 * pace)
    swing_arm = 0.75 * (angle + 0.25 * math.pi).cos()
    walk = saying(
        px=path(turns),
        crouch=0.035 + 0.02 * (2 * angle).cos(),
        look=facing,
        profile=1.0,
        lean=0.07 * facing,
        path_lead=path_lead,
        path_other=path_other,
        lift_lead=8.0 * lift_lead,
        lift_other=8.0 * lift_other,
        foot_lead=3.5,
        foot_other=3.5,
        arm_lead=0.12 - swing_arm,
        arm_other=0.12 - swing_arm,
        elbow_lead=0.45 * facing,
        elbow_other=-0.45 * facing,
    )

    gather = (cycle / 0.38).clamp(0, 1) * math.pi
    flight = ((cycle - 0.36) / 0.44).clamp(0, 1)
    landing = ((cycle - 0.78) / 0.22).clamp(0, 1) * math.pi
    air = 4 * flight * (1 - flight)
    swing_up = (1 - (angle - 0.16 * math.pi).cos()) / 2  # arms follow softly: a parabola's end is too sudden
    jump = saying(
        hop=_HOP * air,
        crouch=0.34 * gather.sin() ** 2 + 0.18 * landing.sin() ** 2,
        arm_lead=0.20 + 1.45 * swing_up,
        arm_other=0.20 + 1.45 * swing_up,
        elbow_lead=0.15 + 0.3 * swing_up,
        elbow_other=0.15 + 0.3 * swing_up,
        lift_lead=4.0 * air,
        lift_other=4.0 * air,
    )

    squat = saying(
        crouch=0.50 * swell,
        foot_lead=12.5,
        foot_other=12.5,
        arm_lead=0.35 + 1.2 * swell,
        arm_other=0.35 + 1.2 * swell,
        elbow_lead=0.0,
        elbow_other=0.0,
    )

    dance = saying(
        px=8.0 * sin,
        lean=-0.20 * sin,
        tilt=0.26 * sin,
        look=0.5 * sin,
        crouch=0.07 + 0.05 * (2 * angle).cos(),
        arm_lead=1.30 + 0.80 * sin,
        arm_other=1.30 - 0.80 * sin,
        elbow_lead=1.05 + 0.25 * cos,
        elbow_other=1.05 - 0.25 * cos,
        lift_other=8.0 * ((1 + sin) / 2) ** 4,
        lift_lead=8.0 * ((1 - sin) / 2) ** 4,
        foot_lead=10.0,
        foot_other=10.0,
    )

    # A windmill: the arms stay in one line, so one of the two turns the other way in "outwards" angles.
    spin = saying(
        arm_lead=angle,
        arm_other=math.pi - angle,
        elbow_lead=0.0,
        elbow_other=0.0,
        crouch=0.03 + 0.02 * sin,
        tilt=0.05 * cos,
    )

    down = swell**0.85
    bow = saying(
        lean=1.02 * down,
        tilt=0.15 * down,
        look=0.25 + 0.6 * down,
        px=-6.0 * down,
        foot_lead=8.0,
        foot_other=8.0,
        arm_lead=0.30 + 0.25 * down,
        elbow_lead=0.12 - 1.95 * down,
        arm_other=0.30 + 0.75 * down,
        elbow_other=0.12 + 0.3 * down,
    )

    cheer = saying(
        arm_lead=2.42 + 0.38 * sin,
        arm_other=2.42 + 0.38 * sin,
        elbow_lead=0.25 * cos,
        elbow_other=0.25 * cos,
        crouch=0.10 - 0.08 * sin,
        tilt=0.08 * cos,
        foot_lead=10.0,
        foot_other=10.0,
    )

    out = swell**1.4
    kick = saying(
        foot_lead=8.0 + 24.0 * out,
        lift_lead=24.0 * out,
        foot_other=5.0,
        px=-4.0 * out,
        lean=-0.26 * out,
        tilt=0.10 * out,
        arm_lead=0.55 + 0.55 * out,
        arm_other=0.55 + 0.75 * out,
        elbow_lead=0.3,
        elbow_other=0.3,
        crouch=0.03,
        look=0.3,
    )

    amplitude, factor, start = (scenes.motion[..., i][..., None] for i in range(3))
    waves = 2 * math.pi * (turns[:, None, None] * factor.double() + start.double())
    moved = scenes.pose_centres[..., None] + (amplitude * (waves % (2 * math.pi)).float().sin()).sum(2)
    improvise = saying(**{name: moved[:, i] for i, name in enumerate(_CHANNELS[:_MOTION_CHANNELS])})
    improvise[_CH["crouch"]] = 0.10 + 0.9 * improvise[_CH["crouch"]].clamp(min=-0.08)

    said = torch.stack([wave, walk, jump, squat, dance, spin, bow, cheer, kick, improvise])  # [A, C, B, T]
    picked = said[scenes.action, :, torch.arange(len(scenes), device=scenes.device)].transpose(0, 1)  # [C, B, T]
    return {name: picked[i] for i, name in enumerate(_CHANNELS)}


def _hang(side: int, angle: Tensor, lean: Tensor) -> Tensor:
    """Direction [B, T, 2] of a limb at `angle` from hanging, outwards, on a torso that leans."""
    x, y = side * angle.sin(), angle.cos()
    return torch.stack([x * lean.cos() - y * lean.sin(), x * lean.sin() + y * lean.cos()], -1)


def _bend(hip: Tensor, foot: Tensor, bone: Tensor, knee_side: Tensor) -> tuple[Tensor, Tensor]:
    """Two-bone inverse kinematics: (knee, ankle) [B, T, 2]; the ankle is `foot`, pulled in if the leg is too short.

    knee_side: x-direction of the knee, -1 .. 1; between, the leg is seen as if turned, its knee less far out.
    """
    offset = foot - hip
    distance = offset.norm(dim=-1, keepdim=True).clamp(min=1e-3)
    direction = offset / distance
    distance = torch.minimum(distance, 1.999 * bone[..., None])
    out = (bone[..., None] ** 2 - (distance / 2) ** 2).clamp(min=0).sqrt()
    normal = torch.stack([direction[..., 1], -direction[..., 0]], -1)  # points to +x for a leg that points down
    return hip + direction * distance / 2 + normal * out * knee_side[..., None], hip + direction * distance


PROP_RADIUS = 10.5


def _bounce(scenes: Scenes, seconds: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A prop's centre, squash (0 .. 1 at the ground) and turn (radians) while it bounces beside the puppet."""
    turns = 0.62 * seconds + scenes.phase.double()[:, None] * 3.0
    cycle = (turns - turns.floor()).float()
    height = 4 * cycle * (1 - cycle)
    squash = (1 - height / 0.35).clamp(min=0) ** 2
    y = FLOOR - PROP_RADIUS * 0.92 - 34.0 * height + 2.0 * squash
    # A star turns slowly, a cube rocks, a ball need not turn.
    rock = (2 * math.pi * ((turns / 2) % 1.0)).float().sin()
    spin = (2 * math.pi * ((turns / 5) % 1.0)).float()
    turn = torch.where((scenes.prop == 3)[:, None], spin, 0.30 * rock)
    return torch.stack([x.expand_as(y), y], -1), squash, turn


def _camera(scenes: Scenes, seconds: Tensor) -> tuple[Tensor, Tensor]:
    pan_x, pan_y, zoom, phase = (scenes.camera[:, i, None] for i in range(4))
    angle = (2 * math.pi * ((0.11 * seconds + phase.double()) % 1.0)).float()
    pan = torch.stack([pan_x * angle.sin(), pan_y * angle.cos()], -1)
    return 1 + zoom * (0.5 + 0.5 * angle.sin()) - 0.02 * (zoom > 0).float(), pan


def _view(points: Tensor, zoom: Tensor, pan: Tensor) -> Tensor:
    """World px -> canvas px. points [B, T, ..., 2]; zoom [B, T] about the canvas centre; pan [B, T, 2]."""
    extra = (1,) * (points.dim() - 3)
    zoom = zoom.view(*zoom.shape, *extra, 1)
    pan = pan.view(*pan.shape[:2], *extra, 2)
    return (points - CANVAS / 2) * zoom + CANVAS / 2 + pan


def _lookup(table, index: Tensor) -> Tensor:
    return torch.tensor(table, device=index.device)[index]
