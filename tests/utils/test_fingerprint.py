"""utils/fingerprint.py: other weights, other digits; the same weights elsewhere, the same."""

from pathlib import Path

import torch

from utils.fingerprint import BLOCK_BYTES, NUM_BLOCKS, fingerprint


def test_content_counts_and_names_do_not(tmp_path: Path):
    a, b, folder = tmp_path / "a.pth", tmp_path / "b.pth", tmp_path / "folder"
    a.write_bytes(b"weights")
    b.write_bytes(b"weights")
    folder.mkdir()
    (folder / "inside").write_bytes(b"weights")
    assert fingerprint(a) == fingerprint(b) == fingerprint(folder)
    assert len(fingerprint(a)) == 16
    assert fingerprint(a, b) != fingerprint(a)
    b.write_bytes(b"weightz")
    assert fingerprint(a) != fingerprint(b)


def test_a_large_file_is_told_by_its_blocks(tmp_path: Path):
    path = tmp_path / "large"
    weights = torch.randn(2 * NUM_BLOCKS * BLOCK_BYTES // 4)
    path.write_bytes(weights.numpy().tobytes())
    before = fingerprint(path)
    path.write_bytes((weights + 1e-3 * torch.randn_like(weights)).numpy().tobytes())  # a little training
    assert fingerprint(path) != before
    path.write_bytes(weights.numpy().tobytes()[:-4])
    assert fingerprint(path) != before
    path.write_bytes(weights.numpy().tobytes())
    assert fingerprint(path) == before
