"""A plot of figures by horizon, one line per method with its standard errors, drawn with PIL alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

INK = ["#c0392b", "#e67e22", "#7f8c8d", "#1f618d", "#16a085", "#8e44ad", "#2c3e50", "#b7950b"]
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 420, 300, 56, 34, 16, 40


@dataclass(frozen=True)
class Point:
    """A mean and its standard error."""

    mean: float
    error: float


def draw(
    path: Path, panels: dict[str, dict[str, Sequence[Point]]], horizons: Sequence[str], *, legend_width: int = 210
) -> Path:
    """panels: title -> method -> one point per horizon. Returns the picture's path."""
    image = Image.new("RGB", (WIDTH * len(panels) + legend_width, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    methods = list(dict.fromkeys(method for lines in panels.values() for method in lines))
    colours = {method: INK[i % len(INK)] for i, method in enumerate(methods)}
    for i, (title, lines) in enumerate(panels.items()):
        _panel(pen, i * WIDTH, title, lines, horizons, colours)
    for i, method in enumerate(methods):
        x, y = WIDTH * len(panels) + 8, TOP + 18 * i
        pen.line([(x, y + 6), (x + 18, y + 6)], fill=colours[method], width=3)
        pen.text((x + 24, y), method.replace("_", " "), fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, optimize=True)
    return path


def _panel(
    pen: ImageDraw.ImageDraw,
    x0: int,
    title: str,
    lines: dict[str, Sequence[Point]],
    horizons: Sequence[str],
    colours: dict[str, str],
) -> None:
    points = [point for line in lines.values() for point in line]
    low, high = min(p.mean - p.error for p in points), max(p.mean + p.error for p in points)
    margin = 0.08 * (high - low) or 1.0
    low, high = low - margin, high + margin
    left, right, bottom = x0 + LEFT, x0 + WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(i: int, value: float) -> tuple[float, float]:
        return (
            left + (right - left) * (i + 0.5) / len(horizons),
            bottom - (bottom - TOP) * (value - low) / (high - low),
        )

    pen.text((left, 10), title, fill="black")
    pen.rectangle([left, TOP, right, bottom], outline="#888888")
    for tick in range(5):
        value = low + (high - low) * tick / 4
        y = place(0, value)[1]
        pen.line([(left, y), (right, y)], fill="#eeeeee")
        pen.text((x0 + 6, y - 6), f"{value:.3g}", fill="black")
    for i, horizon in enumerate(horizons):
        pen.text((place(i, low)[0] - 24, bottom + 8), horizon, fill="black")
    for method, line in lines.items():
        places = [place(i, point.mean) for i, point in enumerate(line)]
        pen.line(places, fill=colours[method], width=2)
        for i, point in enumerate(line):
            top, foot = place(i, point.mean + point.error), place(i, point.mean - point.error)
            pen.line([top, foot], fill=colours[method], width=1)
            x, y = places[i]
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colours[method])
