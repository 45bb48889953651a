"""benchmarks/attention.py on a CPU: every backend is told, those that do not run with their reason."""

import json
from pathlib import Path

from benchmarks import attention


def test_backends_beside_each_other(tmp_path: Path, capsys):
    options = ["--shapes", "96x2304", "--heads", "2", "--head_dim", "64", "--json", str(tmp_path / "attention.json")]
    assert attention.main([*options, "--backends", "sdpa", "int8", "cudnn"]) == 0
    found = json.loads((tmp_path / "attention.json").read_text())["shapes"]["96x2304"]
    assert found["cudnn"].startswith("RuntimeError: ")
    assert found["sdpa"]["error"] < 0.01 < found["int8"]["error"] < 0.05
    assert all(found[name][figure] > 0 for name in ("sdpa", "int8") for figure in ("ms", "tflops"))
    told = capsys.readouterr().out
    assert "96x2304 int8" in told and "TFLOP/s  error" in told
    assert attention.main([*options, "--seconds", "0"]) == 0
    assert "96x2304 sdpa: left out, the time is over" in capsys.readouterr().out
