"""scripts/extract_lora.py and lora_ckpt: what training changed, kept in a small file and merged where it belongs."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.build import build_pipeline, weights_fingerprint
from tests.scripts.loading import load_script
from utils.config import load_config

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def script():
    return load_script(ROOT / "scripts" / "extract_lora.py")


@pytest.fixture
def tuned(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """The tiny model with every matrix changed by one of rank 3, and every bias a little."""
    shutil.copytree(tiny_model_folder, tmp_path / "tuned")
    generator = torch.Generator().manual_seed(0)
    weights = load_file(tmp_path / "tuned" / WEIGHTS)
    for name, tensor in weights.items():
        if tensor.ndim == 2:
            left, right = (torch.randn(n, 3, generator=generator) for n in tensor.shape)
            weights[name] = tensor + (0.1 * left @ right.T).to(tensor.dtype)
    save_file(weights, tmp_path / "tuned" / WEIGHTS)
    return tmp_path / "tuned"


def generator_of(*settings: str) -> dict[str, torch.Tensor]:
    config = load_config(overrides=["height=32", "width=32", "device=cpu", *settings])
    return build_pipeline(config).generator.model.state_dict()


def test_base_and_update_are_the_tuned_model(script, tiny_model_folder: Path, tuned: Path, tmp_path: Path, capsys):
    file = tmp_path / "update.safetensors"
    assert script.main([str(tiny_model_folder), str(tuned), str(file), "--rank", "3"]) == 0
    assert "holds 100.0% of the change" in capsys.readouterr().out
    base = generator_of(f"model_name={tiny_model_folder}")
    wanted = generator_of(f"model_name={tuned}")
    for settings, scale in (([], 1.0), (["lora_scale=0.5"], 0.5), (["lora_scale=0"], 0.0)):
        merged = generator_of(f"model_name={tiny_model_folder}", f"lora_ckpt={file}", *settings)
        for name, tensor in merged.items():
            expected = base[name] + scale * (wanted[name] - base[name])
            torch.testing.assert_close(tensor, expected, rtol=2e-2, atol=5e-3, msg=lambda m, n=name: f"{n}: {m}")
    shutil.copyfile(file, tuned / "back.safetensors")  # a file of the model folder, by its name alone
    again = generator_of(f"model_name={tuned}", "lora_ckpt=back.safetensors", "lora_scale=-1")
    assert all(torch.allclose(again[name], base[name], rtol=2e-2, atol=5e-3) for name in base)


def test_a_smaller_rank_holds_less(script, tiny_model_folder: Path, tuned: Path, tmp_path: Path, capsys):
    shares = []
    for rank in ("1", "2"):
        assert script.main([str(tiny_model_folder), str(tuned), str(tmp_path / "a.safetensors"), "--rank", rank]) == 0
        shares.append(float(capsys.readouterr().out.split("holds ")[1].split("%")[0]))
    assert 30 < shares[0] < shares[1] < 99


def test_what_cannot_work(script, tiny_model_folder: Path, tuned: Path, tmp_path: Path, capsys):
    def mistake(*arguments: object) -> str:
        assert script.main([str(argument) for argument in arguments]) == 1
        return capsys.readouterr().err

    assert "rank 0" in mistake(tiny_model_folder, tuned, "a.safetensors", "--rank", "0")
    assert "ends in .safetensors" in mistake(tiny_model_folder, tuned, "a.pt")
    (tmp_path / "empty").mkdir()
    shutil.copyfile(tuned / "config.json", tmp_path / "empty" / "config.json")
    assert "no diffusion_pytorch_model*.safetensors" in mistake(tiny_model_folder, tmp_path / "empty", "a.safetensors")
    weights = load_file(tuned / WEIGHTS)
    del weights["head.head.weight"]
    save_file(weights, tuned / WEIGHTS)
    assert "missing head.head.weight" in mistake(tiny_model_folder, tuned, "a.safetensors")


def test_weights_with_an_update_are_other_weights(tuned: Path):
    shutil.copyfile(tuned / WEIGHTS, tuned / "update.safetensors")
    more = ([], ["lora_ckpt=update.safetensors"], ["lora_ckpt=update.safetensors", "lora_scale=0.5"])
    prints = {weights_fingerprint(load_config(overrides=[f"model_name={tuned}", *settings])) for settings in more}
    assert len(prints) == 3


def test_an_update_that_is_missing_or_of_another_model(tiny_model_folder: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="none of that name in .*set lora_ckpt=null"):
        generator_of(f"model_name={tiny_model_folder}", "lora_ckpt=nowhere.safetensors")
    wide = {
        "blocks.0.self_attn.q.lora_A.weight": torch.zeros(1, 999),
        "blocks.0.self_attn.q.lora_B.weight": torch.zeros(9, 1),
    }
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match=r"wide.safetensors: the LoRA changes blocks.0.self_attn.q of \[9, 999\]"):
        generator_of(f"model_name={tiny_model_folder}", f"lora_ckpt={tmp_path / 'wide.safetensors'}")
