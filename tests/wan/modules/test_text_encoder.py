"""umT5 under Wan's names, Wan's text cleaning, and tokenizer folders."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.golden_data import load_golden
from wan.modules.text_encoder import TextTokenizer, clean_text, encode, load_umt5, new_umt5, save_umt5, to_wan_names

SIZES = {"vocab_size": 97, "d_model": 32, "d_kv": 12, "d_ff": 56, "num_layers": 2, "num_heads": 4}


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_golden("d_umt5")[0]


@pytest.fixture(scope="module")
def weights(golden) -> dict[str, torch.Tensor]:
    return {name[2:]: tensor for name, tensor in golden.items() if name.startswith("w.")}


@pytest.fixture
def weight_file(tmp_path, weights) -> Path:
    path = tmp_path / "models_t5_umt5-tiny.safetensors"
    save_file(weights, path)
    path.with_suffix(".json").write_text(json.dumps(SIZES))
    return path


@pytest.mark.parametrize("case", ["masked", "long"])
def test_matches_golden(golden, weight_file, case):
    model = load_umt5(weight_file, dtype=torch.float32)
    prompt_embeds = encode(model, golden[f"{case}.ids"], golden[f"{case}.mask"])
    torch.testing.assert_close(prompt_embeds, golden[f"{case}.prompt_embeds"], atol=1e-5, rtol=1e-5)
    assert (prompt_embeds[golden[f"{case}.mask"] == 0] == 0).all()


def test_wan_names_go_both_ways(weights, weight_file, tmp_path):
    model = load_umt5(weight_file, dtype=torch.float32)
    renamed = to_wan_names(model.state_dict())
    assert renamed.keys() == weights.keys()
    assert all(torch.equal(renamed[name], weights[name]) for name in weights)
    path = tmp_path / "again.pth"
    torch.save(renamed, path)
    path.with_suffix(".json").write_text(json.dumps(SIZES))
    again = load_umt5(path)
    assert again.dtype == torch.bfloat16
    assert again.shared.weight is again.encoder.embed_tokens.weight
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_a_new_encoder_comes_back_from_disk(golden, tmp_path):
    torch.manual_seed(0)
    model = new_umt5(**SIZES)
    save_umt5(model, tmp_path / "models_t5_umt5-new.safetensors", torch.float32)
    again = load_umt5(tmp_path / "models_t5_umt5-new.safetensors", dtype=torch.float32)
    ids, mask = golden["masked.ids"], golden["masked.mask"]
    torch.testing.assert_close(encode(again, ids, mask), encode(model.eval(), ids, mask))
    assert model.config.dropout_rate == 0


def test_a_new_encoder_looks_at_neighbours_first():
    """Near tokens weigh more than far ones, on both sides, in the first head most; no head is blind to any distance."""
    for block in new_umt5(**SIZES).encoder.block:
        attention = block.layer[0].SelfAttention
        bias = attention.compute_bias(9, 9)[0, :, 4]  # [heads, 9]: what the middle token adds to its scores
        assert torch.equal(bias, bias.flip(1))
        assert (bias[:, 4:].diff(dim=1) < 0).all()
        assert (bias[:-1, 8] < bias[1:, 8]).all()
        assert bias.isfinite().all()


def test_gradient_flows_from_real_rows_only(golden, weight_file):
    model = load_umt5(weight_file, dtype=torch.float32).requires_grad_(True)
    ids, mask = golden["masked.ids"], golden["masked.mask"]
    encode(model, ids, mask).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())
    padding_only = sorted(set(ids[mask == 0].tolist()) - set(ids[mask == 1].tolist()))
    assert (model.shared.weight.grad[padding_only] == 0).all()


def test_padding_does_not_matter(golden, weight_file):
    model = load_umt5(weight_file, dtype=torch.float32)
    ids, mask = golden["masked.ids"], golden["masked.mask"]
    wide = torch.nn.functional.pad(ids, (0, 40)), torch.nn.functional.pad(mask, (0, 40))
    embeds = encode(model, *wide)
    assert embeds.shape == (2, 64, 32)
    torch.testing.assert_close(embeds[:, :24], encode(model, ids, mask), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(encode(model, *wide, longest=64), embeds, atol=1e-6, rtol=1e-6)
    assert (encode(model, ids[:1], torch.zeros_like(mask[:1])) == 0).all()


def test_load_names_what_does_not_fit(weights, weight_file):
    save_file({name: tensor for name, tensor in weights.items() if name != "norm.weight"}, weight_file)
    with pytest.raises(ValueError, match=r"models_t5_umt5-tiny\.safetensors.*missing norm\.weight \[32\]"):
        load_umt5(weight_file)
    save_file(weights | {"blocks.0.attn.q.bias": torch.zeros(48)}, weight_file)
    with pytest.raises(ValueError, match=r"unexpected blocks\.0\.attn\.q\.bias"):
        load_umt5(weight_file)
    weight_file.with_suffix(".json").write_text(json.dumps({"d_model": 32}))
    with pytest.raises(ValueError, match="lack d_ff, d_kv, num_heads, num_layers, vocab_size"):
        load_umt5(weight_file)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_umt5(weight_file.with_name("nowhere.pth"))


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a  red\n\tball ", "a red ball"),
        ("cats &amp;amp; dogs", "cats & dogs"),
        ("&lt;b&gt;bold&lt;/b&gt;", "<b>bold</b>"),
        ("", ""),
    ],
)
def test_text_is_cleaned_as_wan_does(text, cleaned):
    assert clean_text(text) == cleaned


def test_mojibake_is_repaired():
    pytest.importorskip("ftfy")
    assert clean_text("a cafÃ© terrace") == "a café terrace"


def test_cleaning_needs_no_ftfy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert clean_text("a &amp; b") == "a & b"


@pytest.fixture
def tokenizer_folder(tmp_path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "a", "red", "ball"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_tokenizer_pads_cuts_and_ends(tokenizer_folder):
    ids, mask = TextTokenizer(tokenizer_folder, text_len=5)(["a  red ball", "", "a red red red red red ball"])
    assert ids.tolist() == [[3, 4, 5, 1, 0], [1, 0, 0, 0, 0], [3, 4, 4, 4, 1]]
    assert mask.tolist() == [[1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert ids.dtype == mask.dtype == torch.int64


def test_missing_tokenizer_says_where_it_should_be(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer_config\.json in .*google/umt5-xxl/"):
        TextTokenizer(tmp_path, text_len=5)
