"""What a set of puppet videos is worth: accuracies, joints, Frechet world distance, drift; tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from world.judges import Judges
from world.metrics import flicker, frechet_distance, pck, psnr, ssim
from world.puppet import CANVAS, Scenes, joints


@torch.inference_mode()
def measure(
    videos: Tensor,
    scenes: Scenes,
    judges: Judges,
    reference_features: Tensor | None = None,
    *,
    references: Tensor | None = None,
    masks: Tensor | None = None,
    start_frame: int = 0,
    same_motion: bool = False,
) -> dict[str, float]:
    """Figures for videos [N, T, 3, s, s], in [0, 1] or uint8, that are meant to show `scenes`, on the judges' device
    in small batches.

    colour_accuracy: the body's; prop_accuracy: the kind, "none" included; prop_presence: some prop or none;
    prop_colour_accuracy: over scenes with a prop; action_accuracy; flicker in 1/255; fwd: Frechet distance of window
    features to `reference_features` [n, windows, 128] (read_features of ground truth; other scenes than these, or
    ground truth scores zero). same_motion: the videos should show exactly the scene's motion from start_frame on:
    pck05 and joint_error_px. references (and masks): true pixels, for psnr, puppet_psnr and ssim.
    """
    device = next(judges.parameters()).device
    hits: dict[str, list[Tensor]] = {}
    features = []

    def add(name: str, values: Tensor) -> None:
        hits.setdefault(name, []).append(values.float().cpu())

    for first in range(0, len(videos), 8):
        part = slice(first, first + 8)
        seen, truth = _unit(videos[part].to(device)), scenes.select(part).to(device)
        look = {name: logits.argmax(-1) for name, logits in judges.read_look(seen).items()}
        read = judges.read_joints(seen)
        add("colour_accuracy", look["body"] == truth.body)
        add("background_accuracy", look["background"] == truth.background)
        add("prop_accuracy", look["prop"] == truth.prop)
        add("prop_presence", (look["prop"] > 0) == (truth.prop > 0))
        add("prop_colour_accuracy", (look["prop_colour"] == truth.prop_colour)[truth.prop > 0])
        add("action_accuracy", judges.read_action(read).argmax(-1) == truth.action)
        add("flicker", flicker(seen))
        if same_motion:
            frames = torch.arange(start_frame, start_frame + seen.shape[1], device=device)
            true_joints = joints(truth, frames)
            add("pck05", pck(read, true_joints, CANVAS))
            add("joint_error_px", (read - true_joints[..., :2])[:, :, :14].norm(dim=-1).mean((1, 2)))
        if references is not None:
            real = _unit(references[part].to(device))
            add("psnr", psnr(seen, real))
            add("ssim", ssim(seen, real))
            if masks is not None:
                add("puppet_psnr", psnr(seen, real, masks[part].to(device)))
        if reference_features is not None:
            features.append(judges.read_features(seen).cpu())
    figures = {name: torch.cat([value.flatten() for value in values]).mean().item() for name, values in hits.items()}
    if reference_features is not None:
        figures["fwd"] = frechet_distance(torch.cat(features).flatten(0, 1), reference_features.flatten(0, 1))
    return figures


def to_bytes(videos: Tensor) -> Tensor:
    """[0, 1] -> uint8, what a viewer gets and what a thousand videos fit in."""
    return (videos.clamp(0, 1) * 255).round().to(torch.uint8)


def _unit(videos: Tensor) -> Tensor:
    return videos.float() / 255 if videos.dtype == torch.uint8 else videos.float()


@torch.inference_mode()
def features_of(videos: Tensor, judges: Judges) -> Tensor:
    """Window features [N, windows, 128] on the CPU, for `measure(reference_features=...)`."""
    device = next(judges.parameters()).device
    return torch.cat([judges.read_features(_unit(part.to(device))).cpu() for part in videos.split(8)])


def quarters(
    videos: Tensor, scenes: Scenes, judges: Judges, reference_features: Tensor | None = None, **options
) -> list[dict]:
    """`measure` of each quarter of long videos: drift is the difference between the last and the first.

    All four are judged against the same scenes and features: a stream should stay what it was asked to be.
    references and masks are cut along; quarters have equal length, so up to three last frames are left out.
    """
    length = videos.shape[1] // 4
    cut = {name: options.pop(name, None) for name in ("references", "masks")}
    rows = []
    for i in range(4):
        span = slice(i * length, (i + 1) * length)
        along = {name: value[:, span] for name, value in cut.items() if value is not None}
        row = measure(videos[:, span], scenes, judges, reference_features, start_frame=span.start, **along, **options)
        rows.append(row)
    return rows


def table(columns: dict[str, dict[str, float]]) -> str:
    """Markdown: one line per figure, one column per set of videos; what a column lacks is left blank."""
    names = list(dict.fromkeys(name for figures in columns.values() for name in figures))
    lines = ["| |" + "|".join(f" {title} " for title in columns) + "|", "|---|" + "--:|" * len(columns)]
    for name in names:
        cells = (f" {figures[name]:.3f} " if name in figures else " " for figures in columns.values())
        lines.append(f"| {name.replace('_', ' ')} |" + "|".join(cells) + "|")
    return "\n".join(lines) + "\n"


def contact_sheet(
    videos: Tensor | Sequence[Tensor],
    captions: Sequence[str],
    path: str | Path,
    *,
    frames: int = 8,
    rows_per_column: int | None = None,
    scale: int = 1,
) -> Path:
    """A picture of `frames` evenly spaced frames per video [T, 3, s, s] in [0, 1], each row under its caption."""
    from PIL import Image, ImageDraw

    strips = []
    for video, caption in zip(videos, captions, strict=True):
        chosen = torch.linspace(0, len(video) - 1, frames).round().long()
        pixels = to_bytes(_unit(video[chosen])).permute(2, 0, 3, 1).flatten(1, 2).cpu()
        strip = Image.fromarray(pixels.numpy())
        if scale > 1:
            strip = strip.resize((strip.width * scale, strip.height * scale), Image.Resampling.LANCZOS)
        row = Image.new("RGB", (strip.width, strip.height + 16), "white")
        row.paste(strip, (0, 16))
        ImageDraw.Draw(row).text((4, 2), caption.encode("latin-1", "replace").decode("latin-1"), fill="black")
        strips.append(row)
    per_column = rows_per_column or len(strips)
    columns = [strips[i : i + per_column] for i in range(0, len(strips), per_column)]
    width, height = strips[0].size
    sheet = Image.new(
        "RGB", (width * len(columns) + 8 * (len(columns) - 1), height * min(per_column, len(strips))), "white"
    )
    for c, column in enumerate(columns):
        for r, row in enumerate(column):
            sheet.paste(row, (c * (width + 8), r * height))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
    return path
