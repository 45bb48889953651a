"""A toy of score distillation, and how to train it on one process or on many.

python tests/trainer/two_networks.py RANKS FOLDER key=value ... [then key=value ...]
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from model.base import Player
from tests import ranks as gloo
from tests.trainer.toy import ALONE, SIZES
from trainer.base import Trainer
from utils.conditioning import Conditioning
from utils.config import load_config
from utils.distributed import Ranks, Rngs, SampleRngs, init_distributed, shutdown
from utils.sharding import gathered, whole_state
from utils.tracking import Tracker
from utils.wan_wrapper import WanDiffusionWrapper

SETTINGS = ["optimizer.schedule=constant", "optimizer.warmup_steps=1", "optimizer.lr=1e-2", "logging.log_iters=1"]
SETTINGS += ["optimizer.max_grad_norm=0.1", "critic_optimizer.lr=1e-3", "ema.weight=0.5", "total_batch_size=4"]
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
        if self.config.compiles:
            self.generator.model.compile_blocks(backend="inductor" if self.device.type == "cuda" else "aot_eager")
        torch.manual_seed(4)
        self.mix = nn.Linear(4, 4).to(self.device)
        generator = nn.ModuleDict({"generator": self.generator, "mix": self.mix})
        critic = nn.ModuleDict({"critic": self.critic})
        return [
            Player("student", generator, self.generator_loss, every=2),
            Player("critic", critic, self.critic_loss, is_critic=True),
        ]

    def network(self, seed: int, *, is_causal: bool) -> WanDiffusionWrapper:
        torch.manual_seed(seed)  # and drawn on the CPU: the same wherever the network goes then
        options = {"from_scratch": True, "model_config": SIZES, "num_frame_per_block": 2}
        network = WanDiffusionWrapper("toy", is_causal, **options)
        nn.init.normal_(network.model.head.head.weight, std=0.1)  # a fresh head is zero and would hide everything
        return network.to(self.sharding.build_device)

    def prepare(self, rngs: SampleRngs) -> tuple[Tensor, Conditioning]:
        return rngs.randn(FRAMES, *LATENT), Conditioning(rngs.randn(5, SIZES.text_dim))

    def paint(self, noise: Tensor, prompt: Conditioning) -> Tensor:
        """Two blocks, each in two passes; a clean pass without gradient puts the first one into the cache."""
        cache = self.generator.model.make_kv_cache(len(noise), *LATENT[1:], FRAMES)
        blocks = []
        for block in noise.split(2, dim=1):
            times = torch.full(block.shape[:2], 1000.0, device=noise.device)
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
    ranks = init_distributed("cuda" if "device=cuda" in arguments else "cpu")
    for stage in " ".join(arguments[1:]).split(" then "):
        train(Path(arguments[0]), *stage.split(), ranks=ranks)
    shutdown()


def train_on(num_ranks: int, folder: Path, stages: str) -> None:
    done = gloo.run(__file__, num_ranks, str(folder), *stages.split())
    assert done.returncode == 0, done.stderr


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 5e-5) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


if __name__ == "__main__":
    gloo.main(work, [gloo.OPTIMIZER])
