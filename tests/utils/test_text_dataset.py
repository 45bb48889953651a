"""utils/text_dataset.py: every prompt once per epoch on any split of the batch; captions of puppets without end."""

from pathlib import Path

import pytest
import torch

from utils.dataset import Samples
from utils.distributed import Rngs, SampleRngs
from utils.text_dataset import PuppetCaptions, TextDataset
from world.captions import claims
from world.puppet import ACTIONS, sample_scenes


def draws(step: int, samples: range, stream: int = 0) -> SampleRngs:
    return SampleRngs(Rngs(3, step, torch.device("cpu"), stream), samples)


def letters(texts: list[str]) -> Samples:
    """A tokenizer: character codes, and where there are any."""
    ids = torch.tensor([[ord(letter) for letter in text.ljust(200, "\0")] for text in texts])
    return Samples(ids, (ids > 0).long())


def read(samples: Samples) -> list[str]:
    return ["".join(map(chr, ids)).rstrip("\0") for ids in samples.ids.tolist()]


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_prompts_of_a_file_each_once_per_epoch(tmp_path):
    path = write(tmp_path, "prompts.txt", "a\n\nb\n  c  \n\n")  # blank lines and spaces around are nothing
    dataset = TextDataset.from_file(path, letters, seed=1, samples_per_step=3)
    for step in range(4):
        assert sorted(read(dataset.draw(draws(step, range(3))))) == ["a", "b", "c"]
    again = TextDataset.from_file(path, letters, seed=1, samples_per_step=3)
    parts = [read(again.draw(draws(2, range(i, i + 1))))[0] for i in (2, 0, 1)]
    assert [*parts[1:], parts[0]] == read(dataset.draw(draws(2, range(3))))


def test_extended_prompts_are_learned_in_place_of_short_ones(tmp_path):
    short, long = write(tmp_path, "short.txt", "a\nb\nc\n"), write(tmp_path, "long.txt", "aaa\n\nccc\n")
    dataset = TextDataset.from_file(short, letters, extended_path=long, seed=1, samples_per_step=3)
    assert sorted(read(dataset.draw(draws(0, range(3))))) == ["aaa", "b", "ccc"]


def test_files_that_will_not_do(tmp_path):
    options = {"seed": 1, "samples_per_step": 1}
    with pytest.raises(FileNotFoundError, match="no such file with one prompt per line"):
        TextDataset.from_file(tmp_path / "none.txt", letters, **options)
    with pytest.raises(ValueError, match="has no prompts; write one per line"):
        TextDataset.from_file(write(tmp_path, "empty.txt", " \n\n"), letters, **options)
    (tmp_path / "latin.txt").write_bytes("fine\ncafé".encode("latin-1"))
    with pytest.raises(ValueError, match=r"line 2: byte 8 \(0xe9\) is not UTF-8; save the file as UTF-8"):
        TextDataset.from_file(tmp_path / "latin.txt", letters, **options)
    short, long = write(tmp_path, "short.txt", "a\nb\n"), write(tmp_path, "long.txt", "aaa\n")
    with pytest.raises(ValueError, match="has 1 lines and .* has 2"):
        TextDataset.from_file(short, letters, extended_path=long, **options)


def test_captions_tell_their_scenes_whoever_draws_them():
    data = PuppetCaptions(letters, seed=1, samples_per_step=4)
    texts = read(data.draw(draws(5, range(4), stream=1)))
    assert read(data.draw(draws(5, range(2, 4), stream=1))) == texts[2:]
    assert read(PuppetCaptions(letters, seed=1, samples_per_step=8).draw(draws(2, range(4, 8), stream=1))) == texts
    assert read(data.draw(draws(5, range(4), stream=0))) != texts

    many = PuppetCaptions(letters, seed=1, samples_per_step=64)
    said = [claims(text) for text in many.texts(0, draws(0, range(64)))]
    full = sum({"body", "action", "background", "prop"} <= claim.keys() for claim in said)
    assert 30 <= full <= 62  # half are full, and some of the others say everything too
    assert many.texts(0, draws(0, range(64))) == read(many.draw(draws(0, range(64))))


def test_captions_are_those_of_the_split():
    """What a caption says of its scene is true."""
    from utils.distributed import mix_seed

    data = PuppetCaptions(letters, seed=1, samples_per_step=8, split="heldout")
    texts = data.texts(0, draws(0, range(8)))
    scenes = sample_scenes(8, mix_seed(1, 0), "heldout")
    for text, action in zip(texts, scenes.action.tolist(), strict=True):
        assert claims(text).get("action") in (ACTIONS[action], None)
