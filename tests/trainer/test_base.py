"""trainer/base.py: the equivalences that make a run a run, on a network of 22 numbers."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model.base import Player
from tests import ranks as gloo
from trainer.base import Trainer
from trainer.layout import count_passes
from utils.config import Config, ConfigError, load_config
from utils.distributed import Ranks, SampleRngs, init_distributed, shutdown
from utils.tracking import Tracker
from utils.training_state import load_training_state

ALONE = Ranks(torch.device("cpu"))
TOY = ["sharding_strategy=no_shard", "optimizer.warmup_steps=2", "optimizer.lr=0.05", "logging.log_iters=1"]


class ToyTrainer(Trainer):
    """Learns y = 3 x from samples that are drawn, like all randomness, from their own generators."""

    name = "toy"
    poison_step = None  # the step whose loss is not a number

    def build(self) -> list[Player]:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))
        return [Player("net", self.net, self.loss)]

    def prepare(self, rngs: SampleRngs) -> Tensor:
        return rngs.randn(2)

    def loss(self, x: Tensor, rngs: SampleRngs) -> tuple[Tensor, dict[str, Tensor]]:
        error = (self.net(x) - 3 * x + 0.1 * rngs.randn(2)).square().mean()
        if rngs.step == self.poison_step and rngs.samples.start == 2:
            error = error * torch.tensor(float("nan"))
        return error, {"x": x.detach().mean()}

    def export(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.net.state_dict(), folder / "net.pt")

    def evaluate(self) -> dict[str, float]:
        return {"one": 1.0}


def toy_config(*overrides: str) -> Config:
    return load_config(overrides=[*TOY, *overrides])


def run(
    folder: Path, *overrides: str, trainer: type[Trainer] = ToyTrainer, ranks: Ranks = ALONE, **options
) -> dict[str, Tensor]:
    """Weights, averages and moments after a run."""
    torch.manual_seed(hash(str(folder)) % 2**31)  # nothing may depend on the global generator
    trainer(toy_config(*overrides), ranks, folder, options.pop("tracker", None)).train(**options)
    return load_training_state(folder).tensors


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_it_learns(tmp_path: Path):
    tracker = Tracker(tmp_path)
    run(tmp_path, "max_steps=200", "batch_size=8", tracker=tracker)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["net/loss"] for line in lines if "net/loss" in line]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert lines[-1]["eval/one"] == 1.0
    assert (tmp_path / "export" / "net.pt").is_file()


def test_resumed_is_uninterrupted(tmp_path: Path):
    whole = run(tmp_path / "whole", "max_steps=7", "optimizer.schedule=constant")
    run(tmp_path / "parts", "max_steps=3", "optimizer.schedule=constant")
    parts = run(tmp_path / "parts", "max_steps=7", "optimizer.schedule=constant")
    assert_equal(whole, parts)


def test_compact_state_holds_weights_and_average_only(tmp_path: Path):
    state = run(tmp_path, "max_steps=3", "checkpoint.compact=true")
    assert {name.split("/")[1] for name in state} == {"weights", "ema"}
    assert all(tensor.dtype == torch.bfloat16 for tensor in state.values())
    assert run(tmp_path, "max_steps=4", "checkpoint.compact=true").keys() == state.keys()


def test_accumulated_passes_are_one_large_batch(tmp_path: Path):
    large = run(tmp_path / "large", "max_steps=5", "batch_size=6")
    small = run(tmp_path / "small", "max_steps=5", "batch_size=2", "total_batch_size=6")
    assert_equal(large, small, 1e-6)


def test_two_ranks_are_one_process_with_twice_the_batch(tmp_path: Path):
    one = run(tmp_path / "one", "max_steps=5", "batch_size=4")
    done = gloo.run(__file__, 2, str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert_equal(one, load_training_state(tmp_path / "two").tensors, 1e-6)


def test_bad_gradient_is_skipped_and_named(tmp_path: Path, caplog):
    class Poisoned(ToyTrainer):
        poison_step = 2

    settings = ["optimizer.schedule=constant", "batch_size=2", "total_batch_size=4"]
    good = run(tmp_path / "good", "max_steps=2", *settings)
    bad = run(tmp_path / "bad", "max_steps=3", *settings, trainer=Poisoned)
    for name in good:
        if "/ema/" not in name:
            assert torch.equal(good[name], bad[name]), name
    expected = (
        "step 2: the gradient of net.0.weight is not finite, nor is the loss of samples 2 to 3 of that step; 1 step"
    )
    assert expected in caplog.text


def test_many_bad_gradients_end_the_run_and_keep_the_last_state(tmp_path: Path, monkeypatch):
    class Poisoned(ToyTrainer):
        def loss(self, x, rngs):
            loss, details = super().loss(x, rngs)
            return loss * float("nan"), details

    monkeypatch.setattr("trainer.optimization.MAX_BAD_STEPS", 3)
    good = run(tmp_path, "max_steps=2")
    with pytest.raises(FloatingPointError, match=r"gradient of net\.0\.weight is not finite, .*, and 3 steps after it"):
        run(tmp_path, "max_steps=9", "logging.log_iters=4", trainer=Poisoned)
    assert_equal(good, load_training_state(tmp_path).tensors)


def test_session_and_run_end_on_time(tmp_path: Path):
    run(tmp_path, "max_seconds=1000", "session_seconds=0.001")
    assert load_training_state(tmp_path).facts["step"] == 1
    run(tmp_path, "max_seconds=1")
    assert load_training_state(tmp_path).facts["seconds"] >= 1


def test_a_resumed_run_looks_at_the_clock_in_time(tmp_path: Path):
    run(tmp_path, "max_steps=1000", "logging.log_iters=1000")
    trainer = ToyTrainer(toy_config("max_steps=1002", "logging.log_iters=1000"), ALONE, tmp_path)
    trainer.started -= 60  # this session took a minute to fill its pool and to compile
    trainer.train(save=False)
    assert trainer.last_look == 1002  # not "60 s for 1,001 steps"


def test_a_finished_run_starts_nothing(tmp_path: Path):
    class Starts(ToyTrainer):
        started_at = None

        def start(self):
            self.started_at = self.step

    run(tmp_path, "max_steps=2")
    trainer = Starts(toy_config("max_steps=2"), ALONE, tmp_path)
    trainer.train()
    assert trainer.started_at is None
    trainer = Starts(toy_config("max_steps=3"), ALONE, tmp_path)
    trainer.train()
    assert trainer.started_at == 2


def test_a_player_that_is_not_on_turn_is_reported_too(tmp_path: Path):
    class Slow(ToyTrainer):
        def build(self):
            (player,) = super().build()
            return [Player("net", player.module, self.loss, every=2)]

    run(tmp_path, "max_steps=4", "logging.log_iters=2", trainer=Slow, tracker=Tracker(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "net/loss" in line] == [2, 4]  # it learned in steps 0 and 2


def test_a_failing_evaluation_costs_no_step(tmp_path: Path):
    class Blind(ToyTrainer):
        def evaluate(self):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        run(tmp_path, "max_steps=3", trainer=Blind, tracker=Tracker(tmp_path))
    assert load_training_state(tmp_path).facts["step"] == 3


def test_no_save_writes_no_state(tmp_path: Path):
    ToyTrainer(toy_config("max_steps=2"), ALONE, tmp_path, None).train(save=False)
    assert load_training_state(tmp_path) is None
    assert not (tmp_path / "export").exists()


def test_states_of_other_runs_are_refused(tmp_path: Path):
    class OtherNet(ToyTrainer):
        def build(self):
            self.net = nn.Linear(2, 2)
            return [Player("net", self.net, self.loss)]

    class OtherTrainer(ToyTrainer):
        name = "other"

    run(tmp_path, "max_steps=1")
    with pytest.raises(ValueError, match=r"missing weight .* and 2 more|does not fit"):
        run(tmp_path, "max_steps=2", trainer=OtherNet)
    with pytest.raises(ConfigError, match="toy trainer, not other; choose another --logdir"):
        run(tmp_path, "max_steps=2", trainer=OtherTrainer)


def test_settings_that_cannot_work(tmp_path: Path):
    two = Ranks(torch.device("cpu"), rank=0, size=2)
    with pytest.raises(ConfigError, match="10 does not split into 2 GPU.* x batch_size 2; use 8 or 12"):
        count_passes(toy_config("batch_size=2", "total_batch_size=10"), two)
    assert count_passes(toy_config("batch_size=2", "total_batch_size=12"), two) == 3
    with pytest.raises(ConfigError, match="no_shard"):
        ToyTrainer(toy_config("max_steps=1", "sharding_strategy=hybrid_full"), two, tmp_path)
    with pytest.raises(ConfigError, match="set max_steps or max_seconds"):
        ToyTrainer(toy_config(), ALONE, tmp_path)


def on_two_ranks(arguments: list[str]) -> None:
    run(Path(arguments[0]), "max_steps=5", "batch_size=2", ranks=init_distributed("cpu"))
    shutdown()


if __name__ == "__main__":
    gloo.main(on_two_ranks, [gloo.OPTIMIZER])
