"""Prompt files to prompts: text lists, extended twins, images with captions; and the seed that belongs to a prompt."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Prompt:
    """One line to make a video of: `text` steers, `name` names the file; they differ when a prompt was extended."""

    text: str
    name: str
    image: Path | None = None  # for image-to-video
    video: Path | None = None  # what the video is made after
    pose: Path | None = None  # drawn skeletons that it follows
    ref_pose: Path | None = None  # the image's own skeleton
    seed: int | None = None  # in place of the run's

    @property
    def key(self) -> str:
        """What tells two videos of one list apart; the words alone, where there is nothing else."""
        parts = [self.name]
        if self.text != self.name:
            parts.append(self.text)
        parts += [file.name for file in (self.image, self.video, self.pose) if file is not None]
        return "\n".join(parts)


def video_seed(seed: int, prompt: str, sample: int = 0) -> int:
    """Seed of one video: of the run's seed, the prompt and the sample's number, and of nothing else.

    0 <= s < 2^53, which any JSON reader keeps. A video does not depend on its place in the list, on the batch, or how
    many processes share the work.
    """
    digest = hashlib.sha256(f"{seed}\n{sample}\n{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 11


def read_text(path: str | Path) -> str:
    """A UTF-8 text file, byte order mark dropped. Raises FileNotFoundError; ValueError naming the line and byte."""
    path = Path(path)
    if not path.is_file():
        kind = "a folder; give a text file" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: {kind} with one prompt per line")
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte {error.start} (0x{raw[error.start]:02x}) is not UTF-8; save the file as UTF-8"
        ) from None


def _lines(path: str | Path) -> list[str]:
    """Lines without their ends, blank ones kept in between (they keep twin files aligned), dropped at the end."""
    return [line.strip() for line in read_text(path).rstrip().split("\n")]


def read_prompts(path: str | Path, extended_path: str | Path | None = None) -> list[Prompt]:
    """Prompts of a file, one per line, blank lines left out; with `extended_path`, its lines steer and these name."""
    names = _lines(path)
    texts = _lines(extended_path) if extended_path else names
    if len(texts) != len(names):
        raise ValueError(
            f"{extended_path} has {len(texts)} lines and {path} has {len(names)}; line n of the first extends line n "
            "of the second"
        )
    prompts = [Prompt(text or name, name or text) for text, name in zip(texts, names, strict=True) if text or name]
    if not prompts:
        raise ValueError(f"{path} has no prompts; write one per line")
    return prompts


def read_image_prompts(path: str | Path, extended_path: str | Path | None = None) -> list[Prompt]:
    """First frames with their captions. `path` is one of

    - a folder of pairs `boat.png` + `boat.txt` (also .jpg, .jpeg, .webp, .bmp);
    - a `.jsonl` file (or a folder holding one) of `{"image": "boat.png", "prompt": "..."}`, images relative to it;
    - a folder with one `target_crop_info_<ratio>.json` and the images in its sub-folder `<ratio>/` (VBench's layout).
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such folder; --i2v reads images with captions from --data_path")
    if path.is_file():
        found = _from_jsonl(path)
    else:
        crops, lists = sorted(path.glob("target_crop_info_*.json")), sorted(path.glob("*.jsonl"))
        if len(crops) > 1 or len(lists) > 1:
            names = ", ".join(file.name for file in crops or lists)
            raise ValueError(f"{path} holds several lists of images ({names}); keep one, or name a .jsonl file")
        if crops:
            found = _from_crop_info(crops[0])
        elif lists:
            found = _from_jsonl(lists[0])
        else:
            found = _from_pairs(path)
    for image, _ in found:
        if not image.is_file():
            raise FileNotFoundError(f"no image at {image}, which {path} lists")
    captions = [caption for _, caption in found]
    texts = _lines(extended_path) if extended_path else captions
    if len(texts) != len(found):
        raise ValueError(f"{extended_path} has {len(texts)} lines for {len(found)} images; give one line per image")
    return [Prompt(text, caption, image) for text, (image, caption) in zip(texts, found, strict=True)]


def _from_pairs(folder: Path) -> list[tuple[Path, str]]:
    images = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise ValueError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return [(image, " ".join(read_text(image.with_suffix(".txt")).split())) for image in images]


def _from_jsonl(path: Path) -> list[tuple[Path, str]]:
    found = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            found.append((path.parent / record["image"], str(record["prompt"])))
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f'{path}, line {number}: expected {{"image": "file", "prompt": "words"}}') from None
    if not found:
        raise ValueError(f"{path} lists no images")
    return found


def _from_crop_info(path: Path) -> list[tuple[Path, str]]:
    ratio = path.stem.removeprefix("target_crop_info_")
    try:
        records = json.loads(read_text(path))
        return [(path.parent / ratio / record["file_name"], str(record["caption"])) for record in records]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{path}: expected a list of records with 'file_name' and 'caption'") from None
