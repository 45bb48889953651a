"""scripts/cache_text.py and cache_latents.py: they leave what a run would make itself, and all it needs."""

from pathlib import Path

import pytest
import torch

from tests.scripts.loading import load_script
from utils.shards import Shards
from utils.text_cache import TextCache
from utils.video import write_video
from utils.wan_wrapper import WanTextEncoder, WanVAEWrapper

ROOT = Path(__file__).resolve().parents[2]
cache_text = load_script(ROOT / "scripts" / "cache_text.py").main
cache_latents = load_script(ROOT / "scripts" / "cache_latents.py").main


@pytest.fixture
def config(tmp_path, tiny_model_folder) -> str:
    (tmp_path / "run.yaml").write_text(f"model_name: {tiny_model_folder}\ndevice: cpu\nnegative_prompt: bad\n")
    return str(tmp_path / "run.yaml")


def test_prompts_of_a_run(tmp_path, config, tiny_model_folder, capsys):
    (tmp_path / "prompts.txt").write_text("one\ntwo\none\n")
    (tmp_path / "shown.txt").write_text("three\n")
    words = tmp_path / "words"
    settings = ["data.kind=prompts", f"data.path={tmp_path / 'prompts.txt'}", f"data.text_cache={words}"]
    settings += [f"data.sample_prompts={tmp_path / 'shown.txt'}"]
    assert cache_text(["--config_path", config, *settings]) == 0
    assert "4 of 4 prompts embedded" in capsys.readouterr().out
    assert cache_text(["--config_path", config, *settings]) == 0
    assert "0 of 4 prompts embedded" in capsys.readouterr().out
    asked = ["bad", "one", "two", "three"]
    embeds = TextCache(words, 24, torch.device("cpu"))(asked).prompt_embeds
    assert torch.equal(embeds, WanTextEncoder(str(tiny_model_folder))(asked))


def test_videos_of_a_run(tmp_path, config, tiny_model_folder, capsys):
    folder = tmp_path / "videos"
    for n in range(3):
        write_video(folder / f"{n}.mp4", torch.rand(9 + 8 * n, 3, 32, 32), fps=16)
        (folder / f"{n}.txt").write_text(f"video {n}")
    settings = ["data.kind=videos", f"data.path={folder}", "height=32", "width=32", "num_training_frames=3"]
    assert cache_latents(["--config_path", config, *settings]) == 0
    assert f"4 clips of 3 videos in {folder / 'latents'}" in capsys.readouterr().out  # 9, 17 and 25 frames
    shards = Shards(folder / "latents", "latents")
    size = (folder / "2.mp4").stat().st_size
    assert shards.items[2].row == {"key": "2.mp4", "prompt": "video 2", "num_clips": 2, "bytes": size}
    vae = WanVAEWrapper(str(tiny_model_folder))
    assert shards.read(shards.items[0], "clip0").shape == vae.encode_to_latent(torch.zeros(1, 9, 3, 32, 32)).shape[1:]
    assert cache_text(["--config_path", config, *settings, f"data.text_cache={tmp_path / 'words'}"]) == 0
    assert "4 of 4 prompts embedded" in capsys.readouterr().out


def test_mistakes_are_one_sentence(tmp_path, config, capsys):
    for main, settings, said in [
        (cache_text, ["data.kind=prompts", "data.path=none.txt"], "data.text_cache is not set; say where to"),
        (cache_text, ["data.kind=prompts", "data.path=none.txt", "data.text_cache=x"], "none.txt: no such file"),
        (cache_text, ["data.kind=latents", "data.path=none", "data.text_cache=x"], "none holds no latents"),
        (cache_latents, [], "data.kind is puppet, which needs no encoding; set data.kind=videos"),
        (cache_latents, ["data.kind=videos", "data.path=none"], "none: no such folder"),
    ]:
        assert main(["--config_path", config, *settings]) == 1
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
