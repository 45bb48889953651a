"""Captions: what they claim is true, full ones claim everything, and the tokenizer reads them all."""

import pytest

from world.captions import (
    BACKGROUND_WORDS,
    COLOUR_WORDS,
    captions,
    claims,
    vocabulary_sentences,
)
from world.puppet import ACTIONS, BACKGROUNDS, BODY_COLOURS, PROPS, sample_scenes
from world.tokenizer import build_vocabulary, train_tokenizer


def truth(scenes, i):
    said = {
        "body": BODY_COLOURS[scenes.body[i]],
        "background": BACKGROUNDS[scenes.background[i]],
        "action": ACTIONS[scenes.action[i]],
        "prop": PROPS[scenes.prop[i]],
    }
    return said | ({"prop_colour": BODY_COLOURS[scenes.prop_colour[i]]} if scenes.prop[i] else {})


def test_full_captions_say_everything_and_nothing_else():
    scenes = sample_scenes(600, 0)
    for i, caption in enumerate(captions(scenes, 1, full=True)):
        assert claims(caption) == truth(scenes, i), caption


def test_short_captions_say_nothing_wrong_and_leave_things_unsaid():
    scenes = sample_scenes(600, 2)
    unsaid = 0
    for i, caption in enumerate(captions(scenes, 3)):
        said, true = claims(caption), truth(scenes, i)
        assert all(true[name] == value for name, value in said.items()), caption
        unsaid += len(said) < len(true)
    assert 200 < unsaid < 550


def test_captions_are_repeatable_and_varied():
    scenes = sample_scenes(100, 4)
    assert captions(scenes, 5) == captions(scenes, 5)
    assert captions(scenes, 5)[:7] == captions(scenes.select(slice(0, 7)), 5)
    alike = [a == b for a, b in zip(captions(scenes, 5), captions(scenes, 6), strict=True)]
    assert sum(alike) < 10


def test_no_word_means_two_colours():
    for table in (COLOUR_WORDS, BACKGROUND_WORDS):
        words = [word for synonyms in table.values() for word in synonyms]
        assert len(words) == len(set(words))


def test_the_vocabulary_is_small_and_repeatable():
    vocabulary = build_vocabulary(vocabulary_sentences(3000))
    assert vocabulary == build_vocabulary(vocabulary_sentences(3000))
    assert len(vocabulary) <= 1024
    assert [vocabulary[piece] for piece in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
    assert {"crimson", "lavender", "windmill"} <= set(vocabulary)


def test_the_tokenizer_folder_loads_and_reads_anything(tmp_path):
    transformers = pytest.importorskip("transformers")
    size = train_tokenizer(tmp_path, num_sentences=2000)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert len(tokenizer) == size
    ids = tokenizer("A crimson puppet waves, before a mint wall.").input_ids
    assert ids[-1] == tokenizer.eos_token_id == 1
    assert tokenizer.unk_token_id not in ids
    assert len(ids) == 11
    assert tokenizer.unk_token_id not in tokenizer("Quixotic zebras juggle!").input_ids  # spelled out
    for text in ("", "猫が踊る", "😀 café", "x" * 500):
        assert tokenizer(text).input_ids[-1] == 1
    batch = tokenizer(["red", "a blue puppet"], padding="max_length", max_length=64, truncation=True)
    assert [sum(mask) for mask in batch.attention_mask] == [2, 4]
