"""benchmarks/train_test_gap.py on the CPU: the whole road at toy size, and what its verdict needs."""

import json
from pathlib import Path

import pytest

from benchmarks import train_test_gap
from benchmarks.gap_figures import accuracy_drop, beats, summary
from benchmarks.gap_plot import Point, draw
from utils.config import load_config


def run(folder: Path, models: Path, *more: str) -> dict:
    arguments = ["--toy", "--device", "cpu", "--start", str(models), "--work", str(folder / "work")]
    arguments += ["--out", str(folder / "gap.json"), "--docs", str(folder / "docs"), *more]
    assert train_test_gap.main(arguments) == 0
    return json.loads((folder / "gap.json").read_text())


def test_the_whole_road(tmp_path: Path, tiny_model_folder: Path, monkeypatch):
    methods = ["--methods", "teacher_forcing", "self_forcing_dmd", "--given"]
    methods += [f"{name}={tiny_model_folder}" for name in methods[1:3]]
    report = run(tmp_path, tiny_model_folder, *methods)
    assert list(report["methods"]) == ["ground_truth", "teacher_forcing", "self_forcing_dmd"]
    passes = [report["methods"][name]["passes_per_block"] for name in methods[1:3]]
    assert passes == [2 * (2 + 1), 4 + 1] and report["passes_ratio"] == 1.2
    rows = report["methods"]["teacher_forcing"]["horizons"]
    assert list(rows) == ["0-11"]
    assert all(figure["se"] is not None for row in rows.values() for figure in row.values())
    truth = report["methods"]["ground_truth"]["horizons"]["0-11"]
    assert truth["fwd"]["mean"] < rows["0-11"]["fwd"]["mean"]
    assert report["self_forcing_beats_teacher_forcing"] in (0, 1) and "student_accuracy_drop_points" in report
    assert (tmp_path / "docs" / "train_test_gap.png").stat().st_size > 2000
    assert "| teacher forcing | 0-11 | 6 |" in (tmp_path / "docs" / "train_test_gap.md").read_text()

    def never(*arguments):
        raise AssertionError("measured already")

    monkeypatch.setattr(train_test_gap, "streams", never)  # run again, it reads what it measured
    assert run(tmp_path, tiny_model_folder, *methods) == report


def test_spans_are_pictures_of_latents():
    assert train_test_gap.pixel_span(0, 21) == slice(0, 81)
    assert train_test_gap.pixel_span(21, 63) == slice(81, 249)


def test_passes_of_a_block():
    settings = ["denoising_step_list=[1000,500]", "clean_context=false"]
    assert train_test_gap.passes_per_block(load_config(overrides=settings)) == 2
    assert train_test_gap.passes_per_block(load_config(overrides=["guidance_scale=1", "sampling_steps=8"])) == 9
    assert train_test_gap.passes_per_block(load_config()) == 2 * 17


def figures(fwd: float, accuracy: float) -> dict:
    names = ("colour", "background", "prop", "prop_colour", "action")
    return {"63-251": {"fwd": fwd, "flicker": 0.1, **{f"{name}_accuracy": accuracy for name in names}}}


def groups(fwd: float, accuracy: float, *, noise: float = 1.0, fog: float = 0.0) -> list[dict]:
    """Two sampling seeds. noise: the method's own; fog: the scenes', which every method has."""
    return [figures(fwd + sign * (noise + fog), accuracy + 0.001 * sign * noise) for sign in (-1, 1)]


def wins(champion: list[dict], baseline: list[dict], num_sampling_seeds: int = 2) -> int:
    return beats(champion, baseline, num_sampling_seeds)["self_forcing_beats_teacher_forcing"]


def test_the_verdict_needs_three_standard_errors_and_no_lost_accuracy():
    steady, drifting = groups(100, 0.9, noise=0), groups(110, 0.9)  # a difference of 10 with standard error 1
    assert wins(steady, drifting) == 1
    assert wins(steady, groups(102.9, 0.9)) == 0 and wins(steady, groups(103.1, 0.9)) == 1
    assert wins(drifting, steady) == 0
    assert wins([figures(100, 0.9)], [figures(200, 0.9)], 1) == 0, "one group has no spread"
    lower = groups(100, 0.7, noise=0)
    assert wins(lower, drifting) == 0
    assert accuracy_drop(summary(lower), summary(drifting)) == pytest.approx(20)


def test_what_scenes_have_in_common_is_no_spread():
    """Hard scenes are hard for both; two training seeds count as one."""
    assert wins(groups(100, 0.9, noise=0, fog=50), groups(110, 0.9, fog=50)) == 1
    twice = [*groups(90, 0.9, noise=0, fog=50), *groups(110, 0.9, noise=0, fog=50)]
    assert wins(twice, groups(110, 0.9, fog=50)) == 1 and wins(twice, groups(102, 0.9, fog=50)) == 0


def test_a_plot_of_one_point_has_a_scale(tmp_path: Path):
    path = draw(tmp_path / "plot.png", {"figure": {"method": [Point(1.0, 0.0)]}}, ["0-20"])
    assert path.stat().st_size > 500


def test_helpers_that_are_not_given_are_made_first(tmp_path: Path, monkeypatch):
    launched = []
    monkeypatch.setattr(
        train_test_gap, "launch", lambda program, arguments, args: launched.append((program, arguments))
    )
    args = train_test_gap.parse_args(["--work", str(tmp_path), "--steps", "100", "--start", "models/start"])
    model = train_test_gap.trained("self_forcing_dmd", 3, args)
    programs = [program for program, _ in launched]
    assert programs == ["train.py", "train.py", "train.py"]
    few_steps, teacher, dmd = (arguments for _, arguments in launched)
    assert "max_steps=50" in few_steps and "model_name=models/start" in few_steps
    assert "configs/puppet_teacher.yaml" in teacher and "max_steps=100" in teacher
    assert "max_steps=50" in dmd and "seed=3" in dmd
    assert f"distillation.real_name={tmp_path / 'runs' / 'teacher' / 'export'}" in dmd
    assert f"model_name={tmp_path / 'runs' / 'puppet_consistency_0.5_seed3' / 'export'}" in dmd
    launched.clear()
    assert train_test_gap.trained("self_forcing_sid", 3, args) != model
    assert len(launched) == 2, "the first stage is the same run; helpers are there"
    launched.clear()
    train_test_gap.trained("ode_init", 3, args)
    (script, pairs), (_, ode) = launched
    assert script == "scripts/generate_ode_pairs.py" and "--causal_teacher" in pairs
    assert f"data.path={tmp_path / 'ode_pairs'}" in ode


def test_a_method_that_is_none_is_refused(tmp_path: Path, tiny_model_folder: Path):
    with pytest.raises(ValueError, match="--given names dmd"):
        run(tmp_path, tiny_model_folder, "--given", "dmd=logs/x")
