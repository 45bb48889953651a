"""benchmarks/dmd_step.py on the CPU: it runs the trainer's step, and its FLOPs are those that torch counts."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.dmd_step import DMDStep, main, settings_of
from utils.config import load_config
from utils.distributed import Ranks, SampleRngs
from wan.configs import WAN_CONFIGS, WanConfig

TINY = WanConfig(dim=32, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=8, text_dim=8, text_len=8)


@pytest.fixture(autouse=True)
def tiny_sizes(monkeypatch):
    monkeypatch.setitem(WAN_CONFIGS, "tiny", TINY)


def test_it_runs_on_the_cpu_and_writes_where_it_is_told(tmp_path: Path, capsys):
    sizes = ["--model", "tiny", "--height", "32", "--width", "32", "--num_frames", "6", "--matrix_size", "64"]
    assert main([*sizes, "--device", "cpu", "--rounds", "1", "--out", str(tmp_path / "new" / "dmd_step.json")]) == 0
    result = json.loads((tmp_path / "new" / "dmd_step.json").read_text())
    assert result == json.loads(capsys.readouterr().out)
    assert {"mfu", "peak_gb", "generator_step_s", "critic_step_s", "machine"} <= result.keys()
    assert result["generator_step_s"] > 0 and 0 < result["mfu_without_recomputation"] < result["mfu"]
    assert result["shape"] == [1, 6, 16, 4, 4] and len(result["seconds_by_exit_step"]["critic"]) == 4


@pytest.mark.parametrize(
    "settings",
    [[], ["clean_context=false", "model_kwargs.local_attn_size=3"], ["distribution_loss=sid"]],
    ids=str,
)
@pytest.mark.parametrize("exit_step", [0, 3])
def test_counted_flops_are_those_that_run(exit_step: int, settings: list[str], tmp_path: Path):
    arguments = SimpleNamespace(
        model="tiny", teacher=None, critic=None, height=64, width=64, num_frames=6, batch_size=1, device="cpu",
        sharding_strategy="no_shard", no_checkpointing=False, compile=False, overrides=settings,
    )  # fmt: skip
    config = load_config("configs/self_forcing_dmd.yaml", settings_of(arguments))
    trainer = DMDStep(config, Ranks(torch.device("cpu")), tmp_path)
    work = trainer.work()
    expected = (work.generator_step(exit_step), work.critic_step(exit_step))
    for learner, ours in zip(trainer.learners, expected, strict=True):
        rngs = SampleRngs(trainer.step_that_exits_at(exit_step, trainer.learners.index(learner)), range(1))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), trainer.only(learner):
            learner.player.loss(trainer.prepare(rngs), rngs)[0].backward()
        # Ours leaves out the layers that embed times, and counts a gradient of the latents that nobody asks for.
        assert counter.get_total_flops() == pytest.approx(ours, rel=0.04)
