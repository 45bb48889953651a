"""The benchmark's road from a model folder to figures, on random networks: sections, resuming, pictures."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from world.judges import Judges, save_judges

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("embedded_model", ROOT / "benchmarks" / "embedded_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(tiny_model_folder, tmp_path):
    torch.manual_seed(0)
    save_judges(Judges(), tmp_path / "judges")
    return [
        "--device", "cpu", "--threads", "1", "--judges", str(tmp_path / "judges"),
        "--out", str(tmp_path / "figures.json"),
        "--num_prompts", "2", "--num_streams", "0", "--num_gate_clips", "1", "--batch_size", "2", "--num_latents", "12",
        "--sheets", str(tmp_path / "docs"), "--set", "lora_ckpt=null", "denoising_step_list=[1000]",
        f"model_name={tiny_model_folder}",
    ]  # fmt: skip


def test_all_sections_are_measured_once_and_kept(benchmark, arguments, tmp_path, capsys):
    assert benchmark.main(arguments) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    for name in ("colour_accuracy", "background_accuracy", "prop_accuracy", "action_accuracy"):
        assert 0 <= figures[name] <= 1
    for name in ("fwd", "vae_psnr", "vae_roundtrip_pck05", "cpu_fps", "n", "seeds", "machine"):
        assert name in figures
    assert set(figures["prompts"]["columns"]) == {"ground truth", "VAE round trip", "model"}
    assert (tmp_path / "docs" / "embedded_model.png").is_file()
    assert "| fwd |" in capsys.readouterr().out

    assert benchmark.main(arguments) == 0  # everything is there already
    assert "| fwd |" not in capsys.readouterr().out

    assert set(figures["vae_gate"]["gate"]) == set(benchmark.GATE)
    assert benchmark.main(["--vae_only", *arguments]) == 1  # a random VAE does not pass, and the exit code says so

    save_judges(Judges(), tmp_path / "judges")  # other weights in the same place: old figures are not theirs
    report, settings = benchmark.Report(tmp_path / "figures.json", overwrite=False), figures["prompts"]["settings"]
    weights = benchmark.fingerprint(Path(arguments[-1].removeprefix("model_name=")), tmp_path / "judges")
    assert report.has("prompts", settings) and not report.has("prompts", settings | {"weights": weights})
