"""Signs of life between ranks: when one dies or hangs, the others stop within a minute and say which one it was.

A rank that waits in a collective cannot be reached by an exception, and waits half an hour for a peer that is gone. So
a thread of every rank writes a counter into the store that the ranks met at, and watches the counters of all others.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist

from utils.distributed import Ranks

logger = logging.getLogger(__name__)

DONE, FAILED = "done", "failed: "


def stop_process(message: str) -> None:
    """Leave at once, from any thread, with an error that a launcher sees."""
    logger.error("%s", message)
    os._exit(1)


class Heartbeat:
    """Inside `with Heartbeat(ranks, seconds):` this process stops when another rank is silent for so long, or failed.

    seconds 0, or a run of one process: nothing is watched.
    """

    def __init__(self, ranks: Ranks, seconds: float, stop: Callable[[str], None] = stop_process):
        self.ranks, self.seconds, self.stop = ranks, seconds, stop
        self.pause = min(5.0, seconds / 8)
        self.leaving = threading.Event()
        self.thread: threading.Thread | None = None

    def __enter__(self) -> "Heartbeat":
        if self.ranks.size > 1 and self.seconds > 0:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self.store = dist.TCPStore(address, port, timeout=timedelta(seconds=self.seconds))
            self.me = f"{socket.gethostname()}, process {os.getpid()}"
            self._say("0")
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.thread is None:
            return
        self.leaving.set()
        self.thread.join()
        try:
            self._say(DONE if error is None else f"{FAILED}{' '.join(str(error).split()) or type(error).__name__}")
        except dist.DistError:
            return  # the store went with the rank that kept it
        if error is not None:
            time.sleep(2 * self.pause)  # rank 0 may keep the store: the others should get to read the reason

    def _say(self, what: str) -> None:
        self.store.set(_key(self.ranks.rank), f"{self.me}|{what}")

    def _watch(self) -> None:
        beat, heard = 0, time.monotonic()
        last = {rank: ("", heard) for rank in range(self.ranks.size) if rank != self.ranks.rank}
        while not self.leaving.wait(self.pause):
            beat, now = beat + 1, time.monotonic()
            try:
                self._say(str(beat))
                words = {rank: self._hear(rank) for rank in last}
                heard = now
            except dist.DistError as error:
                if now - heard > self.seconds:
                    self.stop(f"the ranks' meeting point is gone ({error}): rank 0 or its launcher died; {AGAIN}")
                continue
            for rank, word in words.items():
                if word != last[rank][0]:
                    last[rank] = (word, now)
                self._judge(rank, word, now - last[rank][1])

    def _hear(self, rank: int) -> str:
        key = _key(rank)
        return self.store.get(key).decode() if self.store.check([key]) else "not there yet|"

    def _judge(self, rank: int, word: str, silence: float) -> None:
        who, _, state = word.partition("|")
        if state.startswith(FAILED):
            self.stop(f"rank {rank} ({who}) {state}; this rank stops too")
        elif state != DONE and silence > self.seconds:
            self.stop(f"rank {rank} ({who}) has given no sign of life for {silence:.0f} s; this rank stops. {AGAIN}")


AGAIN = "Run the same command again to resume"


def _key(rank: int) -> str:
    return f"longtake/heartbeat/{rank}"
