"""utils/heartbeat.py: a rank that hangs, dies or fails takes the others with it, by name; a whole run ends in peace."""

import os
import re
import signal
import sys
import time

import pytest
import torch

from tests import ranks as gloo
from utils.distributed import Ranks, barrier, init_distributed, shutdown
from utils.heartbeat import Heartbeat

SECONDS = 2.0


def work(arguments: list[str]) -> None:
    how, victim = arguments[0], int(arguments[1])
    ranks = init_distributed("cpu")
    with Heartbeat(ranks, SECONDS):
        barrier(ranks)
        if ranks.rank == victim:
            if how == "hang":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            elif how == "fail":
                raise ValueError("the disk\nis full")
        if how == "end":
            time.sleep(SECONDS + 1)
            barrier(ranks)
        else:
            time.sleep(20)  # as in a collective that waits
    sys.stderr.write(f"rank {ranks.rank} is through\n")
    shutdown()


@pytest.mark.parametrize(
    ("how", "victim", "message"),
    [
        ("hang", 1, r"rank 1 \(.*, process \d+\) has given no sign of life for \d s; this rank stops. Run the same"),
        ("die", 1, r"rank 1 \(.*, process \d+\) has given no sign of life for \d s; this rank stops. Run the same"),
        ("fail", 1, r"rank 1 \(.*, process \d+\) failed: the disk is full; this rank stops too"),
        ("die", 0, r"the ranks' meeting point is gone \(.*\): rank 0 or its launcher died; Run the same"),
    ],
    ids=["hang", "die", "fail", "rank 0 dies"],
)
def test_the_others_stop_and_say_who_it_was(how: str, victim: int, message: str):
    started = time.monotonic()
    done = gloo.run(__file__, 2, how, str(victim))
    assert done.returncode != 0
    assert time.monotonic() - started < 20
    assert "is through" not in done.stderr
    assert re.search(message, done.stderr), done.stderr


def test_a_whole_run_ends_in_peace():
    done = gloo.run(__file__, 2, "end", "-1")
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"rank \d is through", done.stderr)) == ["rank 0 is through", "rank 1 is through"]


def test_one_process_watches_nothing():
    with Heartbeat(Ranks(torch.device("cpu")), SECONDS) as heartbeat:
        assert heartbeat.thread is None


if __name__ == "__main__":
    gloo.main(work)
