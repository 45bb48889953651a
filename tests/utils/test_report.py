"""utils/report.py: curves as they were logged, on one page without outside parts and in one picture."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from utils.report import Curve, read_curves, write_report


@pytest.fixture
def run(tmp_path: Path) -> Path:
    lines = [{"step": s, "time": 1.0, "net/loss": 1 / s, "lr": 0.1, "progress": 0.1} for s in range(1, 2001)]
    lines += [{"step": 7, "net/loss": 5.0}, {"step": 2000, "eval/psnr": 30.0, "eval/<bad>": float("nan")}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 20'  # killed while writing
    (tmp_path / "metrics.jsonl").write_text(text)
    (tmp_path / "config.yaml").write_text("prompt: <b>\n")
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "samples" / "step_000010.png")
    return tmp_path


def test_curves_are_what_was_logged(run: Path):
    curves = {curve.name: curve for curve in read_curves(run / "metrics.jsonl")}
    assert list(curves) == ["net/loss", "eval/psnr", "lr"]
    assert curves["net/loss"].values[5:8] == [1 / 6, 5.0, 1 / 8]  # step 7 was trained twice
    assert (curves["eval/psnr"].steps, curves["eval/psnr"].values) == ([2000], [30.0])


def test_the_running_mean():
    curve = Curve("x", list(range(100)), [float(i) for i in range(100)])
    assert curve.smooth[:3] == [0.0, 0.5, 1.5]  # over two points


def test_the_page_stands_alone(run: Path):
    page = write_report(run).read_text()
    assert page.count("<svg") == 3
    assert "data:image/png;base64," in page
    assert "&lt;b&gt;" in page
    assert not re.search(r"(src|href)=.(?!data:)", page)
    assert all(len(points.split()) < 1300 for points in re.findall(r"points='([^']*)'", page))
    with Image.open(run / "report.png") as picture:
        assert picture.size == (3 * 460, 240)
        assert len(picture.getcolors(maxcolors=10_000)) > 3


def test_what_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="give the run folder of a training run"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        write_report(tmp_path)
