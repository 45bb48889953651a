"""Training states written while training goes on: torch.distributed.checkpoint in a thread, whole or not at all."""

import errno
import json
import logging
import shutil
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from utils.distributed import Ranks
from utils.training_state import FACTS, begin_state, cannot_save, finish_state, num_bytes, sync

logger = logging.getLogger(__name__)

# It is meant: a run of one process saves and loads alone.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Checkpointer:
    """Saves in the background: `save` returns when everything is copied, `wait` when it is on the disk.

    Every rank writes its parts (torch.distributed.checkpoint) into a folder ending in .partial; when all have, rank 0
    adds the facts, waits for the disk and gives the folder its name. One save at a time: the next one waits for it.
    """

    def __init__(self, run_dir: str | Path, ranks: Ranks, keep_last: int = 2):
        self.run_dir, self.ranks, self.keep_last = Path(run_dir), ranks, keep_last
        is_alone = ranks.size == 1 or not dist.is_initialized()
        self.group = None if is_alone else dist.new_group(backend="gloo")  # a thread of its own, a group of its own
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def save(self, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
        """Write tensors and facts, which has the key "step", in the background.

        tensors: copies in main memory that nobody changes any more; of DTensors this rank's parts. One rank of those
        that hold the same part is enough; rank 0 gives all of them.
        """
        self.wait()
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.thread = threading.Thread(target=self._write, args=(dict(tensors), facts), daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Until the last save is on the disk."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.check()

    def settle(self, seconds: float = 60.0) -> None:
        """While another error is on its way up: let the save in progress finish, and raise no second error."""
        if self.thread is not None:
            self.thread.join(seconds)
        if self.error is not None:
            logger.error("%s", self.error)

    def check(self) -> None:
        """Raise what went wrong in the background, once."""
        error, self.error = self.error, None
        if error is not None:
            raise error

    def _write(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        size = num_bytes(tensors)  # of the whole state, on rank 0
        try:
            self._write_state(tensors, facts, size)
        except CheckpointException as error:  # not an Exception
            self.error = self._failed(next(iter(error.failures.values()))[0], facts, size)
        except Exception as error:
            self.error = self._failed(error, facts, size)

    def _write_state(self, tensors: dict[str, Tensor], facts: dict[str, Any], size: int) -> None:
        started = time.monotonic()
        partial = self.run_dir / "training_state" / f"step_{facts['step']:08d}.partial"
        if self.ranks.is_main:
            partial = begin_state(self.run_dir, facts["step"])
        if not self._rank_0_says(shutil.disk_usage(self.run_dir).free > size):
            raise OSError(errno.ENOSPC, "the disk is full")
        dcp.save(
            tensors,
            storage_writer=dcp.FileSystemWriter(partial, sync_files=True),
            process_group=self.group,
            no_dist=self.group is None,
        )
        if self.ranks.is_main:
            files = {path.name: path.stat().st_size for path in partial.iterdir()}
            (partial / FACTS).write_text(json.dumps(facts | {"files": files}), encoding="utf-8")
            sync(partial / FACTS)
            folder = finish_state(partial, self.keep_last)
            logger.info("saved %s in %.1f s", folder, time.monotonic() - started)

    def _rank_0_says(self, answer: bool) -> bool:
        """Rank 0's answer on every rank, once rank 0 has come to it: nobody writes before leftovers are gone."""
        box = torch.tensor([answer])
        if self.group is not None:
            dist.broadcast(box, src=0, group=self.group)
        return bool(box)

    def _failed(self, cause: BaseException, facts: dict[str, Any], size: int) -> BaseException:
        """What the user is told: a full disk is a person's affair, anything else is ours."""
        partial = self.run_dir / "training_state" / f"step_{facts['step']:08d}.partial"
        free = shutil.disk_usage(self.run_dir).free
        shutil.rmtree(partial, ignore_errors=True)
        reason = "the disk is full" if free < size else _no_space(cause)
        return cannot_save(self.run_dir, facts["step"], size, reason) if reason else cause


def _no_space(error: BaseException | None) -> str | None:
    """The system's words when a write failed for want of room; torch's zip writer stumbles over itself after it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return error.strerror
        if "inline_container" in str(error) and error.__context__ is None:  # came from another rank, without its cause
            return "a file could not be written"
        error = error.__cause__ or error.__context__
    return None
