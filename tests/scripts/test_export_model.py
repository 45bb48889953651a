"""scripts/export_model.py: published keys from any state, in either form, and mistakes in one sentence."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.scripts.loading import load_script
from utils.checkpointer import Checkpointer
from utils.distributed import Ranks
from utils.training_state import TrainingState, save_compact_state

ROOT = Path(__file__).resolve().parents[2]


def export(*arguments: Path) -> int:
    return load_script(ROOT / "scripts" / "export_model.py").main([str(argument) for argument in arguments])


def state(step: int) -> TrainingState:
    kinds = ["student/weights/generator.model.w", "student/ema/generator.model.w", "critic/weights/model.w"]
    kinds += ["student/weights/text_encoder.w", "student/optimizer/exp_avg/generator.model.w"]
    return TrainingState({name: torch.full((2,), float(step + i)) for i, name in enumerate(kinds)}, {"step": step})


EXPECTED = {"generator": 7.0, "generator_ema": 8.0, "critic": 9.0}


def values(nested: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    assert all(list(part) == ["model.w"] for part in nested.values())
    return {key: part["model.w"][0].item() for key, part in nested.items()}


@pytest.fixture(params=["whole", "compact"])
def run(request, tmp_path: Path) -> Path:
    for step in (5, 7):
        if request.param == "compact":
            save_compact_state(tmp_path / "run", state(step))
        else:
            checkpointer = Checkpointer(tmp_path / "run", Ranks(torch.device("cpu")))
            checkpointer.save(state(step).tensors, state(step).facts)
            checkpointer.wait()
    return tmp_path / "run"


def test_published_keys_in_both_forms(run: Path, tmp_path: Path, capsys):
    assert export(run, tmp_path / "a" / "model.pt") == 0
    assert "step 7 of" in capsys.readouterr().out
    assert values(torch.load(tmp_path / "a" / "model.pt", weights_only=True)) == EXPECTED
    assert export(run, tmp_path / "b.safetensors") == 0
    flat = load_file(tmp_path / "b.safetensors")
    assert {name: t[0].item() for name, t in flat.items()} == {f"{key}.model.w": v for key, v in EXPECTED.items()}
    assert export(run / "training_state" / "step_00000005", tmp_path / "c.pt") == 0
    assert values(torch.load(tmp_path / "c.pt", weights_only=True)) == {k: v - 2 for k, v in EXPECTED.items()}


def test_from_one_form_into_the_other_and_back(run: Path, tmp_path: Path):
    assert export(run, tmp_path / "a.pt") == 0
    assert export(tmp_path / "a.pt", tmp_path / "b.safetensors") == 0
    assert export(tmp_path / "b.safetensors", tmp_path / "c.pt") == 0
    assert values(torch.load(tmp_path / "c.pt", weights_only=True)) == EXPECTED


def test_mistakes_are_told_with_the_way_out(tmp_path: Path, capsys):
    save_compact_state(tmp_path / "vae", TrainingState({"vae/weights/w": torch.zeros(1)}, {"step": 1}))
    save_file({"w": torch.zeros(1)}, tmp_path / "bare.safetensors")
    for source, output, message in (
        (tmp_path / "none", "a.pt", "holds no training_state/; give the --logdir of a training run"),
        (tmp_path / "vae", "a.pt", "this run trained no generator; give an output folder instead of a file"),
        (tmp_path / "bare.safetensors", "a.pt", "holds none of generator, generator_ema, critic"),
        (tmp_path / "bare.safetensors", "folder", "a model folder is made from a run"),
    ):
        assert export(source, tmp_path / output) == 1
        assert message in capsys.readouterr().err
