"""benchmarks/kill_resume.py in small: two kills, one of them while saving; the committed figures are of fifty."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_killed_run_is_the_run(tmp_path: Path):
    command = [sys.executable, "benchmarks/kill_resume.py", "--kills", "2", "--steps", "24"]
    command += ["--output", str(tmp_path / "kills.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "kills.json").read_text())
    assert result["lost"] == 0
    assert result["kills"] == 2
    assert result["most_steps_redone"] <= 2 * result["save_every_steps"]
