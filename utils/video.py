"""Videos and stills to tensors and back: H.264 files written while they are made, contact sheets, safe file names.

Frames are floats in [0, 1], `[F, 3, H, W]` (or `[F, H, W, 3]` where it says so). PyAV is imported on first use.
"""

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from utils.errors import MissingPackageError

BT709 = 1  # H.273 code point; untagged files are guessed as BT.601 by some players and BT.709 by others
LIMITED_RANGE = 1
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # ISO/IEC 23008-12, annex B


class VideoError(ValueError):
    """A video file that cannot be used; the message names it."""


def _import_av():
    try:
        import av
    except ImportError as error:
        raise MissingPackageError("reading and writing video needs PyAV: pip install av") from error
    return av


def to_uint8(frames: Tensor) -> Tensor:
    """Frames in [0, 1], channels first or last, as uint8 `[F, H, W, 3]` on the CPU; rounded, not truncated."""
    if frames.ndim != 4 or 3 not in (frames.shape[1], frames.shape[-1]):
        raise ValueError(f"frames of shape {list(frames.shape)}; expected [F, 3, H, W] or [F, H, W, 3]")
    if frames.shape[-1] != 3:
        frames = frames.permute(0, 2, 3, 1)
    return frames.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8).cpu().contiguous()


class VideoWriter:
    """An H.264 file (yuv420p, BT.709) that grows block by block and appears under its name only when complete.

        with VideoWriter("videos/wave.mp4", fps=16) as writer:
            for frames in pipeline.stream(...):        # [f, 3, H, W] or [f, H, W, 3] in [0, 1]
                writer.append(frames)

    Until the `with` ends, frames go to a hidden file beside the target; an exception inside removes that file and
    leaves whatever stood under `path` before. `crf` is x264's quality scale: 18 is visually lossless, more is smaller.
    `fingerprint` is a hash of the pixels as they came in: x264 itself does not always make the same bytes of them.
    """

    def __init__(self, path: str | Path, fps: float = 16, *, crf: int = 18, preset: str = "veryfast"):
        self.path = Path(path)
        self.fps = Fraction(fps).limit_denominator(1001)
        self.num_frames = 0
        self._pixels = hashlib.sha256()
        self._options = {"crf": str(crf), "preset": preset}
        self._partial = self.path.with_name(f".{self.path.stem}.{os.getpid()}.partial{self.path.suffix}")
        self._container = None
        self._stream = None

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, exception_type, *_) -> None:
        if exception_type is None:
            self.close()
        else:
            self.discard()

    @property
    def fingerprint(self) -> str:
        return self._pixels.hexdigest()[:16]

    def append(self, frames: Tensor) -> None:
        """Encode more frames, `[f, 3, H, W]` or `[f, H, W, 3]` in [0, 1]; all blocks have one size."""
        av = _import_av()
        pixels = to_uint8(frames).numpy()
        height, width = pixels.shape[1:3]
        if self._container is None:
            self._open(height, width)
        elif (height, width) != (self._stream.height, self._stream.width):
            raise ValueError(
                f"{self.path}: frames of {height}x{width} after {self._stream.height}x{self._stream.width}"
            )
        self._pixels.update(pixels)
        for image in pixels:
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
                format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
            )
            frame.pts = self.num_frames
            self._container.mux(self._stream.encode(frame))
            self.num_frames += 1

    def _open(self, height: int, width: int) -> None:
        if height % 2 or width % 2:
            raise ValueError(f"{self.path}: H.264 (yuv420p) needs even sizes, got {height}x{width}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._container = _import_av().open(
            str(self._partial), "w", format=self.path.suffix.lstrip(".") or "mp4", options={"movflags": "+faststart"}
        )
        self._stream = self._container.add_stream("libx264", rate=self.fps, options=self._options)
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
        codec = self._stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        codec.color_range = LIMITED_RANGE

    def close(self) -> None:
        """Finish the file and give it its name."""
        if self._container is None:
            raise ValueError(f"{self.path}: no frames were written")
        self._container.mux(self._stream.encode())
        self._container.close()
        self._container = None
        self._partial.replace(self.path)

    def discard(self) -> None:
        """Drop what was written; nothing appears under the final name."""
        if self._container is not None:
            self._container.close()
            self._container = None
        self._partial.unlink(missing_ok=True)


def write_video(path: str | Path, blocks: Tensor | Iterable[Tensor], fps: float = 16) -> Path:
    """Write a whole clip, or blocks of frames as an iterator yields them; returns the path."""
    with VideoWriter(path, fps) as writer:
        for frames in [blocks] if isinstance(blocks, Tensor) else blocks:
            writer.append(frames)
    return writer.path


