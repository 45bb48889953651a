"""Several gloo processes for a test: one Python that imports everything once, then forks its ranks.

A file that wants them ends with `if __name__ == "__main__": ranks.main(work)` and calls `ranks.run(__file__, n, ...)`.
"""

import multiprocessing
import multiprocessing.connection
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
GRACE = 6.0
OPTIMIZER = "torch._dynamo"  # torch.optim imports it when the first optimizer is made
TEXT_ENCODER = "transformers.models.umt5.modeling_umt5"


def run(file: str, num_ranks: int, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess:
    """Start `file` with num_ranks ranks and wait; what they wrote to stderr is in the result."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, file, str(num_ranks), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, timeout=timeout, capture_output=True, text=True)


def main(work: Callable[[list[str]], None], imports: Sequence[str] = ()) -> None:
    """Fork the ranks; each joins a gloo group and does work(arguments). The exit code is the first failure's.

    imports: what the work imports late and slowly: done once, before the fork, instead of in every rank.
    After the first failure the others have GRACE seconds to end by themselves.
    """
    torch.set_num_threads(1)
    for module in imports:
        import_module(module)
    num_ranks = int(sys.argv[1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_rank, args=(r, num_ranks, port, work)) for r in range(num_ranks)]
    for process in processes:
        process.start()
    while all(p.exitcode in (None, 0) for p in processes) and any(p.exitcode is None for p in processes):
        multiprocessing.connection.wait([p.sentinel for p in processes if p.exitcode is None], timeout=1)
    end = time.monotonic() + GRACE
    for process in processes:
        process.join(max(0, end - time.monotonic()))
        process.kill()
        process.join()
    sys.exit(next((p.exitcode for p in processes if p.exitcode), 0))


def _rank(rank: int, num_ranks: int, port: int, work: Callable[[list[str]], None]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(num_ranks)}
    work(sys.argv[2:])
