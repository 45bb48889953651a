"""Seconds, FLOP/s and memory of the real DMD step: student, critic and teacher at full size with random weights.

    python benchmarks/dmd_step.py --out benchmarks/results/dmd_step.json
    torchrun --nproc_per_node=2 benchmarks/dmd_step.py --teacher Wan2.1-T2V-14B --out dmd_step_x2.json

It is the trainer's own step (trainer/distillation.py): rollout, scores, backward, clipping, AdamW, EMA; only the prompt
embeddings are random. A generator step is the mean over all exit steps, a critic step likewise; a cycle is one
generator step and the critic steps that go with it. FLOPs are counted from the passes that run: recomputation of
checkpointed blocks included in `mfu`, left out in `mfu_without_recomputation`. MFU is of the bf16 matrix product rate
measured on the same device, not of a data sheet.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, the repository is not on the path yet

from trainer.distillation import ScoreDistillationTrainer
from trainer.learner import Learner
from utils.config import load_config
from utils.dataset import Samples, TrainingData
from utils.distributed import Ranks, Rngs, SampleRngs, init_distributed, shutdown
from utils.wan_wrapper import WanDiffusionWrapper
from wan.configs import WAN_CONFIGS, WanConfig

VAE_STRIDE = 8


class RandomWords(TrainingData):
    """Prompt embeddings that mean nothing."""

    def __init__(self, sizes: WanConfig):
        self.sizes = sizes

    def draw(self, rngs: SampleRngs) -> Samples:
        return Samples(prompt_embeds=rngs.randn(self.sizes.text_len, self.sizes.text_dim))


class DMDStep(ScoreDistillationTrainer):
    """The trainer without files: random networks, random words, nothing to encode and nothing to export."""

    def build(self) -> list:
        self.model_config = WAN_CONFIGS[self.config.model_name]
        self.generator = self.build_generator()
        self.vae = SimpleNamespace(spatial_stride=VAE_STRIDE)
        self.open_data()
        return self.make_players()

    def open_data(self) -> None:
        sizes = self.model_config
        self.data, self.negative_words = RandomWords(sizes), Samples()
        self.negative = torch.zeros(1, sizes.text_len, sizes.text_dim, device=self.device)

    def build_network(self, model_name: str, checkpoint=None, *, dtype=torch.float32, **options) -> WanDiffusionWrapper:
        """Weights of a size that lets values move, drawn once and fast: layers' own initialisation takes minutes."""
        options = {name: value for name, value in options.items() if name not in ("use_ema", "from_scratch")}
        sizes = {"from_scratch": True, "model_config": WAN_CONFIGS[model_name], "device": "meta", "dtype": dtype}
        network = WanDiffusionWrapper(model_name, **sizes, **options)
        device = self.sharding.build_device
        if device.type != "meta":
            network.to_empty(device=device)
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.uniform_(-0.03, 0.03)
        network.model.gradient_checkpointing = self.config.gradient_checkpointing
        if self.config.compiles:
            network.model.compile_blocks()
        return network.requires_grad_(True)

    def build_helper(self, model_name: str, checkpoint: str | None, *, dtype=torch.float32, **_) -> WanDiffusionWrapper:
        return self.build_network(model_name, dtype=dtype, timestep_shift=self.config.timestep_shift)

    def step_that_exits_at(self, exit_step: int, stream: int) -> Rngs:
        """The randomness of the first training step whose rollouts leave there."""
        step = 0
        while True:
            rngs = Rngs(self.config.seed, step, self.device, stream)
            _, exit_steps = self.objective.generate.decide(rngs.shared)
            if exit_steps[0] == exit_step:
                return rngs
            step += 1

    def seconds(self, learner: Learner, exit_step: int) -> float:
        """Of one update."""
        rngs = self.step_that_exits_at(exit_step, self.learners.index(learner))
        self.synchronize()
        start = time.perf_counter()
        self.update(learner, rngs)
        self.synchronize()
        return time.perf_counter() - start

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def matrix_flops_per_second(device: torch.device, size: int) -> float:
    """Of a bf16 product of two size x size matrices: the best of ten rounds, as others' work only slows it down."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - start) / 10)
    return 2 * size**3 / best


def measure(trainer: DMDStep, rounds: int, matrix_size: int) -> dict:
    """All figures; one unmeasured step of each kind comes first."""
    generator, critic = trainer.learners
    num_exits = len(trainer.config.denoising_step_list)
    trainer.seconds(generator, num_exits - 1)
    trainer.seconds(critic, num_exits - 1)
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
    seconds = {
        learner.name: [[trainer.seconds(learner, exit_step) for exit_step in range(num_exits)] for _ in range(rounds)]
        for learner in trainer.learners
    }
    generator_s, critic_s = (float(torch.tensor(seconds[name]).mean()) for name in ("student", "critic"))
    rate = matrix_flops_per_second(trainer.device, matrix_size)
    samples = trainer.config.batch_size * trainer.num_passes  # per GPU
    ratio = trainer.config.distillation.dfake_gen_update_ratio
    cycle_s = generator_s + ratio * critic_s
    result = {"generator_step_s": round(generator_s, 4), "critic_step_s": round(critic_s, 4)}
    whole = trainer.work()
    for name, work in (("", whole), ("_without_recomputation", replace(whole, recomputation=False))):
        generator_flops, critic_flops = samples * work.mean_generator_step(), samples * work.mean_critic_step()
        cycle = generator_flops + ratio * critic_flops
        result |= {
            f"mfu{name}": round(cycle / cycle_s / rate, 4),
            f"generator_mfu{name}": round(generator_flops / generator_s / rate, 4),
            f"critic_mfu{name}": round(critic_flops / critic_s / rate, 4),
            f"tflops_per_second{name}": round(cycle / cycle_s / 1e12, 2),
            f"generator_step_tflop{name}": round(generator_flops / 1e12, 4),
            f"critic_step_tflop{name}": round(critic_flops / 1e12, 4),
        }
    result["matrix_tflops_per_second"] = round(rate / 1e12, 2)
    result["seconds_by_exit_step"] = {
        name: [round(s, 4) for s in torch.tensor(rows).mean(0).tolist()] for name, rows in seconds.items()
    }
    result["samples_per_second"] = round(samples * trainer.ranks.size * (1 + ratio) / cycle_s, 4)
    result["peak_gb"] = None
    if trainer.device.type == "cuda":
        result["peak_gb"] = round(torch.cuda.max_memory_allocated(trainer.device) / 1e9, 2)
        result["reserved_gb"] = round(torch.cuda.max_memory_reserved(trainer.device) / 1e9, 2)
    return result


def settings_of(arguments: argparse.Namespace) -> list[str]:
    """Overrides of configs/self_forcing_dmd.yaml."""
    return [
        f"model_name={arguments.model}",
        f"distillation.real_name={arguments.teacher or arguments.model}",
        f"distillation.fake_name={arguments.critic or arguments.model}",
        f"height={arguments.height}",
        f"width={arguments.width}",
        f"num_training_frames={arguments.num_frames}",
        f"batch_size={arguments.batch_size}",
        "total_batch_size=null",
        f"sharding_strategy={arguments.sharding_strategy}",
        f"gradient_checkpointing={'false' if arguments.no_checkpointing else 'true'}",
        f"compile={'true' if arguments.compile else 'false'}",
        f"device={arguments.device}",
        "max_steps=1000000",
        *arguments.overrides,
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Wan2.1-T2V-1.3B", choices=WAN_CONFIGS, help="the student's size")
    parser.add_argument("--teacher", choices=WAN_CONFIGS, help="default: the student's size")
    parser.add_argument("--critic", choices=WAN_CONFIGS, help="default: the student's size")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--num_frames", type=int, default=21, help="latent frames of a rollout")
    parser.add_argument("--batch_size", type=int, default=1, help="per GPU")
    parser.add_argument("--rounds", type=int, default=2, help="measured steps of every kind and exit step")
    parser.add_argument("--sharding_strategy", default="hybrid_full", help="used under torchrun only")
    parser.add_argument("--no_checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--matrix_size", type=int, default=8192, help="of the product that sets the rate")
    parser.add_argument("--out", type=Path, help="where the figures go, beside the screen")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, e.g. clean_context=false")
    arguments = parser.parse_args(argv)
    config = load_config("configs/self_forcing_dmd.yaml", settings_of(arguments))
    ranks = init_distributed(config.device)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(DMDStep(config, ranks, folder), arguments.rounds, arguments.matrix_size)
    report(result | about(arguments, ranks), arguments.out, ranks)
    shutdown()
    return 0


def about(arguments: argparse.Namespace, ranks: Ranks) -> dict:
    """What was measured, and where."""
    is_cuda = ranks.device.type == "cuda"
    return {
        "model": arguments.model,
        "teacher": arguments.teacher or arguments.model,
        "critic": arguments.critic or arguments.model,
        "shape": [arguments.batch_size, arguments.num_frames, 16, arguments.height // 8, arguments.width // 8],
        "num_gpus": ranks.size,
        "sharding_strategy": arguments.sharding_strategy if ranks.size > 1 else "no_shard",
        "gradient_checkpointing": not arguments.no_checkpointing,
        "compile": arguments.compile,
        "overrides": arguments.overrides,
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name(ranks.device) if is_cuda else platform.processor() or "cpu",
    }


def report(result: dict, out: Path | None, ranks: Ranks) -> None:
    if not ranks.is_main:
        return
    text = json.dumps(result, indent=2)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
