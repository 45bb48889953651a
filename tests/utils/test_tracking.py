"""utils/tracking.py: one JSON line per call, continued on resume; wandb only if asked."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch

from utils.tracking import Tracker


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_appended(tmp_path: Path):
    for step in (1, 2):
        tracker = Tracker(tmp_path / "run")
        assert tracker.log({"loss": torch.tensor(0.5), "lr": 1e-3}, step) == {"loss": 0.5, "lr": 1e-3}
        tracker.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path / "run")] == [(1, 0.5), (2, 0.5)]


def test_wandb_gets_the_same_numbers(tmp_path: Path, monkeypatch):
    logged = []
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end")
    )
    kinds = {"Image": lambda path: ("picture", path), "Video": lambda path: ("video", path)}
    fake = types.SimpleNamespace(init=lambda **options: logged.append(options["mode"]) or run, **kinds)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker = Tracker(tmp_path, wandb=True, mode="offline")
    tracker.log({"loss": 1}, 3)
    tracker.show([Path("a.png"), Path("b.mp4")], 4)
    tracker.close()
    media = {"samples/a.png": ("picture", "a.png"), "samples/b.mp4": ("video", "b.mp4")}
    assert logged == ["offline", (3, {"loss": 1.0}), (4, media), "end"]


def test_missing_wandb_is_told(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb, or --disable-wandb"):
        Tracker(tmp_path, wandb=True)
