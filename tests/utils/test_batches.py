"""Lists where every line brings its own image, video and seed."""

import json

import pytest

from utils.batches import read_batch
from utils.prompts import Prompt


@pytest.fixture
def files(tmp_path):
    for name in ("a.png", "b.mp4"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def test_jsonl_and_csv_say_the_same(files):
    lines = [{"prompt": "a, red puppet", "image": "a.png", "seed": 7}, {"prompt": "日本語", "video": "b.mp4"}]
    (files / "list.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    (files / "list.csv").write_text(
        '\ufeffprompt,image,video,seed\n"a, red puppet",a.png,,7\n日本語,,b.mp4,\n', encoding="utf-8"
    )
    expected = [
        Prompt("a, red puppet", "a, red puppet", image=files / "a.png", seed=7),
        Prompt("日本語", "日本語", video=files / "b.mp4"),
    ]
    assert read_batch(files / "list.jsonl") == read_batch(files / "list.csv") == expected
    assert len({prompt.key for prompt in expected}) == 2


@pytest.mark.parametrize(
    "name, text, error, message",
    [
        ("x.jsonl", "", ValueError, "lists no videos"),
        ("x.jsonl", '{"prompt": "a"}\n{"prompt": ', ValueError, "line 2: not valid JSON"),
        ("x.jsonl", '["a"]', ValueError, 'line 1: expected {"prompt": "words", ...}'),
        ("x.jsonl", '{"image": "a.png"}', ValueError, "line 1: a line needs a prompt"),
        ("x.jsonl", '{"prompt": "a", "imgae": "a.png"}', ValueError, "did you mean 'image'"),
        ("x.jsonl", '{"prompt": "a", "image": "c.png"}', FileNotFoundError, "line 1: no image at"),
        ("x.jsonl", '{"prompt": "a", "seed": -1}', ValueError, "seed is '-1'"),
        ("x.csv", "prompt,image\na\n", ValueError, "line 2: not as many values"),
        ("x.csv", 'prompt\n"a\n', ValueError, "not valid CSV"),
    ],
)
def test_broken_lists_are_sentences(files, name, text, error, message):
    (files / name).write_text(text)
    with pytest.raises(error) as raised:
        read_batch(files / name)
    assert message in str(raised.value) and name in str(raised.value)
