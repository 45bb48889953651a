"""What a run will take, before its first step: memory per GPU, tensor by tensor, and time from counted FLOPs."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from trainer.learner import Learner
from utils.sharding import Sharding, local
from wan.configs import WanConfig
from wan.modules.model import WanModel

# Dense bfloat16 FLOP/s that data sheets name, by a part of the name that CUDA gives the card.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
}
ASSUMED_GPU = "H100"  # when the run is on none that is known
UTILISATION = 0.4  # share of the peak that a large transformer reaches in practice


@dataclass(frozen=True)
class TrainingPlan:
    """Bytes of one GPU by what they hold, bytes offloaded to main memory, and FLOPs of one step on one GPU."""

    memory: dict[str, int]
    offloaded: dict[str, int] = field(default_factory=dict)
    flops: float | None = None
    gpu: str = ASSUMED_GPU
    capacity: int | None = None  # bytes of the GPU

    @property
    def seconds_per_step(self) -> float | None:
        return None if self.flops is None else self.flops / (PEAK_FLOPS[self.gpu] * UTILISATION)

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.capacity is None or self.total <= self.capacity

    def lines(self) -> list[str]:
        """memory per GPU: student weights 0.06 GB, ..., in all 0.31 GB"""
        lines = [f"memory per GPU: {_parts(self.memory)}; in all {_size(self.total)}"]
        if self.offloaded:
            lines.append(f"in main memory, per GPU: {_parts(self.offloaded)}")
        if not self.fits:
            lines.append(
                f"that is more than the {_size(self.capacity)} of this GPU: shard over more of them "
                "(sharding_group_size), or set gradient_checkpointing: true, cpu_offload: true or a smaller batch_size"
            )
        if self.flops is None:
            lines.append("time: the FLOPs of this recipe are not counted")
        else:
            lines.append(
                f"time: {self.flops / 1e12:.3g} TFLOP per step and GPU, {self.seconds_per_step:.3g} s/step on one "
                f"{self.gpu} at {UTILISATION:.0%} of its {PEAK_FLOPS[self.gpu] / 1e12:.0f} TFLOP/s"
            )
        return lines


def plan_training(
    learners: Iterable[Learner],
    helpers: Iterable[nn.Module],
    sharding: Sharding,
    *,
    activations: int = 0,
    flops: float | None = None,
) -> TrainingPlan:
    """helpers: networks that do not learn. activations: bytes that a pass keeps for its backward. flops: of a step."""
    memory: dict[str, int] = {}
    offloaded: dict[str, int] = {}

    def add(what: str, tensor: Tensor, times: int = 1) -> None:
        """An offloaded shard lies in main memory, whatever the mesh computes on."""
        home = offloaded if sharding.offload and isinstance(tensor, DTensor) else memory
        home[what] = home.get(what, 0) + times * local(tensor).nbytes

    learners, seen = list(learners), set()
    for learner in learners:
        copies = {"weights": 1, "gradients": 1, "moments": 2, "average": 1 if learner.ema is not None else 0}
        for what, times in copies.items():
            for source in learner.parameters.sources.values():
                add(f"{learner.name} {what}", source, times)
        seen.update(id(source) for source in learner.parameters.sources.values())
    for helper in helpers:
        for tensor in (*helper.parameters(), *helper.buffers()):
            if id(tensor) not in seen:
                add("frozen networks", tensor)
                seen.add(id(tensor))
    modules = [*(learner.player.module for learner in learners), *helpers]
    transformers = {m for module in modules for m in module.modules() if isinstance(m, WanModel)}
    memory["gathered weights"] = max((_gathered(t, sharding) for t in transformers), default=0)
    memory["activations"] = activations
    gpu, capacity = _gpu(sharding.ranks.device)
    memory, offloaded = ({name: size for name, size in part.items() if size} for part in (memory, offloaded))
    return TrainingPlan(memory, offloaded, flops, gpu, capacity)


def activation_bytes(config: WanConfig, num_tokens: int, *, checkpointing: bool) -> int:
    """What one pass over num_tokens video tokens (of all samples) keeps for its backward, in bfloat16 mixed precision.

    An eager block keeps about 77 bytes per token and channel and 5 per hidden channel of the feed-forward (counted with
    autograd's saved-tensor hooks); compiled, less. With checkpointing only what enters each block, and one whole block.
    """
    block = num_tokens * (77 * config.dim + 5 * config.ffn_dim)
    if not checkpointing:
        return config.num_layers * block
    return config.num_layers * num_tokens * config.dim * 2 + block


def _gathered(transformer: WanModel, sharding: Sharding) -> int:
    """Bytes of a sharded transformer that are whole at a time: a block, the next one, and what is around them."""
    if not isinstance(transformer, FSDPModule):
        return 0
    size, blocks = (sharding.compute_dtype or torch.float32).itemsize, transformer.blocks
    block = sum(p.numel() for p in blocks[0].parameters())
    rest = sum(p.numel() for p in transformer.parameters()) - block * len(blocks)
    return size * (min(2, len(blocks)) * block + rest)


def _gpu(device: torch.device) -> tuple[str, int | None]:
    """The known card that this run is on, or the assumed one; and its memory."""
    if device.type != "cuda":
        return ASSUMED_GPU, None
    properties = torch.cuda.get_device_properties(device)
    known = next((name for name in PEAK_FLOPS if name in properties.name), ASSUMED_GPU)
    return known, properties.total_memory


def _parts(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {_size(size)}" for name, size in sizes.items())


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
