"""Drawn skeletons from disk: a video of them, or a folder of pictures, read as fast as they are asked for."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from utils.prompts import IMAGE_SUFFIXES
from utils.video import load_pixels, pictures_at, video_length


def drawing_pieces(path: str | Path, fps: float, size: int = 12) -> Iterator[Tensor]:
    """Pieces uint8 `[<= size, 3, h, w]`, in the size they were drawn in.

    path: a video, of which the frames at 0, 1 / fps, ... are taken, or a folder, whose pictures are taken in the
    order of their names, one per frame. Raises FileNotFoundError or ValueError.
    """
    pictures, pieces = _pictures(Path(path), fps), []
    for picture in pictures:
        if pieces and picture.shape != pieces[0].shape:
            raise ValueError(
                f"{path}: a drawing of {picture.shape[1]}x{picture.shape[2]} pixels after one of "
                f"{pieces[0].shape[1]}x{pieces[0].shape[2]}; all frames of a pose have one size"
            )
        pieces.append(picture)
        if len(pieces) == size:
            yield torch.stack(pieces)
            pieces = []
    if pieces:
        yield torch.stack(pieces)


def count_drawings(path: str | Path, fps: float) -> int:
    """Frames that `drawing_pieces` gives. Raises FileNotFoundError or ValueError."""
    path = Path(path)
    return len(_files(path)) if path.is_dir() else video_length(path, fps)


def load_drawing(path: str | Path) -> Tensor:
    """One drawing, uint8 `[3, h, w]`. Raises FileNotFoundError or ValueError."""
    return load_pixels(path).mul(255).round().to(torch.uint8)


def _pictures(path: Path, fps: float) -> Iterator[Tensor]:
    if path.is_dir():
        return map(load_drawing, _files(path))
    return pictures_at(path, fps)


def _files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"{folder} holds no drawings ({', '.join(IMAGE_SUFFIXES)})")
    return files