def read_video(path: str | Path, *, num_frames: int | None = None) -> tuple[Tensor, float]:
    """A video as `[F, 3, H, W]` in [0, 1], and its frames per second.

    num_frames: only so many, evenly spaced from the first to the last, which spares memory. Raises FileNotFoundError or
    ValueError.
    """
    av = _import_av()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no video at {path}")
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            total = stream.frames or sum(1 for _ in av.open(str(path)).decode(video=0))
            wanted = range(total)
            if num_frames is not None:
                wanted = set(torch.linspace(0, total - 1, min(num_frames, total)).round().int().tolist())
            frames = [
                torch.from_numpy(frame.to_ndarray(format="rgb24"))
                for index, frame in enumerate(container.decode(stream))
                if index in wanted
            ]
            fps = float(stream.average_rate or 0)
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} cannot be read as a video ({error})") from error
    if not frames:
        raise ValueError(f"{path} has no frames")
    return torch.stack(frames).permute(0, 3, 1, 2).float().div(255), fps


def video_clips(
    path: str | Path, fps: float, num_frames: int, height: int, width: int, *, device: torch.device | str = "cpu"
) -> Iterator[Tensor]:
    """A video cut into clips `[num_frames, 3, height, width]` in [0, 1], one after the other; what is left is dropped.

    Frames are the ones on screen at 0, 1 / fps, 2 / fps, ..., scaled (on `device`) to cover height x width and cut
    around the centre. Raises VideoError for a file that cannot be read, also in its middle, and for one shorter than a
    clip.
    """
    frames: list[Tensor] = []
    too_short = True
    for picture in pictures_at(path, fps):
        frames.append(resize_cover(picture[None].to(device).float().div(255), height, width))
        if len(frames) == num_frames:
            yield torch.cat(frames)
            frames, too_short = [], False
    if too_short:
        raise VideoError(f"{path} has {len(frames)} frames at {fps:g} per second, a clip needs {num_frames}")


def video_length(path: str | Path, fps: float) -> int:
    """Frames that a video has at so many per second. Raises FileNotFoundError or ValueError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no video at {path}")
    number = 0
    for start, _ in _timed_frames(path):
        while number / fps < start - 1e-4:
            number += 1
    if not number:
        raise ValueError(f"{path} has no frames")
    return number


def video_pieces(path: str | Path, fps: float, height: int, width: int, size: int = 12) -> Iterator[Tensor]:
    """A video from its first to its last frame in pieces `[<= size, 3, height, width]` in [-1, 1], as clips are cut.

    Frames are `video_clips`'s; `video_length` counts them.
    """
    frames: list[Tensor] = []
    for picture in pictures_at(path, fps):
        frames.append(resize_cover(picture[None].float().div(255), height, width).mul(2).sub(1))
        if len(frames) == size:
            yield torch.cat(frames)
            frames = []
    if frames:
        yield torch.cat(frames)


def pictures_at(path: str | Path, fps: float) -> Iterator[Tensor]:
    """uint8 `[3, H, W]`, upright: what is on screen at 0, 1 / fps, 2 / fps, ... until the video ends."""
    number, shown = 0, None
    for start, frame in _timed_frames(path):
        while shown is not None and number / fps < start - 1e-4:
            picture = torch.from_numpy(shown.to_ndarray(format="rgb24")).permute(2, 0, 1)
            yield picture.rot90(shown.rotation // 90, (1, 2))
            number += 1
        shown = frame


def _timed_frames(path: str | Path) -> Iterator[tuple[float, Any]]:
    """Decoded frames and when they appear, in seconds since the first; at the end the last one again, with its end."""
    av = _import_av()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError(f"{path} holds no pictures")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            interval = 1 / float(stream.average_rate or stream.base_rate or 25)
            begin, frame = None, None
            for number, frame in enumerate(container.decode(stream)):
                time = number * interval if frame.time is None else frame.time
                begin = time if begin is None else begin
                yield time - begin, frame
            if frame is not None:
                yield time - begin + interval, frame
    except av.FFmpegError as error:
        raise VideoError(f"{path} cannot be read as a video ({error})") from error


def resize_cover(frames: Tensor, height: int, width: int) -> Tensor:
    """Scale `[F, C, H, W]` until it covers height x width, keeping proportions, and cut the centre out."""
    old_height, old_width = frames.shape[-2:]
    if (old_height, old_width) == (height, width):
        return frames
    scale = max(height / old_height, width / old_width)
    covering = (max(height, round(old_height * scale)), max(width, round(old_width * scale)))
    frames = F.interpolate(frames, covering, mode="bicubic", antialias=True, align_corners=False).clamp(
        frames.amin(), frames.amax()
    )
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    return frames[..., top : top + height, left : left + width]


def load_image(path: str | Path, height: int, width: int) -> Tensor:
    """An image file, scaled to cover height x width and centre-cropped, as `[3, H, W]` in [-1, 1].

    Raises FileNotFoundError or ValueError.
    """
    return resize_cover(load_pixels(path)[None], height, width)[0].mul(2).sub(1)


def load_pixels(path: str | Path) -> Tensor:
    """An image file as it is, `[3, H, W]` in [0, 1]; HEIC photos need the package pillow-heif.

    Raises FileNotFoundError or ValueError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no image at {path}")
    if _is_heic(path):
        _register_heic(path)
    try:
        with Image.open(path) as image:
            return pixels_of(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error})") from error


