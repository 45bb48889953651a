"""From figures of groups to means with standard errors, a verdict, a table and a plot (train_test_gap.py)."""

import statistics
from pathlib import Path

from benchmarks.gap_plot import Point, draw

ACCURACIES = ("colour", "background", "prop", "prop_colour", "action")
FIGURES = ("fwd", *(f"{name}_accuracy" for name in ACCURACIES), "flicker")


def summary(groups: list[dict]) -> dict:
    """horizon -> figure -> mean and standard error over groups."""
    return {
        horizon: {name: mean_and_error([rows[horizon][name] for rows in groups]) for name in FIGURES}
        for horizon in groups[0]
    }


def mean_and_error(values: list[float]) -> dict[str, float]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("inf")
    return {"mean": round(statistics.fmean(values), 5), "se": round(error, 5) if error != float("inf") else None}


def beats(champion: list[dict], baseline: list[dict], num_sampling_seeds: int) -> dict:
    """Whether the champion's FWD at the longest horizon is lower by more than three standard errors, and no accuracy
    there is lower by as much.

    Both were asked for the same scenes under the same sampling seed and measured against the same puppets, which is
    most of what groups differ by: differences are taken seed by seed, after a mean over training seeds.
    """
    horizon = list(champion[0])[-1]

    def gap(name: str, sign: float) -> dict[str, float]:
        ours, theirs = (by_sampling_seed(rows, horizon, name, num_sampling_seeds) for rows in (champion, baseline))
        return mean_and_error([sign * (a - b) for a, b in zip(ours, theirs, strict=True)])

    gaps = {"fwd": gap("fwd", -1.0)} | {f"{name}_accuracy": gap(f"{name}_accuracy", 1.0) for name in ACCURACIES}
    wins = gaps["fwd"]["se"] is not None and gaps["fwd"]["mean"] > 3 * gaps["fwd"]["se"]
    worse = [name for name, value in gaps.items() if value["se"] is not None and value["mean"] < -3 * value["se"]]
    return {"self_forcing_beats_teacher_forcing": int(wins and not worse), "long_horizon_gaps": gaps}


def by_sampling_seed(rows: list[dict], horizon: str, name: str, num_sampling_seeds: int) -> list[float]:
    """A figure under every sampling seed, over all training seeds; groups come training seed by training seed."""
    return [
        statistics.fmean(row[horizon][name] for row in rows[i::num_sampling_seeds]) for i in range(num_sampling_seeds)
    ]


def accuracy_drop(student: dict, teacher: dict) -> float:
    """The largest fall of an accuracy from the many-step teacher to the few-step student over a training clip, in
    points."""
    horizon = next(iter(student))
    names = [f"{name}_accuracy" for name in ACCURACIES]
    return round(max(100 * (teacher[horizon][n]["mean"] - student[horizon][n]["mean"]) for n in names), 3)


def table(results: dict[str, dict], passes: dict[str, int]) -> str:
    """Markdown: a line per method and horizon."""
    heads = ["method", "latents", "passes per block", *(name.replace("_", " ") for name in FIGURES)]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "--:|" * (len(heads) - 2)]
    for method, horizons in results.items():
        for horizon, row in horizons.items():
            cells = [_cell(row[name], 1 if name == "fwd" else 3) for name in FIGURES]
            start = [method.replace("_", " "), horizon, str(passes.get(method, ""))]
            lines.append("| " + " | ".join([*start, *cells]) + " |")
    return "\n".join(lines) + "\n"


def _cell(figure: dict, digits: int) -> str:
    error = "" if figure["se"] is None else f" ± {figure['se']:.{digits}f}"
    return f"{figure['mean']:.{digits}f}{error}"


def plot(path: Path, results: dict[str, dict]) -> Path:
    """FWD, the mean of all accuracies, and flicker, over the horizons."""

    def lines(of) -> dict[str, list[Point]]:
        return {method: [of(row) for row in horizons.values()] for method, horizons in results.items()}

    def single(name: str):
        return lambda row: Point(row[name]["mean"], row[name]["se"] or 0.0)

    def mean_accuracy(row: dict) -> Point:
        parts = [row[f"{name}_accuracy"] for name in ACCURACIES]
        error = sum((part["se"] or 0.0) ** 2 for part in parts) ** 0.5 / len(parts)
        return Point(sum(part["mean"] for part in parts) / len(parts), error)

    panels = {
        "FWD (lower is better)": lines(single("fwd")),
        "mean accuracy": lines(mean_accuracy),
        "flicker, 1/255": lines(single("flicker")),
    }
    return draw(path, panels, [f"{name}" for name in next(iter(results.values()))])
