"""Many ranks are one process: networks cut by FSDP2, learned, saved, resumed on another number of ranks."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from model.base import Player
from tests import ranks as gloo
from tests.trainer.toy import ALONE, SIZES
from trainer.base import Trainer
from utils.conditioning import Conditioning
from utils.config import ConfigError, load_config
from utils.distributed import Ranks, Rngs, SampleRngs, init_distributed, shutdown
from utils.sharding import gathered, make_mesh, whole_state
from utils.tracking import Tracker
from utils.training_state import load_training_state
from utils.wan_wrapper import WanDiffusionWrapper

SETTINGS = [
    "optimizer.schedule=constant",
    "optimizer.warmup_steps=1",
    "optimizer.lr=1e-2",
    "optimizer.max_grad_norm=0.1",
]
SETTINGS += ["critic_optimizer.lr=1e-3", "ema.weight=0.5", "total_batch_size=4", "logging.log_iters=1"]
FRAMES, LATENT = 4, (4, 4, 4)  # channels, height, width


class TwoNetworks(Trainer):
    """A causal generator with a whole layer beside it learns from a critic and from a frozen teacher.

    As in score distillation: passes without gradient fill a cache, several with gradient follow, one backward.
    """

    name = "two networks"
    can_shard = True

    def build(self) -> list[Player]:
        self.teacher = self.freeze(self.network(1, is_causal=False))
        self.generator, self.critic = self.network(2, is_causal=True), self.network(3, is_causal=False)
        self.generator.model.gradient_checkpointing = self.config.gradient_checkpointing
        if self.config.compile:
            self.generator.model.compile_blocks(backend="aot_eager")
        torch.manual_seed(4)
        self.mix = nn.Linear(4, 4).to(self.device)
        generator = nn.ModuleDict({"generator": self.generator, "mix": self.mix})
        critic = nn.ModuleDict({"critic": self.critic})
        return [
            Player("student", generator, self.generator_loss, every=2),
            Player("critic", critic, self.critic_loss, is_critic=True),
        ]

    def network(self, seed: int, *, is_causal: bool) -> WanDiffusionWrapper:
        torch.manual_seed(seed)
        device = self.sharding.build_device
        network = WanDiffusionWrapper(
            "toy", is_causal, from_scratch=True, model_config=SIZES, num_frame_per_block=2, device=device
        )
        nn.init.normal_(network.model.head.head.weight, std=0.1)  # a fresh head is zero and would hide everything
        return network

    def prepare(self, rngs: SampleRngs) -> tuple[Tensor, Conditioning]:
        return rngs.randn(FRAMES, *LATENT), Conditioning(rngs.randn(5, SIZES.text_dim))

    def paint(self, noise: Tensor, prompt: Conditioning) -> Tensor:
        """Two blocks, each in two passes; a clean pass without gradient puts the first one into the cache."""
        cache = self.generator.model.make_kv_cache(len(noise), *LATENT[1:], FRAMES)
        blocks = []
        for block in noise.split(2, dim=1):
            times = torch.full(block.shape[:2], 1000.0)
            with torch.no_grad():
                _, half = self.generator(block, prompt, times, kv_cache=cache)
            _, x0 = self.generator(half, prompt, times / 2, kv_cache=cache)
            with torch.no_grad():
                self.generator(x0.detach(), prompt, times * 0, kv_cache=cache)
            cache.commit(2)
            blocks.append(x0)
        return torch.einsum("bfchw,dc->bfdhw", torch.cat(blocks, dim=1), self.mix.weight) + self.mix.bias.sum()

    def generator_loss(self, batch: tuple, rngs: SampleRngs) -> tuple[Tensor, dict[str, Tensor]]:
        noise, prompt = batch
        video = self.paint(noise, prompt)
        times = rngs.rand(1).expand(-1, FRAMES) * 1000
        with torch.no_grad():
            (_, fake), (_, real) = (net(video.detach(), prompt, times) for net in (self.critic, self.teacher))
        loss = (video - (video.detach() + real - fake)).square().mean()
        return loss, {"size": video.detach().square().mean()}

    def critic_loss(self, batch: tuple, rngs: SampleRngs) -> tuple[Tensor, dict[str, Tensor]]:
        noise, prompt = batch
        with torch.no_grad():
            video = self.paint(noise, prompt)
        flow, _ = self.critic(video, prompt, rngs.rand(1).expand(-1, FRAMES) * 1000)
        return (flow - noise).square().mean(), {}

    def export(self, folder: Path) -> None:
        weights = whole_state(self.generator.model, self.ranks)
        if self.ranks.is_main:
            self.generator.model.save_pretrained(folder, weights=weights)

    def evaluate(self) -> dict[str, Tensor]:
        noise, prompt = self.prepare(SampleRngs(Rngs(self.config.seed, 999, self.device), range(2)))
        with gathered(self.generator):
            return {"size": self.paint(noise, prompt).square().mean()}


def train(folder: Path, *overrides: str, ranks: Ranks = ALONE) -> TwoNetworks:
    tracker = Tracker(folder) if ranks.is_main else None
    trainer = TwoNetworks(load_config(overrides=[*SETTINGS, *overrides]), ranks, folder, tracker)
    trainer.train()
    return trainer


def work(arguments: list[str]) -> None:
    ranks = init_distributed("cpu")
    for stage in " ".join(arguments[1:]).split(" then "):
        train(Path(arguments[0]), *stage.split(), ranks=ranks)
    shutdown()


def train_on(num_ranks: int, folder: Path, stages: str) -> None:
    done = gloo.run(__file__, num_ranks, str(folder), *stages.split())
    assert done.returncode == 0, done.stderr


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


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


if __name__ == "__main__":
    gloo.main(work)
