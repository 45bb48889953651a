"""Telling files of weights apart without reading 11 GB."""

import hashlib
from pathlib import Path

NUM_BLOCKS = 64
BLOCK_BYTES = 2**16


def fingerprint(*paths: str | Path) -> str:
    """Sixteen hexadecimal digits of files and of all files in folders, in this order; names do not count.

    Of a large file its size and 64 blocks of 64 KiB, evenly spaced, are read: training changes a network everywhere.
    """
    digest = hashlib.sha256()
    for path in map(Path, paths):
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            size = file.stat().st_size
            digest.update(f"{size}\n".encode())
            with file.open("rb") as stream:
                if size <= NUM_BLOCKS * BLOCK_BYTES:
                    digest.update(stream.read())
                    continue
                for block in range(NUM_BLOCKS):
                    stream.seek((size - BLOCK_BYTES) * block // (NUM_BLOCKS - 1))
                    digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()[:16]
