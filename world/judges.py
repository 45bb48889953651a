"""Small networks that read a puppet video back: joints, action, colours and prop, and a feature vector of the video.

Trained by `world.train_judges` on renders made worse on purpose (blur, noise, re-sampling), so that the slight
softness of a VAE does not fool them. Videos are [N, T, 3, s, s] in [0, 1]; joints are px of the 128 x 128 canvas.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from world.puppet import ACTIONS, BACKGROUNDS, BODY_COLOURS, CANVAS, JOINT_NAMES, NUM_SKINS, PROPS, SPEEDS

DEFAULT_FOLDER = Path(__file__).parent / "weights"
WEIGHTS_NAME = "judges.safetensors"

NUM_JOINTS = len(JOINT_NAMES)
HEATMAP = 32
TRACK_STRIDE = 2  # joint tracks and video windows are read at 8 frames/s: no motion is faster than 1.2 Hz
WINDOW = 20  # frames of a feature window, TRACK_STRIDE apart: 2.5 s
WINDOW_STEP = 20  # px frames between the starts of windows
FEATURES = 128
LOOK_CLASSES = {
    "body": len(BODY_COLOURS),
    "background": len(BACKGROUNDS),
    "prop": len(PROPS),
    "prop_colour": len(BODY_COLOURS),
}
VIDEO_CLASSES = {**LOOK_CLASSES, "action": len(ACTIONS), "speed": len(SPEEDS), "skin": NUM_SKINS}


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, [N, C, H, W]."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class KeypointNet(nn.Module):
    """Joints of single frames: a small hourglass to 32 x 32 heatmaps, read by their expectation."""

    def __init__(self, width: int = 32, depth: int = 64):
        super().__init__()
        self.stem = nn.Conv2d(48, width, 3, padding=1)
        self.fine = ResidualBlock(width)
        self.down1 = nn.Conv2d(width, depth, 3, stride=2, padding=1)
        self.middle = ResidualBlock(depth)
        self.down2 = nn.Conv2d(depth, depth, 3, stride=2, padding=1)
        self.coarse = nn.Sequential(ResidualBlock(depth), ResidualBlock(depth))
        self.up1 = ResidualBlock(depth)
        self.up2 = nn.Conv2d(depth, width, 1)
        self.out = nn.Sequential(
            ResidualBlock(width), nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, NUM_JOINTS, 3, padding=1)
        )

    def forward(self, frames: Tensor) -> Tensor:
        """frames [N, 3, 128, 128] in [-1, 1] -> heatmap logits [N, 18, 32, 32] (float32)."""
        fine = self.fine(self.stem(F.pixel_unshuffle(frames, CANVAS // HEATMAP)))
        middle = self.middle(self.down1(fine))
        coarse = self.coarse(self.down2(middle))
        middle = self.up1(middle + F.interpolate(coarse, scale_factor=2.0))
        fine = fine + F.interpolate(self.up2(middle), scale_factor=2.0, mode="bilinear")
        return self.out(fine).float()


def expected_joints(heatmaps: Tensor) -> Tensor:
    """Expectation of each heatmap's softmax, [N, 18, 2] in canvas px."""
    probability = heatmaps.flatten(2).softmax(-1).unflatten(2, heatmaps.shape[2:])
    cell = CANVAS / HEATMAP
    centres = (torch.arange(HEATMAP, device=heatmaps.device, dtype=probability.dtype) + 0.5) * cell
    return torch.stack([(probability.sum(2) * centres).sum(-1), (probability.sum(3) * centres).sum(-1)], -1)


