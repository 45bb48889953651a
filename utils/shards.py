"""Many tensors on disk: safetensors shards, each with a JSONL index of its items. What is finished is never made twice.

    folder/
      about.json            what the tensors are and what made them; nothing else is ever added to this folder
      shard-000000-5f0c1b2e.jsonl           one line per item: {"key": "...", "prompt": "...", ...}
      shard-000000-5f0c1b2e.safetensors     tensors "0.clip0", "1.clip0", ...: item n of the shard, by name

A shard counts from the moment its .jsonl appears, which is written last; both appear by renaming a finished file. So a
process killed at any moment leaves whole shards only, and a run that goes on makes exactly the items that no index
lists, on however many processes. Names end in a hash of the keys: two runs that fill one folder at a time may do some
work twice, but never write into each other's shards.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from utils.distributed import Ranks, barrier
from wan.modules.weights import save_safetensors

logger = logging.getLogger(__name__)

# An item's row for the index and its tensors by name.
Made = tuple[dict[str, Any], dict[str, Tensor]]


@dataclass(frozen=True)
class Item:
    """One line of an index, and where its tensors are."""

    row: dict[str, Any]
    shard: Path
    place: int


class Shards:
    """A finished (or growing) folder, for reading. Items stand in the order of their keys, however they were made."""

    def __init__(self, folder: str | Path, kind: str):
        """kind: what about.json must say these tensors are. Raises FileNotFoundError or ValueError."""
        self.folder = Path(folder)
        self.about = read_about(self.folder, kind)
        self.items = sorted(read_items(self.folder), key=lambda item: item.row["key"])
        self._open: dict[Path, Any] = {}
        if not self.items:
            raise ValueError(f"{folder} holds no finished shard of {kind}; let the script that fills it end")

    def read(self, item: Item, name: str) -> Tensor:
        """One tensor, on the CPU."""
        try:
            if item.shard not in self._open:
                self._open[item.shard] = safe_open(item.shard, framework="pt")
            return self._open[item.shard].get_tensor(f"{item.place}.{name}")
        except (SafetensorError, OSError) as error:
            index = item.shard.with_suffix(".jsonl").name
            raise ValueError(
                f"{item.shard} is damaged or missing ({error}); delete {index} beside it and run the script that fills "
                "this folder again"
            ) from error


@dataclass
class ShardWriter:
    """Fills a folder once, alone or as one of many ranks.

    about: what must agree for old and new items to lie in one folder, JSON-able, "kind" among it. items_per_shard:
    what a kill costs at most; a shard that grows beyond max_shard_bytes is closed before.
    """

    folder: Path
    about: Mapping[str, Any]
    ranks: Ranks
    items_per_shard: int
    max_shard_bytes: int = 2 * 10**9  # they wait in main memory

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.ranks.is_main and not (self.folder / "about.json").is_file():
            _write_text(self.folder / "about.json", json.dumps(dict(self.about), indent=2) + "\n")
        barrier(self.ranks)
        check_about(self.folder, read_about(self.folder, self.about["kind"]), self.about)
        self.items = {item.row["key"]: item for item in read_items(self.folder)}  # as they were found
        numbers = (int(path.stem.split("-")[1]) for path in self.folder.glob("shard-*.jsonl"))
        self.next_shard = 1 + max(numbers, default=-1)
        barrier(self.ranks)  # every rank has read the same folder before the first one writes

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those that no index lists, each once, in their order."""
        return [key for key in dict.fromkeys(keys) if key not in self.items]

    def fill(self, keys: Sequence[str], make: Callable[[list[str]], Iterable[Made | None]]) -> None:
        """Make what is missing of `keys`, this rank's share of it; returns when all ranks have.

        make(keys of one shard) yields their rows and tensors, in order; "key" is put into the rows here. None for an
        item that cannot be made: it goes unrecorded, and is tried again by the next run.
        """
        missing = self.missing(keys)
        shares = [missing[i : i + self.items_per_shard] for i in range(0, len(missing), self.items_per_shard)]
        logger.info("%d of %d items in %s are there already", len(keys) - len(missing), len(keys), self.folder)
        started, own = time.monotonic(), range(self.ranks.rank, len(shares), self.ranks.size)
        for number, index in enumerate(own, start=1):
            self._make(self.next_shard + index, shares[index], make(shares[index]))
            seconds = (time.monotonic() - started) / number
            left = seconds * (len(own) - number) / 60
            logger.info("shard %d of %d, %.1f s each, %.1f min left", number, len(own), seconds, left)
        barrier(self.ranks)

    def _make(self, number: int, keys: list[str], made: Iterable[Made | None]) -> None:
        rows: list[dict[str, Any]] = []
        tensors: dict[str, Tensor] = {}
        for key, result in zip(keys, made, strict=True):
            if result is None:
                continue
            row, named = result
            tensors |= {f"{len(rows)}.{name}": tensor.cpu() for name, tensor in named.items()}
            rows.append({"key": key, **row})
            if sum(tensor.nbytes for tensor in tensors.values()) > self.max_shard_bytes:
                self._write(number, rows, tensors)
                rows, tensors = [], {}
        if rows:
            self._write(number, rows, tensors)

    def _write(self, number: int, rows: list[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
        digest = hashlib.sha256("\n".join(row["key"] for row in rows).encode()).hexdigest()[:8]
        path = self.folder / f"shard-{number:06d}-{digest}.safetensors"
        save_safetensors(tensors, path)
        _write_text(path.with_suffix(".jsonl"), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_about(folder: Path, kind: str) -> dict[str, Any]:
    """What a folder says of itself; refused if it is not there or of another kind."""
    path = folder / "about.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {kind} (no about.json); docs/training_data.md says how to make them"
        )
    about = _parse(path, path.read_text(encoding="utf-8"))
    if about.get("kind") != kind:
        raise ValueError(f"{folder} holds {about.get('kind')}, not {kind}; give another folder")
    return about


def read_items(folder: Path) -> list[Item]:
    """All lines of all indices, shard by shard; of two items with one key the newer."""
    items: dict[str, Item] = {}
    for path in sorted(folder.glob("shard-*.jsonl")):
        shard = path.with_suffix(".safetensors")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
            row = _parse(path, line, number)
            items[row["key"]] = Item(row, shard, number)
    return list(items.values())


def check_about(folder: Path, about: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse a folder whose `about` differs from what this run wants; keys that it does not ask for may be anything."""
    for key, value in json.loads(json.dumps(dict(wanted))).items():  # as JSON tells it: tuples are lists
        if about.get(key) != value:
            raise ValueError(
                f"{folder} was made with {key} {about.get(key)!r}, this run has {value!r}; give another folder, or "
                "delete this one to make it anew"
            )


def _parse(path: Path, text: str, line: int | None = None) -> dict[str, Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f", line {line + 1}" if line is not None else ""
        raise ValueError(f"{path}{where} is damaged ({error.msg}); delete it and make its shard again") from error


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