def _is_heic(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:] in HEIC_BRANDS


def _register_heic(path: Path) -> None:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise ValueError(
            f"{path} is an HEIC photo and no decoder is installed: pip install pillow-heif, or save it as JPEG or PNG"
        ) from None
    register_heif_opener()


def pixels_of(image: Image.Image) -> Tensor:
    """A PIL image as `[3, H, W]` in [0, 1]; turned upright by its EXIF tag, transparency laid on white.

    16-bit grey is scaled to 8 bits; CMYK, palettes and grey become RGB.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    return pixels.permute(2, 0, 1).float().div(255)


def contact_sheet(
    path: str | Path, videos: Sequence[Tensor], captions: Sequence[str], *, columns: int = 6, tile_height: int = 128
) -> Path:
    """A PNG with one row per video, `columns` frames evenly spaced from first to last, its caption above.

    videos: each `[F, 3, H, W]` in [0, 1], sizes may differ. Captions are cut to the width of the sheet.
    """
    if not videos or len(videos) != len(captions):
        raise ValueError(
            f"{len(videos)} videos and {len(captions)} captions; give one caption for each of 1 or more videos"
        )
    margin, text_height = 4, 18
    font = ImageFont.load_default(size=13)
    rows = []
    for video in videos:
        indices = torch.linspace(0, len(video) - 1, min(columns, len(video))).round().long()
        tile_width = max(1, round(video.shape[-1] * tile_height / video.shape[-2]))
        tiles = F.interpolate(video[indices].float(), (tile_height, tile_width), mode="bilinear", antialias=True)
        rows.append([Image.fromarray(tile.numpy()) for tile in to_uint8(tiles)])
    width = max(sum(tile.width + margin for tile in row) for row in rows) + margin
    sheet = Image.new("RGB", (width, len(rows) * (tile_height + text_height + margin) + margin), "white")
    draw = ImageDraw.Draw(sheet)
    top = margin
    for row, caption in zip(rows, captions, strict=True):
        draw.text((margin, top), _fit_text(caption, font, width - 2 * margin), fill="black", font=font)
        left = margin
        for tile in row:
            sheet.paste(tile, (left, top + text_height))
            left += tile.width + margin
        top += tile_height + text_height + margin
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    sheet.save(partial, format="PNG", optimize=True)
    return partial.replace(path)


def _fit_text(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text on one line, cut with an ellipsis where it would pass `width` pixels."""
    text = " ".join(text.split())[:400]
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def safe_name(prompt: str, max_bytes: int = 100, *, key: str | None = None) -> str:
    """A file name (without suffix) for any prompt: its words in any script, then 8 hex digits that tell prompts apart.

    Letters, digits and combining marks stay; all else (slashes, quotes, emoji, control characters) becomes one `_`.
    At most `max_bytes` in UTF-8, cut between characters: `a_red_puppet_waves-5f0c1b2e`. The digits are a hash of `key`,
    by default the prompt itself.
    """
    digest = hashlib.sha256((prompt if key is None else key).encode()).hexdigest()[:8]
    text = unicodedata.normalize("NFC", prompt)
    kept = (c if c.isalnum() or unicodedata.category(c).startswith("M") else " " for c in text)
    words = "_".join("".join(kept).split())
    words = words.encode("utf-8")[: max_bytes - len(digest) - 1].decode("utf-8", "ignore").strip("_")
    return f"{words}-{digest}" if words else digest
