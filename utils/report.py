"""A run's curves from its metrics.jsonl: one HTML page without outside parts, and the same charts as a PNG."""

import base64
import html
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

WIDTH, HEIGHT, MARGIN = 460, 240, 44  # pixels of one chart
COLUMNS = 3
INK, CURVE, FAINT = "#222222", "#1f6fb2", "#c9d9e8"
MAX_POINTS = 600  # of a curve; a longer one is thinned
SMOOTHING = 0.02  # share of the curve that its running mean looks over
NOT_CURVES = ("step", "time", "progress")


@dataclass(frozen=True)
class Curve:
    """One metric over steps."""

    name: str
    steps: list[int]
    values: list[float]

    @property
    def smooth(self) -> list[float]:
        """Mean over the last few per cent of the points."""
        window = max(1, round(SMOOTHING * len(self.values)))
        sums = [0.0]
        for value in self.values:
            sums.append(sums[-1] + value)
        starts = [max(0, i - window) for i in range(1, len(sums))]
        return [(sums[i] - sums[s]) / (i - s) for i, s in zip(range(1, len(sums)), starts, strict=True)]


def read_curves(metrics: str | Path) -> list[Curve]:
    """Every metric of a metrics.jsonl, losses first; of a step that was trained twice the last line counts.

    Raises FileNotFoundError, or ValueError with the number of a line that is no JSON. A last line that was cut off by
    the end of its process is left out.
    """
    path = Path(metrics)
    if not path.is_file():
        raise FileNotFoundError(f"no metrics at {path}; give the run folder of a training run")
    points: dict[str, dict[int, float]] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not JSON ({error.msg}); delete that line") from error
        for name, value in entry.items():
            if name not in NOT_CURVES and isinstance(value, (int, float)) and math.isfinite(value):
                points.setdefault(name, {})[entry["step"]] = float(value)
    curves = [Curve(name, *map(list, zip(*sorted(found.items()), strict=True))) for name, found in points.items()]
    return sorted(curves, key=lambda curve: (not curve.name.endswith("loss"), curve.name))


def write_report(run_dir: str | Path) -> Path:
    """Write report.html and report.png into a run folder from what lies there; returns the page's path."""
    run_dir = Path(run_dir)
    curves = read_curves(run_dir / "metrics.jsonl")
    config = run_dir / "config.yaml"
    settings = config.read_text(encoding="utf-8") if config.is_file() else ""
    samples = sorted((run_dir / "samples").glob("*.png"))[-1:]
    draw_png(curves, run_dir / "report.png")
    page = run_dir / "report.html"
    page.write_text(_page(run_dir.name, curves, settings, samples), encoding="utf-8")
    return page


# --- the page ---


def _page(title: str, curves: Sequence[Curve], settings: str, samples: Iterable[Path]) -> str:
    title = html.escape(title)
    rows = "".join(
        f"<tr><td>{html.escape(c.name)}</td><td>{c.steps[-1]}</td><td>{c.values[-1]:.5g}</td>"
        f"<td>{min(c.values):.5g}</td><td>{max(c.values):.5g}</td></tr>"
        for c in curves
    )
    pictures = "".join(f"<h2>{path.name}</h2><img alt='samples' src='{_inline(path)}'>" for path in samples)
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{title}</title><style>"
        "body{font:14px sans-serif;margin:2em;color:#222}svg{margin:4px}img{max-width:100%}"
        "td,th{padding:2px 12px;text-align:right}td:first-child{text-align:left}</style>"
        f"<h1>{title}</h1>{''.join(_svg(curve) for curve in curves)}"
        f"<table><tr><th>metric</th><th>last step</th><th>last</th><th>least</th><th>most</th></tr>{rows}</table>"
        f"{pictures}<details><summary>settings</summary><pre>{html.escape(settings)}</pre></details></html>\n"
    )


def _inline(picture: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def _svg(curve: Curve) -> str:
    name = html.escape(curve.name)
    faint, clear = (" ".join(f"{x:.1f},{y:.1f}" for x, y in line) for line in _lines(curve))
    labels = "".join(
        f"<text x='{x:.0f}' y='{y:.0f}' font-size='11' text-anchor='{anchor}'>{text}</text>"
        for x, y, anchor, text in _labels(curve)
    )
    return (
        f"<svg width='{WIDTH}' height='{HEIGHT}' role='img' aria-label='{name}'>"
        f"<text x='{MARGIN}' y='16' font-size='13'>{name}</text>"
        f"<rect x='{MARGIN}' y='24' width='{WIDTH - MARGIN - 8}' height='{HEIGHT - 48}' fill='none' stroke='#ddd'/>"
        f"<polyline fill='none' stroke='{FAINT}' points='{faint}'/>"
        f"<polyline fill='none' stroke='{CURVE}' stroke-width='1.6' points='{clear}'/>{labels}</svg>"
    )


# --- the picture ---


def draw_png(curves: Sequence[Curve], path: str | Path) -> None:
    """All charts in one picture."""
    columns = max(1, min(COLUMNS, len(curves)))
    rows = max(1, -(-len(curves) // columns))
    picture = Image.new("RGB", (columns * WIDTH, rows * HEIGHT), "white")
    for number, curve in enumerate(curves):
        chart = Image.new("RGB", (WIDTH, HEIGHT), "white")
        draw = ImageDraw.Draw(chart)
        draw.text((MARGIN, 6), curve.name, fill=INK)
        draw.rectangle((MARGIN, 24, WIDTH - 8, HEIGHT - 24), outline="#dddddd")
        faint, clear = _lines(curve)
        draw.line(faint, fill=FAINT)
        draw.line(clear, fill=CURVE, width=2)
        for x, y, anchor, text in _labels(curve):
            draw.text((x, y), text, fill=INK, anchor={"start": "ls", "end": "rs"}[anchor])
        picture.paste(chart, (number % columns * WIDTH, number // columns * HEIGHT))
    picture.save(path)


# --- what both share ---


def _lines(curve: Curve) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """The curve and its running mean in pixels."""
    keep = range(0, len(curve.steps), max(1, len(curve.steps) // MAX_POINTS))
    low, high, first, last = _range(curve)

    def place(step: int, value: float) -> tuple[float, float]:
        x = MARGIN + (step - first) / max(1, last - first) * (WIDTH - MARGIN - 8)
        return x, HEIGHT - 24 - (value - low) / (high - low) * (HEIGHT - 48)

    lines = ([place(curve.steps[i], values[i]) for i in keep] for values in (curve.values, curve.smooth))
    return tuple([*line, (WIDTH - 8, line[0][1])] if first == last else line for line in lines)  # one value: a level


def _range(curve: Curve) -> tuple[float, float, int, int]:
    """Lowest and highest value, a little apart; first and last step."""
    low, high = min(curve.values), max(curve.values)
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5
    return low, high, curve.steps[0], curve.steps[-1]


def _labels(curve: Curve) -> list[tuple[float, float, str, str]]:
    """x, y, anchor and text of the numbers at the axes."""
    low, high, first, last = _range(curve)
    return [
        (MARGIN - 4, 34, "end", f"{high:.3g}"),
        (MARGIN - 4, HEIGHT - 24, "end", f"{low:.3g}"),
        (MARGIN, HEIGHT - 8, "start", str(first)),
        (WIDTH - 8, HEIGHT - 8, "end", f"step {last}"),
    ]
