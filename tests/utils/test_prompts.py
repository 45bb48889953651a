"""Prompt files as people write them, and seeds that depend on the words alone."""

import json
from pathlib import Path

import pytest
from PIL import Image

from utils.prompts import Prompt, read_image_prompts, read_prompts, video_seed
from world.captions import claims

PROMPTS = Path(__file__).parents[2] / "prompts"


def texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


def test_blank_lines_marks_and_windows_line_ends(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffa puppet waves\r\n\r\n  日本語の人形 \r\nfeed\u2028line\r\n\r\n".encode())
    assert texts(read_prompts(tmp_path / "p.txt")) == ["a puppet waves", "日本語の人形", "feed\u2028line"]


def test_not_utf8_names_line_and_byte(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(ValueError, match=r"p\.txt, line 2: byte 8 \(0xe9\) is not UTF-8; save the file as UTF-8"):
        read_prompts(tmp_path / "p.txt")


def test_missing_folder_and_empty(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file with one prompt per line"):
        read_prompts(tmp_path / "absent.txt")
    with pytest.raises(FileNotFoundError, match="a folder; give a text file"):
        read_prompts(tmp_path)
    (tmp_path / "empty.txt").write_text("\n  \n")
    with pytest.raises(ValueError, match="has no prompts"):
        read_prompts(tmp_path / "empty.txt")


def test_extended_lines_steer_and_short_ones_name(tmp_path):
    (tmp_path / "short.txt").write_text("a cat\n\na dog\n")
    (tmp_path / "long.txt").write_text("a cat on a roof\n\na dog in the rain\n")
    prompts = read_prompts(tmp_path / "short.txt", tmp_path / "long.txt")
    assert [(prompt.name, prompt.text) for prompt in prompts] == [
        ("a cat", "a cat on a roof"),
        ("a dog", "a dog in the rain"),
    ]
    (tmp_path / "long.txt").write_text("a cat on a roof\n")
    with pytest.raises(ValueError, match="has 1 lines and .* has 3"):
        read_prompts(tmp_path / "short.txt", tmp_path / "long.txt")


def test_images_with_captions_in_three_layouts(tmp_path):
    def image(name: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)

    for name in ("pairs/b.jpg", "pairs/a.png", "list/x.png", "crops/16-9/c.png"):
        image(name)
    (tmp_path / "pairs/a.txt").write_text("first\n")
    (tmp_path / "pairs/b.txt").write_text("second")
    (tmp_path / "list/all.jsonl").write_text(json.dumps({"image": "x.png", "prompt": "third"}) + "\n\n")
    (tmp_path / "crops/target_crop_info_16-9.json").write_text(
        json.dumps([{"file_name": "c.png", "caption": "fourth"}])
    )
    assert texts(read_image_prompts(tmp_path / "pairs")) == ["first", "second"]
    assert texts(read_image_prompts(tmp_path / "list")) == ["third"]
    assert texts(read_image_prompts(tmp_path / "list/all.jsonl")) == ["third"]
    assert read_image_prompts(tmp_path / "crops")[0].image == tmp_path / "crops/16-9/c.png"


def test_broken_image_lists_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_image_prompts(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no images"):
        read_image_prompts(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match=r"a\.txt"):
        read_image_prompts(tmp_path)
    (tmp_path / "list.jsonl").write_text('{"image": "a.png"}\n')
    with pytest.raises(ValueError, match=r"list\.jsonl, line 1"):
        read_image_prompts(tmp_path)
    (tmp_path / "list.jsonl").write_text('{"image": "gone.png", "prompt": "words"}\n')
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        read_image_prompts(tmp_path)


def test_the_puppet_prompts_speak_the_words_of_the_world():
    for prompt in read_prompts(PROMPTS / "puppet_world.txt"):
        assert {"body", "background", "action"} <= claims(prompt.text).keys(), prompt.text
    assert len(read_prompts(PROMPTS / "cinematic.txt")) == 30


def test_a_seed_is_of_seed_prompt_and_sample():
    seeds = {video_seed(seed, prompt, sample) for seed in (0, 1) for prompt in ("a", "b") for sample in (0, 1)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**53 for seed in seeds)
    assert video_seed(0, "a red puppet waves", 0) == 2878317761944710  # for ever: videos are named by it
