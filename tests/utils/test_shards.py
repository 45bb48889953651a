"""utils/shards.py: killed and gone on with = made in one go, on any number of processes; and refusals in words."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from utils.distributed import Ranks
from utils.shards import Shards, ShardWriter

ROOT = Path(__file__).resolve().parents[2]
ALONE = Ranks(torch.device("cpu"))
KEYS = [f"item {n:02d}" for n in range(11)]


def writer(folder: Path, ranks: Ranks = ALONE, **about) -> ShardWriter:
    return ShardWriter(folder, {"kind": "numbers", "sizes": (2, 3), **about}, ranks, items_per_shard=3)


def make(keys: list[str]):
    for key in keys:
        number = int(key[-2:])
        if number == 7:  # it cannot be made
            yield None
        else:
            yield {"square": number**2}, {"x": torch.full((2, 3), float(number)), "y": torch.arange(number)}


def content(folder: Path) -> list[tuple]:
    shards = Shards(folder, "numbers")
    return [(item.row["key"], item.row["square"], shards.read(item, "x").tolist()) for item in shards.items]


def test_what_is_written_comes_back_in_the_order_of_keys(tmp_path):
    writer(tmp_path).fill(KEYS[::-1], make)
    found = content(tmp_path)
    assert [key for key, _, _ in found] == [key for key in KEYS if key != "item 07"]
    assert all(x == [[float(key[-2:])] * 3] * 2 for key, _, x in found)
    shards = Shards(tmp_path, "numbers")
    assert shards.read(shards.items[5], "y").tolist() == [0, 1, 2, 3, 4]


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", range(0, 11, 2))
def test_gone_on_with_is_made_in_one_go(tmp_path, after):
    made = []

    def fragile(keys):
        for key, result in zip(keys, make(keys), strict=True):
            if len(made) == after:
                raise Killed
            made.append(key)
            yield result

    with pytest.raises(Killed):
        writer(tmp_path / "parts").fill(KEYS, fragile)
    kept = set(KEYS) - set(writer(tmp_path / "parts").missing(KEYS))
    assert kept == set(KEYS[: after // 3 * 3]) - {KEYS[7]}  # whole shards
    again = []
    writer(tmp_path / "parts").fill(KEYS, lambda keys: [again.extend(keys), *make(keys)][1:])
    assert set(again) == set(KEYS) - kept
    writer(tmp_path / "whole").fill(KEYS, make)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_a_shard_without_its_index_does_not_exist(tmp_path):
    writer(tmp_path).fill(KEYS, make)
    (last,) = tmp_path.glob("shard-000003-*.jsonl")
    last.unlink()  # as if killed between the two renames
    assert writer(tmp_path).missing(KEYS) == [KEYS[7], *KEYS[9:]]
    last.with_suffix(".safetensors").write_bytes(b"torn")
    writer(tmp_path).fill(KEYS, make)
    assert len(content(tmp_path)) == 10


def test_new_items_join_old_ones(tmp_path):
    writer(tmp_path).fill(KEYS[:5], make)
    writer(tmp_path).fill(KEYS[3:8], make)
    writer(tmp_path).fill([*KEYS, KEYS[0]], make)
    writer(tmp_path / "whole").fill(KEYS, make)
    assert content(tmp_path) == content(tmp_path / "whole")


def test_two_runs_at_a_time_keep_out_of_each_others_shards(tmp_path):
    first, second = writer(tmp_path), writer(tmp_path)  # both saw an empty folder
    first.fill(KEYS[:8], make)
    second.fill(KEYS[2:], make)
    writer(tmp_path / "whole").fill(KEYS, make)
    assert content(tmp_path) == content(tmp_path / "whole")


def test_a_large_shard_is_closed_early(tmp_path):
    about = {"kind": "numbers", "sizes": (2, 3)}
    ShardWriter(tmp_path, about, ALONE, items_per_shard=6, max_shard_bytes=100).fill(KEYS, make)
    indices = [path.read_text().count("\n") for path in sorted(tmp_path.glob("shard-*.jsonl"))]
    assert sum(indices) == 10 and max(indices) < 6 and len(indices) > 2
    writer(tmp_path / "whole").fill(KEYS, make)
    assert content(tmp_path) == content(tmp_path / "whole")


def test_a_full_disk_is_told_and_leaves_nothing_torn(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"could not be written: .*; make room and run again"):
            writer(tmp_path).fill(KEYS, lambda keys: (({}, {"x": torch.zeros(1000)}) for _ in keys))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["about.json"]
    writer(tmp_path).fill(KEYS, make)
    assert len(content(tmp_path)) == 10


SCRIPT = """
import sys, time, torch
from pathlib import Path
from tests.utils.test_shards import KEYS, make, writer
from utils.distributed import init_distributed, shutdown
def slow(keys):
    for made in make(keys):
        time.sleep(float(sys.argv[2]))
        yield made
writer(Path(sys.argv[1]), init_distributed("cpu")).fill(KEYS, slow)
shutdown()
"""


def spawn(folder: Path, port: int, rank: int, size: int, seconds: float) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), str(seconds)], env=environment)


def test_two_ranks_killed_then_one_goes_on(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    both = [spawn(tmp_path / "parts", port, rank, 2, 0.1) for rank in range(2)]
    deadline = time.monotonic() + 60
    while not list((tmp_path / "parts").glob("shard-*.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in both:
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = writer(tmp_path / "parts").missing(KEYS)
    assert 0 < len(left) < len(KEYS)
    writer(tmp_path / "parts").fill(KEYS, make)
    writer(tmp_path / "whole").fill(KEYS, make)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_refusals_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no numbers .no about.json.; docs/training_data.md says how"):
        Shards(tmp_path, "numbers")
    writer(tmp_path)
    with pytest.raises(ValueError, match="no finished shard"):
        Shards(tmp_path, "numbers")
    writer(tmp_path).fill(KEYS, make)
    with pytest.raises(ValueError, match="holds numbers, not letters"):
        Shards(tmp_path, "letters")
    with pytest.raises(ValueError, match=r"was made with sizes \[2, 3\], this run has \[2, 4\]; give another folder"):
        writer(tmp_path, sizes=(2, 4))
    (shard,) = tmp_path.glob("shard-000001-*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1000])
    shards = Shards(tmp_path, "numbers")
    with pytest.raises(ValueError, match=r"damaged or missing .* delete shard-000001-\w+.jsonl"):
        shards.read(shards.items[3], "x")
    shard.with_suffix(".jsonl").write_text(json.dumps({"key": "a"}) + "\n{")
    with pytest.raises(ValueError, match=r"shard-000001-\w+.jsonl, line 2 is damaged"):
        Shards(tmp_path, "numbers")
