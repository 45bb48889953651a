"""Many ranks are one process: networks cut by FSDP2, learned, saved, resumed on another number of ranks."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.trainer.toy import ALONE
from tests.trainer.two_networks import SETTINGS, TwoNetworks, assert_close, train, train_on
from utils.config import ConfigError, load_config
from utils.distributed import Ranks
from utils.sharding import Sharding, make_mesh
from utils.training_state import load_training_state


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Five steps in one process, the whole batch at once."""
    folder = tmp_path_factory.mktemp("alone")
    train(folder, "max_steps=5", "batch_size=4", "sharding_strategy=no_shard")
    return folder


def test_four_ranks_then_two_then_one_are_one_process(alone: Path, tmp_path: Path):
    """(2, 2) mesh; one copy over both ranks; whole replicas; alone: each goes on from the other's state."""
    common = "checkpoint.every_steps=1"
    train_on(4, tmp_path, f"max_steps=2 batch_size=1 sharding_strategy=hybrid_full sharding_group_size=2 {common}")
    train_on(
        2,
        tmp_path,
        f"max_steps=3 batch_size=1 sharding_strategy=full gradient_checkpointing=true {common} then "
        f"max_steps=4 batch_size=2 sharding_strategy=no_shard {common}",
    )
    train(tmp_path, "max_steps=5", "batch_size=2", "sharding_strategy=no_shard")
    assert_close(load_training_state(alone).tensors, load_training_state(tmp_path).tensors)
    numbers = [{**json.loads(line)} for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = [{**json.loads(line)} for line in (alone / "metrics.jsonl").read_text().splitlines()]
    for name in ("student/loss", "student/grad_norm", "critic/loss", "critic/grad_norm", "student/size"):
        found = [(line["step"], pytest.approx(line[name], rel=1e-3)) for line in expected if name in line]
        assert [(line["step"], line[name]) for line in numbers if name in line] == found
    assert expected[0]["lr"] == 1e-2 and expected[0]["critic/lr"] == 1e-3
    assert numbers[-1]["eval/size"] == pytest.approx(expected[-1]["eval/size"], rel=1e-3)


def test_shards_in_main_memory_and_their_export(tmp_path: Path):
    train_on(2, tmp_path, "max_steps=3 batch_size=2 sharding_strategy=hybrid_full cpu_offload=true")
    exported = load_file(tmp_path / "export" / "diffusion_pytorch_model.safetensors")
    state = load_training_state(tmp_path).tensors
    assert exported
    for name, tensor in exported.items():
        assert torch.equal(tensor, state[f"student/ema/generator.model.{name}"]), name
    train(tmp_path / "alone", "max_steps=3", "batch_size=4", "sharding_strategy=no_shard")
    assert_close(state, load_training_state(tmp_path / "alone").tensors)


@pytest.fixture
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_compiled_and_checkpointed_blocks_of_a_mesh_of_one(tmp_path: Path, group_of_one):
    options = ["sharding_strategy=full", "compile=true", "gradient_checkpointing=true", "checkpoint.compact=true"]
    train(tmp_path / "cut", "max_steps=1", "batch_size=4", *options)
    train(tmp_path / "whole", "max_steps=1", "batch_size=4", "sharding_strategy=no_shard", "checkpoint.compact=true")
    cut, whole = (load_training_state(tmp_path / name).tensors for name in ("cut", "whole"))
    assert all(tensor.dtype == torch.bfloat16 for tensor in cut.values())
    assert_close(cut, whole, tolerance=4e-3)  # bfloat16 has three digits


def test_gradients_gathered_in_bfloat16_are_float32_ones(tmp_path: Path, group_of_one, monkeypatch):
    """Also those of a critic, which is first used, frozen, in the student's step. CPUs compute in float32 otherwise."""
    monkeypatch.setattr("trainer.layout.Sharding", lambda ranks, mesh, _, offload: Sharding(ranks, mesh, bf16, offload))
    bf16 = torch.bfloat16
    trainer = train(tmp_path, "max_steps=2", "batch_size=4", "sharding_strategy=hybrid_full")
    for learner in trainer.learners:
        parameters = learner.parameters.tensors.values()
        assert {p.dtype for p in parameters} == {torch.float32}
        assert {p.grad.dtype for p in parameters if p.grad is not None} <= {torch.float32}


def test_a_critic_has_a_learning_rate_of_its_own(tmp_path: Path):
    trainer = TwoNetworks(load_config(overrides=[*SETTINGS, "sharding_strategy=no_shard"]), ALONE, tmp_path)
    student, critic = trainer.learners
    assert (student.settings.lr, critic.settings.lr) == (1e-2, 1e-3)
    assert critic.settings.max_grad_norm == student.settings.max_grad_norm == 0.1


def test_settings_that_cannot_work(tmp_path: Path, group_of_one):
    with pytest.raises(ConfigError, match="cpu_offload moves sharded weights, and this run shards none; start it"):
        train(tmp_path, "max_steps=1", "cpu_offload=true", "sharding_strategy=no_shard")
    with pytest.raises(ValueError, match="sharding_group_size 4 does not divide 6 ranks; use one of 1, 2, 3, 6"):
        make_mesh("hybrid_full", Ranks(torch.device("cpu"), 0, 6), 4, ranks_per_node=6)
