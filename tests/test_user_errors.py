"""Mistakes a person makes: each is answered with one sentence that names the way out, and nothing made is lost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import inference
from tests.test_inference import MANY_STEPS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def mistake(tiny_model_folder, tmp_path, monkeypatch, capsys):
    """Run inference.main with a finished video already in the folder; returns the sentence on stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "finished.mp4").write_bytes(b"made yesterday")

    def call(*argv: str, model: str | Path = tiny_model_folder, out: str = "out") -> str:
        prompt = [] if {"--data_path", "--prompt"} & set(argv) else ["--prompt", "a red puppet waves"]
        small = ["num_output_frames=3"] if not any("num_output" in word for word in argv) else []
        sizes = [] if any("height" in word for word in argv) else ["height=32", "width=32"]
        code = inference.main(
            ["--output_folder", out, *prompt, *argv, f"model_name={model}", *MANY_STEPS, *small, *sizes]
        )
        said = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "frame/s" not in line]
        assert code not in (0, None)
        assert len(said) == 1 and said[0].startswith("error: "), said
        assert (tmp_path / "out" / "finished.mp4").read_bytes() == b"made yesterday"
        assert not list((tmp_path / "out").glob("*partial*"))
        return said[0]

    return call


def test_1_a_wrong_path(mistake):
    assert "nowhere.txt: no such file" in mistake("--data_path", "nowhere.txt")
    assert "nowhere.yaml: no such file" in mistake("--config_path", "nowhere.yaml")
    assert "no checkpoint at nowhere.pt" in mistake("--checkpoint_path", "nowhere.pt")
    assert "no video at nowhere.mp4" in mistake("--extend", "nowhere.mp4")


def test_2_an_empty_prompt_file(mistake, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    assert "empty.txt has no prompts; write one per line" in mistake("--data_path", "empty.txt")
    assert "--prompt is empty" in mistake("--prompt", "  ")


def test_3_an_odd_size(mistake):
    assert "height is 100; pixels come in multiples of 16: use 96 or 112" in mistake("height=100")


def test_4_not_enough_memory(mistake):
    sentence = mistake("height=160000", "width=160000")
    assert "not enough memory" in sentence and "GB" in sentence


def test_5_a_bad_yaml_key(mistake, tmp_path):
    (tmp_path / "typo.yaml").write_text("timestep_shfit: 5.0\n")
    assert "no setting 'timestep_shfit'; did you mean 'timestep_shift'?" in mistake("--config_path", "typo.yaml")
    assert "did you mean 'sampling_steps'?" in mistake("sampling_stps=3")


@pytest.fixture
def copy_of_model(tiny_model_folder, tmp_path) -> Path:
    copy = tmp_path / "copy"
    copy.mkdir()
    for part in tiny_model_folder.iterdir():
        (copy / part.name).symlink_to(part)
    return copy


def test_6_a_corrupt_safetensors_file(mistake, copy_of_model):
    for name in ("diffusion_pytorch_model", "Wan2.1_VAE", "models_t5_umt5-puppet"):
        path = copy_of_model / f"{name}.safetensors"
        whole = path.read_bytes()
        path.unlink()
        path.write_bytes(whole[: len(whole) // 2])
        sentence = mistake(model=copy_of_model)
        assert f"{name}.safetensors" in sentence and "damaged or cut off" in sentence
        path.write_bytes(whole)


def test_7_a_wrong_checkpoint(mistake, tmp_path):
    torch.save({"generator": {"model.head.head.weight": torch.zeros(3, 3)}}, tmp_path / "other.pt")
    sentence = mistake("--checkpoint_path", "other.pt")
    assert "other.pt does not fit this model: missing" in sentence
    torch.save({"generator": {}}, tmp_path / "no_ema.pt")
    assert "no generator_ema" in mistake("--checkpoint_path", "no_ema.pt", "--use_ema")
    assert "none is given" in mistake("--use_ema")
    (tmp_path / "text.pt").write_text("hello")
    assert "text.pt" in mistake("--checkpoint_path", "text.pt")


def test_8_frames_that_do_not_split_into_blocks(mistake):
    sentence = mistake("--num_output_frames", "10")
    assert "10 latent frames do not split into blocks of 3; use 9 or 12" in sentence


def test_9_prompts_that_are_not_utf8(mistake, tmp_path):
    (tmp_path / "latin.txt").write_bytes("a puppet\nein Bär\n".encode("latin-1"))
    assert "latin.txt, line 2: byte 14 (0xe4) is not UTF-8" in mistake("--data_path", "latin.txt")


def test_10_no_write_permission(mistake, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "cannot write into file" in mistake(out="file")
    sealed = tmp_path / "sealed"
    sealed.mkdir(mode=0o500)
    forbidden = "/proc/sealed" if os.access(sealed, os.W_OK) else str(sealed / "videos")  # root may write anywhere else
    sentence = mistake(out=forbidden)
    assert f"cannot write into {forbidden}" in sentence and "--output_folder" in sentence


def test_11_an_unknown_model_name(mistake):
    sentence = mistake(model="Wan9.9-T2V")
    assert "no model 'Wan9.9-T2V'" in sentence and "Wan2.1-T2V-1.3B" in sentence
    assert "hf download Wan-AI/Wan2.1-T2V-14B" in mistake(model="Wan2.1-T2V-14B")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA GPU")
def test_12_cuda_where_there_is_none(mistake):
    assert "no CUDA GPU" in mistake("--device", "cuda")
    assert "device is 'toaster'; use auto, cpu, cuda or cuda:N" in mistake("--device", "toaster")


def test_a_damaged_frame_source_is_named(mistake, tmp_path):
    (tmp_path / "text.mp4").write_text("hello")
    assert "text.mp4 cannot be read as a video" in mistake("--extend", "text.mp4")


@pytest.mark.parametrize("entrance", ["inference.py", "demo.py", "train.py"])
def test_every_entrance_answers_plainly_from_a_shell(entrance, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / entrance), "--config_path", "nowhere.yaml"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: nowhere.yaml: no such file") and done.stderr.count("\n") == 1


def test_our_own_mistakes_keep_their_traceback(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def broken(*_):
        raise TypeError("a bug")

    monkeypatch.setattr(inference, "load_pipeline", broken)
    with pytest.raises(TypeError, match="a bug"):
        inference.main(["--prompt", "words"])