class ActionNet(nn.Module):
    """Action from joint tracks [N, T, 18, 2] at 8 frames/s (T >= 8)."""

    def __init__(self, width: int = 96):
        super().__init__()
        self.stem = nn.Conv1d(4 * NUM_JOINTS, width, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation) for dilation in (1, 2, 4)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in self.layers)
        self.head = nn.Linear(2 * width, len(ACTIONS))

    def forward(self, tracks: Tensor) -> Tensor:
        # Relative to where the pelvis is on average, in units of the torso: neither place nor size of the puppet
        # matter.
        pelvis = (tracks[:, :, 8] + tracks[:, :, 11]) / 2
        torso = (tracks[:, :, 1] - pelvis).norm(dim=-1).mean(1).clamp(min=1.0)
        place = (tracks - pelvis.mean(1)[:, None, None]) / torso[:, None, None, None]
        speed = torch.diff(place, dim=1, prepend=place[:, :1]) * 4.0
        x = self.stem(torch.cat([place, speed], -1).flatten(2).transpose(1, 2))
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(F.silu(norm(x)))
        return self.head(torch.cat([x.mean(-1), x.amax(-1)], -1)).float()


class LookNet(nn.Module):
    """Colours and prop of single frames; logits are averaged over a video's frames by the caller."""

    def __init__(self, width: int = 40, depth: int = 72):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(48, width, 3, padding=1),
            ResidualBlock(width),
            nn.Conv2d(width, depth, 3, stride=2, padding=1),
            ResidualBlock(depth),
            nn.Conv2d(depth, depth, 3, stride=2, padding=1),
            nn.SiLU(),  # no norm before it: a norm would take out the absolute colour
        )
        self.heads = nn.ModuleDict({name: nn.Linear(2 * depth, classes) for name, classes in LOOK_CLASSES.items()})

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        """frames [N, 3, 128, 128] in [-1, 1] -> logits per attribute [N, classes]."""
        x = self.layers(F.pixel_unshuffle(frames, 4))
        pooled = torch.cat([x.mean((2, 3)), x.amax((2, 3))], -1)
        return {name: head(pooled).float() for name, head in self.heads.items()}


class VideoNet(nn.Module):
    """A 128-number description of a 2.5-s window, [N, 20, 3, 128, 128] in [-1, 1], for the Frechet world distance.

    (2+1)-dimensional convolutions. It learns all attributes, the joints of the middle frame, and how far the window was
    blurred, speckled and shaken, so that the features see content, geometry, motion and quality.
    """

    def __init__(self, width: int = 48, depth: int = 72):
        super().__init__()
        widths = (width, width, depth, depth)
        strides = (1, 2, 2, 2)
        self.stem = nn.Conv2d(48, width, 3, padding=1)
        self.space, self.time, self.norms = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        previous = width
        for channels, stride in zip(widths, strides, strict=True):
            self.space.append(nn.Conv2d(previous, channels, 3, stride=stride, padding=1))
            self.time.append(nn.Conv1d(channels, channels, 3, padding=1))
            self.norms.append(nn.GroupNorm(8, channels))
            previous = channels
        self.project = nn.Linear(3 * previous, FEATURES)
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, classes) for name, classes in VIDEO_CLASSES.items()})
        self.joints = nn.Linear(FEATURES, 2 * NUM_JOINTS)
        self.quality = nn.Linear(FEATURES, 3)

    def features(self, window: Tensor) -> Tensor:
        n, t = window.shape[:2]
        x = self.stem(F.pixel_unshuffle(window.flatten(0, 1), 4))
        for space, time, norm in zip(self.space, self.time, self.norms, strict=True):
            x = space(F.silu(x))
            c, h, w = x.shape[1:]
            rows = norm(x).view(n, t, c, h * w).permute(0, 3, 2, 1).flatten(0, 1)  # [n h w, c, t]
            mixed = time(F.silu(rows)).view(n, h * w, c, t).permute(0, 3, 2, 1)
            x = x + mixed.reshape(n * t, c, h, w)
        x = F.silu(x).view(n, t, x.shape[1], -1)
        change = (x[:, 1:] - x[:, :-1]).abs().mean((1, 3))
        return self.project(torch.cat([x.mean((1, 3)), x.amax(3).mean(1), change], -1))

    def forward(self, window: Tensor) -> dict[str, Tensor]:
        features = self.features(window)
        logits = {name: head(F.silu(features)).float() for name, head in self.heads.items()}
        return {
            **logits,
            "joints": self.joints(F.silu(features)).float(),
            "quality": self.quality(F.silu(features)).float(),
        }


