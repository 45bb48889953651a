"""A pass of a small network as one CUDA graph: the host launches nothing, so the GPU does not wait for it."""

from collections.abc import Callable
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from utils.config import Config, ConfigError
from utils.distributed import SampleRngs
from utils.sharding import Sharding

NUM_EAGER_PASSES = 3  # before the capture: they compile, choose kernels, and make the gradients' memory


def wants_graphs(config: Config, sharding: Sharding, trainer: str, *, can_graph: bool) -> bool:
    """Whether passes are captured; raises ConfigError where they cannot be. Without CUDA there is nothing to capture."""
    if not config.cuda_graphs:
        return False
    remedy = "set cuda_graphs: false"
    if not can_graph:
        raise ConfigError(f"cuda_graphs: passes of the {trainer} trainer decide on the host what they do; {remedy}")
    if config.train_text_encoder:
        raise ConfigError(f"cuda_graphs: a text encoder that learns is outside the captured pass; {remedy}")
    if config.gradient_checkpointing:
        raise ConfigError(f"cuda_graphs: recomputation cannot be captured; {remedy}, or gradient_checkpointing: false")
    if sharding.mesh is not None:
        raise ConfigError(f"cuda_graphs: gathering weights cannot be captured; {remedy}, or sharding_strategy: no_shard")
    return sharding.ranks.device.type == "cuda"


class GraphedPass:
    """Forward and backward of a pass, captured once and replayed on new data in the same memory.

    run(batch, rngs) -> (loss, metrics), both detached, adds to the gradients; these must stay where they are from one
    step to the next (LocalParameters.keeps_gradients). What `run` decides on the host stays decided. A batch of
    another shape than the captured one runs as it comes.
    """

    def __init__(self, run: Callable[[Any, SampleRngs], tuple[Tensor, dict[str, Tensor]]], device: torch.device):
        self.run = run
        self.stream = torch.cuda.Stream(device)  # of every pass: a gradient belongs to the stream that first made it
        self.num_eager = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Any, rngs: SampleRngs) -> tuple[Tensor, dict[str, Tensor]]:
        if self.graph is None and self.num_eager == NUM_EAGER_PASSES:
            self._capture(batch, rngs)
        if self.graph is None or self._signature(batch, rngs) != self.signature:
            self.num_eager += 1
            return self._eager(batch, rngs)
        for ours, theirs in zip(tensors(self.batch), tensors(batch), strict=True):
            ours.copy_(theirs)
        self.rngs.keys.copy_(rngs.keys)
        self.graph.replay()
        return self.loss.clone(), {name: value.clone() for name, value in self.metrics.items()}

    def _eager(self, batch: Any, rngs: SampleRngs) -> tuple[Tensor, dict[str, Tensor]]:
        main = torch.cuda.current_stream()
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            result = self.run(batch, rngs)
        main.wait_stream(self.stream)
        return result

    def _capture(self, batch: Any, rngs: SampleRngs) -> None:
        self.signature = self._signature(batch, rngs)
        self.batch, self.rngs = mapped(Tensor.clone, batch), copy(rngs)
        self.rngs.keys = rngs.keys.clone()
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog asks its events from a thread of its own, which is none of the capture's business.
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            self.loss, self.metrics = self.run(self.batch, self.rngs)

    def _signature(self, batch: Any, rngs: SampleRngs) -> tuple:
        """What a replay cannot change: shapes, and how many numbers were drawn before."""
        return (rngs.num_drawn, *((tensor.shape, tensor.dtype) for tensor in tensors(batch)))


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
