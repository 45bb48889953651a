"""Lists of videos to make where every line brings its own words, image, pose, video and seed: .jsonl or .csv."""

import csv
import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.prompts import Prompt, read_text

FILES = ("image", "ref_pose", "pose", "video")  # columns that name a file (pose: or a folder), relative to the list
COLUMNS = ("prompt", *FILES, "seed")
BATCH_SUFFIXES = (".jsonl", ".csv")


def read_batch(path: str | Path) -> list[Prompt]:
    """The videos a list asks for, one per line; only `prompt` is needed:

        {"prompt": "a red puppet waves", "image": "start.png", "seed": 7}
        {"prompt": "a blue puppet", "video": "drive.mp4"}
        {"prompt": "a green puppet", "image": "start.png", "ref_pose": "start_pose.png", "pose": "dance/"}

    or the same as columns of a CSV file, empty where a line has no such thing. Raises FileNotFoundError or ValueError
    with the line and what was expected there.
    """
    path = Path(path)
    prompts = [_prompt(path, number, record) for number, record in _records(path)]
    if not prompts:
        raise ValueError(f"{path} lists no videos; write one per line with at least a prompt")
    return prompts


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = read_text(path).splitlines()
    if path.suffix.lower() == ".csv":
        table = csv.DictReader(lines, strict=True)
        try:
            for record in table:
                if None in record or None in record.values():
                    raise ValueError(f"{path}, line {table.line_num}: not as many values as there are columns")
                yield table.line_num, record
        except csv.Error as error:
            raise ValueError(f"{path}, line {table.line_num}: not valid CSV: {error}") from error
        return
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON: {error.msg}") from error
        if not isinstance(record, dict):
            raise ValueError(f'{path}, line {number}: expected {{"prompt": "words", ...}}, got {line.strip()[:40]}')
        yield number, record


def _prompt(path: Path, number: int, record: dict[str, Any]) -> Prompt:
    where = f"{path}, line {number}"
    for column in record:
        if column not in COLUMNS:
            close = difflib.get_close_matches(str(column), COLUMNS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(COLUMNS)}"
            raise ValueError(f"{where}: {column!r} means nothing here; {hint}")
    given = {column: str(value).strip() for column, value in record.items() if value is not None}
    text = given.get("prompt", "")
    if not text:
        raise ValueError(f"{where}: a line needs a prompt")
    files = {column: path.parent / given[column] for column in FILES if given.get(column)}
    for column, file in files.items():
        if not (file.is_file() or (column == "pose" and file.is_dir())):
            raise FileNotFoundError(f"{where}: no {column} at {file}")
    seed = given.get("seed") or None
    if seed is not None and not seed.isdecimal():
        raise ValueError(f"{where}: seed is {seed!r}; it is a whole number, 0 or more")
    return Prompt(text, text, **files, seed=None if seed is None else int(seed))
