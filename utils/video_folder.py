"""A folder of videos with captions, and its latents: decoded, cut into clips and encoded once, then only read.

Captions stand beside the videos (`boat.mp4` + `boat.txt`), or for all of them in `captions.jsonl`, lines of
{"video": "boat.mp4", "prompt": "..."}, or in `captions.csv` with the columns video and prompt. Paths are relative to
the folder; sub-folders are searched. A caption's line breaks become spaces.
"""

import csv
import functools
import io
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.distributed import Ranks
from utils.prompts import read_text
from utils.shards import Made, ShardWriter
from utils.video import VideoError, video_clips

logger = logging.getLogger(__name__)

KIND = "latents"
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
VIDEOS_PER_SHARD = 16


@dataclass(frozen=True)
class CaptionedVideo:
    """name: its path below the folder."""

    path: Path
    name: str
    prompt: str


@dataclass(frozen=True)
class ClipShape:
    """Clips cut from a video, one after the other: num_frames latents each, 1 + 4 (n - 1) pixel frames at fps."""

    height: int
    width: int
    fps: int
    num_frames: int

    @property
    def num_pixel_frames(self) -> int:
        return 1 + 4 * (self.num_frames - 1)


def scan_videos(folder: str | Path) -> tuple[list[CaptionedVideo], list[str]]:
    """Videos that have captions, by name; and one sentence for each that has none, or that is listed but not there.

    Raises FileNotFoundError for a folder that is not there, ValueError for one without videos or a list that cannot be
    read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; data.path names a folder of videos")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in VIDEO_SUFFIXES and file.is_file())
    if not files:
        raise ValueError(f"{folder} holds no videos ({', '.join(VIDEO_SUFFIXES)})")
    names = [file.relative_to(folder).as_posix() for file in files]
    captions, source = _captions(folder, names)
    there = set(names)
    videos, problems = [], [f"{source} lists {name}, which is not there" for name in captions if name not in there]
    for file, name in zip(files, names, strict=True):
        prompt = " ".join(captions.get(name, "").split())
        if prompt:
            videos.append(CaptionedVideo(file, name, prompt))
        else:
            problems.append(f"{file} has no caption in {source or file.with_suffix('.txt').name}")
    return videos, problems


def _captions(folder: Path, names: list[str]) -> tuple[dict[str, str], Path | None]:
    """Captions by name, and the list that they come from, if there is one."""
    table, lines = folder / "captions.csv", folder / "captions.jsonl"
    if table.is_file() and lines.is_file():
        raise ValueError(f"{folder} holds captions.csv and captions.jsonl; keep one")
    if lines.is_file():
        return dict(_from_jsonl(lines)), lines
    if table.is_file():
        reader = csv.DictReader(io.StringIO(read_text(table), newline=""))
        if not {"video", "prompt"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{table}: expected the columns video and prompt, found {reader.fieldnames}")
        return {row["video"]: row["prompt"] or "" for row in reader}, table
    sidecars = {name: (folder / name).with_suffix(".txt") for name in names}
    return {name: read_text(path) for name, path in sidecars.items() if path.is_file()}, None


def _from_jsonl(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                record = json.loads(line)
                yield str(record["video"]), str(record["prompt"])
            except (json.JSONDecodeError, KeyError, TypeError):
                raise ValueError(f'{path}, line {number}: expected {{"video": "file", "prompt": "words"}}') from None


def encode_videos(
    folder: str | Path,
    output: str | Path,
    encode: Callable[[Tensor], Tensor],
    shape: ClipShape,
    *,
    vae: str,
    ranks: Ranks,
    skip: bool = True,
) -> dict[str, str]:
    """Bring the latents in `output` up to date with the videos in `folder`, each rank its share; return the captions.

    A file whose size has changed is encoded again. Captions are as they stand now, by name (the key of LatentFolder).
    encode: pixels [1, F_px, 3, H, W] in [-1, 1] -> latents [1, F, C, h, w]; vae: its fingerprint. A video without
    caption, one that cannot be read and one shorter than a clip is left out with a sentence (skip), or stops the run.
    """
    videos, problems = scan_videos(folder)
    by_name = {video.name: video for video in videos}
    num_left_out = 0

    def complain(problem: str) -> None:
        nonlocal num_left_out
        if not skip:
            raise ValueError(f"{problem}; mend or remove it, or leave such videos out with data.skip_broken: true")
        num_left_out += 1
        logger.warning("left out: %s", problem)

    for problem in problems if ranks.is_main or not skip else []:
        complain(problem)

    sizes = {"fps": shape.fps, "num_frames": shape.num_pixel_frames, "height": shape.height, "width": shape.width}
    cut = functools.partial(video_clips, **sizes)

    def make(names: list[str]) -> Iterator[Made | None]:
        for name in names:
            video, latents = by_name[name], {}
            size = video.path.stat().st_size
            try:
                for pixels in cut(video.path, device=ranks.device):
                    clip = encode(pixels.mul(2).sub(1)[None])[0]
                    latents[f"clip{len(latents)}"] = clip.to("cpu", torch.bfloat16)
            except VideoError as error:
                complain(str(error))
                yield None
                continue
            yield {"prompt": video.prompt, "num_clips": len(latents), "bytes": size}, latents

    writer = ShardWriter(Path(output), about(shape, vae), ranks, VIDEOS_PER_SHARD)
    for name, item in list(writer.items.items()):
        if name in by_name and item.row["bytes"] != by_name[name].path.stat().st_size:
            del writer.items[name]  # to be made again
    writer.fill(list(by_name), make)
    if num_left_out:
        logger.warning("%d videos of %s left out", num_left_out, folder)
    return {video.name: video.prompt for video in videos}


def about(shape: ClipShape, vae: str) -> dict[str, Any]:
    """What decides latents: size, rate and length of the clips, and the VAE."""
    return {"kind": KIND, **asdict(shape), "vae": vae}
