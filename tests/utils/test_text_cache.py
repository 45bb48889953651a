"""utils/text_cache.py: the cache says what the encoder said, asks it once, and never speaks for another encoder."""

import shutil
from pathlib import Path

import pytest
import torch

from utils.distributed import Ranks
from utils.text_cache import TextCache, TextEncoderFiles, fill_text_cache
from utils.wan_wrapper import WanTextEncoder
from wan.configs import TEXT_ENCODER_FILES, TOKENIZER_FOLDERS, find_model_file

CPU = torch.device("cpu")
PROMPTS = ["a red puppet waves", "", "a very long prompt " * 20, "eine Puppe tanzt, 跳舞"]


def files(folder: Path) -> TextEncoderFiles:
    weights, tokenizer = (find_model_file(folder, names) for names in (TEXT_ENCODER_FILES, TOKENIZER_FOLDERS))
    return TextEncoderFiles(weights, tokenizer, text_len=24)


def test_it_gives_the_encoders_own_embeddings(tmp_path, tiny_model_folder):
    assert fill_text_cache(tmp_path, PROMPTS, files(tiny_model_folder), Ranks(CPU)) == 4
    cache = TextCache(tmp_path, 24, CPU)
    embeds = cache(PROMPTS).prompt_embeds
    assert embeds.dtype == torch.bfloat16
    assert torch.equal(embeds, WanTextEncoder(str(tiny_model_folder))(PROMPTS))
    assert torch.equal(cache(PROMPTS[::-1]).prompt_embeds, embeds.flip(0))
    lengths = {item.row["prompt"]: item.row["num_tokens"] for item in cache.shards.items}
    assert lengths[""] == 1 and lengths[PROMPTS[2]] == 24  # the end token alone; cut at text_len


def test_the_encoder_is_loaded_only_for_new_prompts(tmp_path, tiny_model_folder, caplog):
    caplog.set_level("INFO")
    for prompts, made, loads in [(PROMPTS, 4, 1), (PROMPTS[:2] * 2, 0, 0), ([*PROMPTS, "one more"], 1, 1)]:
        caplog.clear()
        assert fill_text_cache(tmp_path, prompts, files(tiny_model_folder), Ranks(CPU)) == made
        assert sum("text encoder" in message for message in caplog.messages) == loads
    assert TextCache(tmp_path, 24, CPU)(["one more"]).prompt_embeds.any()


def test_embeddings_of_other_weights_are_refused(tmp_path, tiny_model_folder):
    fill_text_cache(tmp_path / "cache", PROMPTS, files(tiny_model_folder), Ranks(CPU))
    other = tmp_path / "other"
    shutil.copytree(tiny_model_folder, other)
    weights = find_model_file(other, TEXT_ENCODER_FILES)
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(ValueError, match="was made with encoder .* delete this one to make it anew"):
        fill_text_cache(tmp_path / "cache", PROMPTS, files(other), Ranks(CPU))
    shutil.copyfile(find_model_file(tiny_model_folder, TEXT_ENCODER_FILES), weights)
    (find_model_file(other, TOKENIZER_FOLDERS) / "more.json").write_text("{}")
    with pytest.raises(ValueError, match="was made with tokenizer"):
        fill_text_cache(tmp_path / "cache", PROMPTS, files(other), Ranks(CPU))


def test_an_unknown_prompt_is_named(tmp_path, tiny_model_folder):
    fill_text_cache(tmp_path, PROMPTS, files(tiny_model_folder), Ranks(CPU))
    with pytest.raises(ValueError, match="has no embedding of 'a stranger'; add it with scripts/cache_text.py"):
        TextCache(tmp_path, 24, CPU)(["a stranger"])
