"""Train the judges on renders, and on what a VAE makes of them: scripts/train_judges.py is the door.

Bounded by wall-clock seconds, saved every minute, resumed when run again with the same folder and more seconds.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from world.judges import (
    HEATMAP,
    LOOK_CLASSES,
    TRACK_STRIDE,
    VIDEO_CLASSES,
    WINDOW,
    Judges,
    expected_joints,
    save_judges,
)
from world.puppet import CANVAS, NUM_BODY_JOINTS, Scenes, joints, sample_scenes
from world.render import render

logger = logging.getLogger(__name__)

CLIP_FRAMES = 41  # at stride 2: the 81 px frames of a 21-latent video
STATE_NAME = "judges_training.pt"


def train(
    out: Path,
    *,
    seconds: float,
    device: torch.device | str,
    clips: int = 32,
    stills: int = 256,
    learning_rate: float = 2e-3,
    round_trip: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
) -> Judges:
    """Train for `seconds` in all (the time of earlier, resumed runs counts) and write out/judges.safetensors.

    round_trip: video [B, 81, 3, 128, 128] in [-1, 1] -> the same through a VAE; a quarter of the clips then take
    that way.
    """
    device = torch.device(device)
    judges = Judges().to(device)
    optimizer = torch.optim.AdamW(judges.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    state_path = out / STATE_NAME
    step, spent = 0, 0.0
    if state_path.is_file():
        state = torch.load(state_path, map_location=device, weights_only=True)
        judges.load_state_dict(state["judges"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
        logger.info("resumed at step %d after %.0f s", step, spent)

    def save() -> None:
        out.mkdir(parents=True, exist_ok=True)
        state = {"judges": judges.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": spent}
        torch.save(state, state_path.with_suffix(".part"))
        state_path.with_suffix(".part").replace(state_path)
        save_judges(judges, out)

    judges.train()
    begun, saved, reported = time.monotonic() - spent, time.monotonic(), 0.0
    while spent < seconds:
        warmup, decay = min(1.0, (step + 1) / 50), 0.5 * (1 + math.cos(math.pi * min(1.0, spent / seconds)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warmup * (0.01 + 0.99 * decay)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        losses = _losses(judges, clips, stills, device, round_trip, generator)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(judges.parameters(), 5.0)
        optimizer.step()
        step += 1
        if device.type == "cuda" and step % 8 == 0:
            torch.cuda.synchronize()
        spent = time.monotonic() - begun
        if spent - reported >= 10:
            reported = spent
            values = "  ".join(f"{name} {value.item():.3f}" for name, value in losses.items())
            logger.info("step %d  %.0f s  %s", step, spent, values)
        if time.monotonic() - saved >= 60:
            saved = time.monotonic()
            save()
    save()
    return judges.eval()


def _losses(judges, clips, stills, device, round_trip, generator) -> dict[str, Tensor]:
    """One batch: every network gets its loss; they share renders but no weights."""
    seed = int(torch.randint(1 << 40, (1,), generator=generator))
    start = int(torch.randint(2000, (1,), generator=generator))
    frames = start + TRACK_STRIDE * torch.arange(CLIP_FRAMES, device=device)
    scenes = sample_scenes(clips, seed, device=device)
    with torch.no_grad():
        video = render(scenes, CLIP_FRAMES, start, frame_stride=TRACK_STRIDE)
        if round_trip is not None:
            few = scenes.select(slice(0, max(1, clips // 4)))
            whole = render(few, 1 + TRACK_STRIDE * (CLIP_FRAMES - 1), start)
            video[: len(few)] = round_trip(whole)[:, ::TRACK_STRIDE]
        truth = joints(scenes, frames)[..., :2]
        video, quality = degrade(video)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
    losses = {}

    # Single frames: each of another scene, and some of the clips', which may have been through the VAE.
    many = sample_scenes(stills, seed + 1, device=device)
    with torch.no_grad():
        alone, _ = degrade(render(many, 1, start))
        picked = torch.randint(CLIP_FRAMES, (clips,), generator=generator).to(device)
        rows = torch.arange(clips, device=device)
        seen = torch.cat([alone[:, 0], video[rows, picked]])
        wanted = torch.cat([joints(many, frames[:1])[:, 0, :, :2], truth[rows, picked]])
    with autocast:
        heatmaps = judges.keypoints(seen)
        look = judges.look(seen)
    losses["heat"] = heatmap_loss(heatmaps, wanted)
    losses["keypoints"] = F.smooth_l1_loss(expected_joints(heatmaps), wanted, beta=0.5) * 0.2
    targets, others = _targets(scenes), _targets(many)
    both = {name: torch.cat([others[name], targets[name]]) for name in LOOK_CLASSES}
    losses["look"] = _classification(look, both, LOOK_CLASSES)

    first = int(torch.randint(CLIP_FRAMES - WINDOW + 1, (1,), generator=generator))
    with autocast:
        window = judges.video(video[:, first : first + WINDOW])
    losses["video"] = 0.3 * _classification(window, targets, VIDEO_CLASSES)
    middle = (truth[:, first + WINDOW // 2] / CANVAS * 4 - 2).flatten(1)
    losses["geometry"] = F.smooth_l1_loss(window["joints"], middle) + F.mse_loss(window["quality"], quality)

    # The action network lives on tracks: cheap ones with made-up errors, and the keypoint network's own.
    many = sample_scenes(8 * clips, seed + 2, device=device)
    length = int(torch.randint(WINDOW, CLIP_FRAMES + 1, (1,), generator=generator))
    tracks = _unsteady(joints(many, frames[:length])[..., :2])
    # Half a clip may hold no bow: short tracks are taught less.
    weight = length / CLIP_FRAMES
    losses["action"] = weight * F.cross_entropy(judges.action(tracks), many.action, label_smoothing=0.02)
    with torch.no_grad(), autocast:
        few = max(1, clips // 4)
        read = expected_joints(judges.keypoints(video[:few].flatten(0, 1))).unflatten(0, (few, CLIP_FRAMES))
    losses["action_read"] = 0.5 * F.cross_entropy(judges.action(read), scenes.action[:few], label_smoothing=0.02)
    return losses


def heatmap_loss(heatmaps: Tensor, joints: Tensor) -> Tensor:
    """Cross-entropy against the four cells around each joint, weighted so that their expectation is the joint."""
    cell = (joints / (CANVAS / HEATMAP) - 0.5).clamp(0, HEATMAP - 1)
    centres = torch.arange(HEATMAP, device=joints.device, dtype=joints.dtype)
    near = (1 - (cell[..., None] - centres).abs()).clamp(min=0)  # [N, 18, 2, 32]
    target = near[:, :, 1, :, None] * near[:, :, 0, None, :]
    return -(target.flatten(2) * heatmaps.flatten(2).log_softmax(-1)).sum(-1).mean()


def degrade(video: Tensor) -> tuple[Tensor, Tensor]:
    """Worsen each clip of a video [B, T, 3, S, S] by its own amount of blur, noise, shake of colour, or not at all.

    Returns the video and what was done, [B, 3]: blur, noise, flicker, each about 0 .. 1.
    """
    b, t = video.shape[:2]
    amounts = torch.rand(b, 3, device=video.device) ** 2 * (torch.rand(b, 3, device=video.device) < 0.6)
    blur, noise, flicker = (amounts[:, i].view(b, 1, 1, 1, 1) for i in range(3))
    flat = video.flatten(0, 1)
    half = F.interpolate(F.avg_pool2d(flat, 2), scale_factor=2.0, mode="bilinear").view_as(video)
    soft = F.avg_pool2d(flat, 3, stride=1, padding=1, count_include_pad=False).view_as(video)
    which = (torch.rand(b, 1, 1, 1, 1, device=video.device) < 0.5).float()
    video = video + blur * (which * half + (1 - which) * soft - video)
    coarse = torch.randn(b * t, 3, 32, 32, device=video.device)
    grain = F.interpolate(coarse, scale_factor=4.0, mode="bilinear").view_as(video)
    video = video + noise * 0.07 * (torch.randn_like(video) + grain)
    shake = torch.randn(b, t, 3, 1, 1, device=video.device)
    drift = torch.randn(b, 1, 3, 1, 1, device=video.device)
    video = video + 0.05 * flicker * shake + 0.015 * drift
    return video.clamp(-1, 1), amounts


def _unsteady(tracks: Tensor) -> Tensor:
    """Joint tracks [N, T, 18, 2] with the errors of a keypoint network: jitter, offsets, now and then a lost joint."""
    n, t = tracks.shape[:2]
    spread = torch.rand(n, 1, 1, 1, device=tracks.device) * 1.5
    tracks = tracks + spread * torch.randn_like(tracks) + spread * torch.randn_like(tracks[:, :1])
    lost = torch.rand(n, t, tracks.shape[2], 1, device=tracks.device) < 0.02 * torch.rand(
        n, 1, 1, 1, device=tracks.device
    )
    return torch.where(lost, tracks[:, :, 1:2] + 12 * torch.randn_like(tracks), tracks)


def _targets(scenes: Scenes) -> dict[str, Tensor]:
    colour = torch.where(scenes.prop == 0, -100, scenes.prop_colour)  # -100: no prop, no colour, no loss
    return {**{name: getattr(scenes, name) for name in VIDEO_CLASSES}, "prop_colour": colour}


def _classification(logits: dict[str, Tensor], targets: dict[str, Tensor], classes) -> Tensor:
    total = 0.0
    for name in classes:
        known = (targets[name] >= 0).float()
        loss = F.cross_entropy(logits[name], targets[name], reduction="none", ignore_index=-100)
        total = total + (loss * known).sum() / known.sum().clamp(min=1)
    return total


@torch.inference_mode()
def validate(judges: Judges, *, num_clips: int, device: torch.device | str, seed: int = 7_000_000) -> dict[str, float]:
    """Accuracies and pixel error on clean held-out renders of 81 frames."""
    hits: dict[str, list[Tensor]] = {}
    for first in range(0, num_clips, 8):
        scenes = sample_scenes(min(8, num_clips - first), seed, "heldout", start=first, device=device)
        video = render(scenes, 81) * 0.5 + 0.5
        truth = joints(scenes, torch.arange(81, device=device))[..., :2]
        read = judges.read_joints(video)
        error = (read - truth).norm(dim=-1)[:, :, :NUM_BODY_JOINTS]
        look = judges.read_look(video)
        batch = {
            name: (look[name].argmax(-1) == getattr(scenes, name)).float() for name in ("body", "background", "prop")
        }
        batch["prop_colour"] = (look["prop_colour"].argmax(-1) == scenes.prop_colour)[scenes.prop > 0].float()
        batch["action"] = (judges.read_action(read).argmax(-1) == scenes.action).float()
        batch["joint_error_px"] = error.mean((1, 2))
        batch["pck05"] = (error < 0.05 * CANVAS).float().mean((1, 2))
        for name, values in batch.items():
            hits.setdefault(name, []).append(values)
    return {name: torch.cat(values).mean().item() for name, values in hits.items()}