class Judges(nn.Module):
    """The four networks and the ways to ask them; all answers are float32 and need no gradient."""

    def __init__(self):
        super().__init__()
        self.keypoints = KeypointNet()
        self.action = ActionNet()
        self.look = LookNet()
        self.video = VideoNet()

    @torch.inference_mode()
    def read_joints(self, videos: Tensor, *, chunk: int = 128) -> Tensor:
        """Joints [N, T, 18, 2] of every frame, in px of the 128 canvas."""
        frames = _prepare(videos).flatten(0, 1)
        joints = torch.cat([expected_joints(self.keypoints(part)) for part in frames.split(chunk)])
        return joints.view(*videos.shape[:2], NUM_JOINTS, 2)

    @torch.inference_mode()
    def read_action(self, joints: Tensor) -> Tensor:
        """Action logits [N, 10] from joints [N, T, 18, 2] at 16 frames/s."""
        return self.action(joints[:, ::TRACK_STRIDE])

    @torch.inference_mode()
    def read_look(self, videos: Tensor, *, every: int = 8, chunk: int = 128) -> dict[str, Tensor]:
        """Log-probabilities of body, background, prop and prop colour, averaged over every `every`-th frame."""
        seen = _prepare(videos[:, ::every])
        parts = [self.look(part) for part in seen.flatten(0, 1).split(chunk)]
        return {
            name: torch.cat([part[name] for part in parts]).log_softmax(-1).view(*seen.shape[:2], -1).mean(1)
            for name in LOOK_CLASSES
        }

    @torch.inference_mode()
    def read_features(self, videos: Tensor, *, chunk: int = 8) -> Tensor:
        """Features [N, windows, 128] of all 2.5-s windows that start every 1.25 s."""
        span = (WINDOW - 1) * TRACK_STRIDE + 1
        starts = range(0, videos.shape[1] - span + 1, WINDOW_STEP)
        if not starts:
            raise ValueError(f"{videos.shape[1]} frames are too few for a feature window; give at least {span}")
        rows = []
        for part in videos.split(chunk):
            windows = [_prepare(part[:, s : s + span : TRACK_STRIDE]) for s in starts]
            rows.append(torch.stack([self.video.features(window) for window in windows], dim=1))
        return torch.cat(rows).float()


def _prepare(videos: Tensor) -> Tensor:
    """[N, T, 3, s, s] in [0, 1] -> [N, T, 3, 128, 128] in [-1, 1], float32."""
    videos = videos.float() * 2 - 1
    if videos.shape[-2:] != (CANVAS, CANVAS):
        flat = F.interpolate(videos.flatten(0, 1), size=(CANVAS, CANVAS), mode="bilinear", antialias=True)
        videos = flat.unflatten(0, videos.shape[:2])
    return videos


def save_judges(judges: Judges, folder: str | Path) -> Path:
    """Write the weights in half precision; returns the file."""
    from safetensors.torch import save_file

    path = Path(folder) / WEIGHTS_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.detach().cpu().half().contiguous() for name, value in judges.state_dict().items()}, str(path)
    )
    return path


def load_judges(folder: str | Path = DEFAULT_FOLDER, device: torch.device | str = "cpu") -> Judges:
    """The trained judges, float32, in eval mode."""
    from safetensors.torch import load_file

    path = Path(folder) / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"no judges at {path}; train them with `python scripts/train_judges.py --out {folder}`")
    judges = Judges()
    judges.load_state_dict({name: value.float() for name, value in load_file(str(path)).items()})
    return judges.to(device).eval().requires_grad_(False)
