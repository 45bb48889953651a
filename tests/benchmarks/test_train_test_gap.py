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


def test_the_verdict_needs_three_standard_errors_and_no_lost_accuracy():
    steady = summary([figures(100 + noise, 0.9) for noise in (-1, 1)])  # standard error 1
    drifting = summary([figures(110 + noise, 0.9) for noise in (-1, 1)])
    near = summary([figures(104 + noise, 0.9) for noise in (-1, 1)])
    blind = summary([figures(110 + noise, 0.9 + 0.01 * noise) for noise in (-1, 1)])
    alone = summary([figures(200, 0.9)])
    assert beats(steady, drifting)["self_forcing_beats_teacher_forcing"] == 1
    assert beats(steady, near)["self_forcing_beats_teacher_forcing"] == 0  # 4 is less than 3 x sqrt 2
    assert beats(drifting, steady)["self_forcing_beats_teacher_forcing"] == 0
    assert beats(steady, alone)["self_forcing_beats_teacher_forcing"] == 0, "one group has no spread"
    lower = summary([figures(100 + noise, 0.7 + 0.01 * noise) for noise in (-1, 1)])
    assert beats(lower, blind)["self_forcing_beats_teacher_forcing"] == 0
    assert accuracy_drop(lower, blind) == pytest.approx(20)


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
    assert programs == ["scripts/generate_ode_pairs.py", "train.py", "train.py", "train.py"]
    pairs, ode, teacher, dmd = (arguments for _, arguments in launched)
    assert "model_name=models/start" in pairs and "--causal_teacher" in pairs
    assert "max_steps=40" in ode and f"data.path={tmp_path / 'ode_pairs'}" in ode
    assert "configs/puppet_teacher.yaml" in teacher and "max_steps=100" in teacher
    assert "max_steps=60" in dmd and "seed=3" in dmd
    assert f"distillation.real_name={tmp_path / 'runs' / 'teacher' / 'export'}" in dmd
    assert f"model_name={tmp_path / 'runs' / 'puppet_ode_0.4_seed3' / 'export'}" in dmd
    launched.clear()
    assert train_test_gap.trained("self_forcing_sid", 3, args) != model
    assert len(launched) == 2, "the ODE stage is the same run; helpers are there"


def test_a_method_that_is_none_is_refused(tmp_path: Path, tiny_model_folder: Path):
    with pytest.raises(ValueError, match="--given names dmd"):
        run(tmp_path, tiny_model_folder, "--given", "dmd=logs/x")
