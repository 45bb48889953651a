"""trainer/text.py: a text encoder that reads captions before any picture is painted."""

import json
from pathlib import Path

import pytest
import torch

from tests.trainer.toy import ALONE, state
from trainer.diffusion import DiffusionTrainer
from trainer.text import ATTRIBUTES, TextTrainer
from utils.config import ConfigError, load_config
from utils.distributed import Ranks, Rngs, SampleRngs
from utils.tracking import Tracker
from wan.configs import WAN_CONFIGS, WanConfig
from wan.modules.text_encoder import TextTokenizer, encode, load_umt5

TOY = [
    "trainer=text", "model_name=reader", "batch_size=8", "sharding_strategy=no_shard", "logging.log_iters=1",
    "text_encoder.d_model=32", "text_encoder.num_layers=2", "text_encoder.num_heads=2", "text_encoder.d_kv=16",
    "text_encoder.d_ff=32", "optimizer.warmup_steps=1", "optimizer.schedule=constant", "ema.weight=0.5",
]  # fmt: skip


@pytest.fixture(autouse=True)
def reader_sizes(monkeypatch):
    sizes = {"dim": 16, "ffn_dim": 32, "num_heads": 2, "num_layers": 2, "in_dim": 4, "out_dim": 4, "freq_dim": 16}
    monkeypatch.setitem(WAN_CONFIGS, "reader", WanConfig(**sizes, text_dim=32, text_len=48))
    monkeypatch.setattr("trainer.text.NUM_EVAL_CAPTIONS", 64)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    from world.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("text") / "tokenizer"
    train_tokenizer(folder, num_sentences=2000, max_length=48)
    return folder


def make_trainer(folder: Path, tokenizer_folder: Path, *overrides: str, ranks: Ranks = ALONE) -> TextTrainer:
    config = load_config(overrides=[*TOY, f"data.tokenizer_folder={tokenizer_folder}", *overrides])
    return TextTrainer(config, ranks, folder, Tracker(folder))


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_captions_become_readable(tmp_path: Path, tokenizer_folder: Path):
    """The background has words of its own, so a few dozen steps suffice; chance is one in eight."""
    settings = ["batch_size=64", "max_steps=60", "optimizer.lr=3e-3", "ema.weight=0"]
    make_trainer(tmp_path, tokenizer_folder, *settings).train(save=False)
    assert lines(tmp_path)[-1]["eval/background"] > 0.5


def test_resumed_is_uninterrupted(tmp_path: Path, tokenizer_folder: Path):
    make_trainer(tmp_path / "whole", tokenizer_folder, "max_steps=4").train(visualize=False)
    make_trainer(tmp_path / "parts", tokenizer_folder, "max_steps=2").train(visualize=False)
    make_trainer(tmp_path / "parts", tokenizer_folder, "max_steps=4").train(visualize=False)
    whole, parts = (state(tmp_path / name) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_ranks_and_passes_share_one_batch(tmp_path: Path, tokenizer_folder: Path):
    """Two ranks of two passes see the captions that one process with the whole batch sees, each once."""
    whole = make_trainer(tmp_path / "whole", tokenizer_folder, "batch_size=8")
    expected = whole.prepare(SampleRngs(Rngs(0, 5, ALONE.device), range(8)))
    seen = []
    for rank in (0, 1):
        part = make_trainer(tmp_path / "part", tokenizer_folder, "batch_size=2", "total_batch_size=4")
        part.ranks, part.num_passes = Ranks(ALONE.device, rank, 2), 2
        for samples in part.passes():
            seen.append((samples.start, part.prepare(SampleRngs(Rngs(0, 5, ALONE.device), samples))))
    seen = [captions for _, captions in sorted(seen, key=lambda pair: pair[0])]
    for name in ATTRIBUTES:
        assert torch.equal(torch.cat([captions.meaning[name] for captions in seen]), expected.meaning[name])


def test_the_transformer_starts_from_its_export(tmp_path: Path, tokenizer_folder: Path, vae_folder: Path):
    trainer = make_trainer(tmp_path / "text", tokenizer_folder, "max_steps=1", "ema.weight=0")
    trainer.train(visualize=False)
    folder = tmp_path / "text" / "export"
    ids, mask = TextTokenizer(folder / "tokenizer", 48)(["a red puppet waves"])
    read = encode(load_umt5(folder / "models_t5_umt5-puppet.safetensors", dtype=torch.float32), ids, mask)
    torch.testing.assert_close(read, encode(trainer.text_encoder, ids, mask).detach(), rtol=0.05, atol=0.05)

    config = load_config(
        overrides=[
            "trainer=diffusion", "model_name=reader", "from_scratch=true", "train_text_encoder=false", "height=32",
            "width=32", "num_training_frames=3", "data.pool_size=2", "data.min_fill=2", "data.encode_batch_size=2",
            "batch_size=2", "max_steps=1", f"data.vae_folder={vae_folder}", f"data.text_encoder_folder={folder}",
        ]
    )  # fmt: skip
    painter = DiffusionTrainer(config, ALONE, tmp_path / "painter")
    torch.testing.assert_close(painter.embed(["a red puppet waves"]).float(), read, rtol=0.05, atol=0.05)
    assert not any("text_encoder" in name for name, _ in painter.players[0].module.named_parameters())
    painter.train(visualize=False)
    copied = tmp_path / "painter" / "export" / "models_t5_umt5-puppet.safetensors"
    assert copied.read_bytes() == (folder / "models_t5_umt5-puppet.safetensors").read_bytes()


def test_settings_that_cannot_work(tmp_path: Path, tokenizer_folder: Path):
    with pytest.raises(ConfigError, match="but reader reads prompts of width 32; set text_encoder.d_model=32"):
        make_trainer(tmp_path, tokenizer_folder, "text_encoder.d_model=16")
    with pytest.raises(ConfigError, match="made for one of WAN_CONFIGS"):
        make_trainer(tmp_path, tokenizer_folder, "model_name=some/folder")


def test_a_kill_while_the_tokenizer_is_copied_leaves_no_torn_one(tmp_path: Path, tokenizer_folder: Path):
    (tmp_path / "export" / "tokenizer").mkdir(parents=True)  # as far as the copy came
    assert make_trainer(tmp_path, tokenizer_folder).tokenizer(["a puppet"])[1].sum() == 3
