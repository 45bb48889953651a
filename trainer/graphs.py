"""Passes of small networks as CUDA graphs: the host launches nothing, so the GPU does not wait for it."""

from collections.abc import Callable, Hashable
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.graphs import CudaRecorder
from utils.config import Config, ConfigError
from utils.distributed import SampleRngs
from utils.sharding import Sharding

NUM_EAGER_PASSES = 3  # before the first capture: they compile, and make the gradients' memory
MAX_GRAPHS = 32  # per player; rarer kinds of passes are launched

# (batch, rngs) -> loss and metrics, detached; it has added to the gradients.
Run = Callable[[Any, SampleRngs], tuple[Tensor, dict[str, Tensor]]]


def wants_graphs(config: Config, sharding: Sharding, trainer: str, *, can_graph: bool) -> bool:
    """Whether passes are captured: on CUDA; raises ConfigError where they cannot be."""
    if not config.cuda_graphs:
        return False
    remedy = "set cuda_graphs: false"
    if not can_graph:
        raise ConfigError(f"cuda_graphs: passes of the {trainer} trainer cannot be captured; {remedy}")
    if config.train_text_encoder:
        raise ConfigError(f"cuda_graphs: a text encoder that learns is outside the captured pass; {remedy}")
    if config.gradient_checkpointing:
        raise ConfigError(f"cuda_graphs: recomputation cannot be captured; {remedy}, or gradient_checkpointing: false")
    if sharding.mesh is not None:
        raise ConfigError(
            f"cuda_graphs: gathering weights cannot be captured; {remedy}, or sharding_strategy: no_shard"
        )
    return sharding.ranks.device.type == "cuda"


@dataclass
class Captured:
    """A recorded pass and the memory it reads and writes."""

    replay: Callable[[], None]
    batch: Any
    rngs: SampleRngs
    loss: Tensor
    metrics: dict[str, Tensor]


class GraphedPass:
    """Forward and backward of a player's pass, captured once per kind and replayed on new data in the same memory.

    A kind is what the pass decides on the host (the exit step of a rollout) and the shapes of its batch. The first pass
    of a kind is launched as ever, so that kernels are chosen outside the capture; its second is captured. Gradients
    must stay where they are from one step to the next (LocalParameters.keeps_gradients): a captured pass adds to them.
    """

    def __init__(self, run: Run, device: torch.device):
        self.run = run
        self.recorder = CudaRecorder(device)  # runs every pass on one stream: the one that first makes the gradients
        self.num_launched = 0
        self.seen: set[Hashable] = set()
        self.captured: dict[Hashable, Captured] = {}

    def __call__(self, batch: Any, rngs: SampleRngs, decision: Hashable) -> tuple[Tensor, dict[str, Tensor]]:
        kind = (decision, rngs.num_drawn, *((tensor.shape, tensor.dtype) for tensor in tensors(batch)))
        if kind not in self.captured:
            if self.num_launched < NUM_EAGER_PASSES or kind not in self.seen or len(self.captured) == MAX_GRAPHS:
                self.num_launched += 1
                self.seen.add(kind)
                return self.recorder.run(partial(self.run, batch, rngs))
            self.captured[kind] = self._capture(batch, rngs)
        ours = self.captured[kind]
        for mine, theirs in zip(tensors(ours.batch), tensors(batch), strict=True):
            mine.copy_(theirs)
        ours.rngs.keys.copy_(rngs.keys)
        ours.replay()
        return ours.loss.clone(), {name: value.clone() for name, value in ours.metrics.items()}

    def _capture(self, batch: Any, rngs: SampleRngs) -> Captured:
        batch, rngs, keys = mapped(Tensor.clone, batch), copy(rngs), rngs.keys.clone()
        rngs.keys = keys
        replay, (loss, metrics) = self.recorder.record(partial(self.run, batch, rngs))
        return Captured(replay, batch, rngs, loss, metrics)


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A dataclass of tensors and dataclasses with `function` applied to every tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if is_dataclass(value):
        return type(value)(**{field.name: mapped(function, getattr(value, field.name)) for field in fields(value)})
    return value


def tensors(value: Any) -> list[Tensor]:
    """The tensors in a dataclass, in the order of its fields."""
    found: list[Tensor] = []
    mapped(lambda tensor: found.append(tensor) or tensor, value)
    return found
