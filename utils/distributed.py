"""Ranks, devices, replicated gradients, and randomness that does not know how many GPUs there are."""

import logging
import math
import os
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from world.hashing import hash_int, hash_tensor, normal, uniform

logger = logging.getLogger(__name__)

BUCKET_ELEMENTS = 64 * 2**20  # 256 MB of float32 gradients per all-reduce


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def resolve_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """The device a config names: auto (CUDA if there is one), cpu, cuda (this rank's GPU), cuda:N."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}; use auto, cpu, cuda or cuda:N") from None
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"device is {name!r} but torch finds no CUDA GPU here; use device=cpu or device=auto")
    index = local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"there is no GPU {index}: this machine has {torch.cuda.device_count()}, counted from 0")
    return torch.device("cuda", index)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype a config names; auto is bfloat16 on CUDA, float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def init_distributed(device: str = "auto") -> Ranks:
    """Join the process group that torchrun announces in the environment; alone without it. Safe to call twice."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    place = resolve_device(device, local_rank)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        return Ranks(place)
    if not dist.is_initialized():
        backend = "nccl" if place.type == "cuda" else "gloo"
        extra = {"device_id": place} if place.type == "cuda" else {}
        dist.init_process_group(backend, timeout=timedelta(minutes=30), **extra)
    return Ranks(place, dist.get_rank(), dist.get_world_size())


def ranks_per_node(ranks: Ranks) -> int:
    """Processes that torchrun started on each machine; all of them when it did not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))


def barrier(ranks: Ranks) -> None:
    """Wait for all ranks."""
    if ranks.size > 1:
        dist.barrier()


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def broadcast_value(value: float, ranks: Ranks) -> float:
    """Rank 0's value on every rank (one device sync: not for every step)."""
    if ranks.size == 1:
        return value
    box = torch.tensor([value], dtype=torch.float64, device=ranks.device)
    dist.broadcast(box, src=0)
    return box.item()


def broadcast_tensors(tensors: Iterable[Tensor], ranks: Ranks) -> None:
    """Give every rank rank 0's values."""
    if ranks.size > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def average_gradients(parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
    """Replace every gradient by its mean over ranks, in flat buckets. A missing gradient counts as zero."""
    if ranks.size == 1:
        return
    for bucket in _buckets([p for p in parameters if p.requires_grad]):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat)
        flat /= ranks.size
        for parameter, grad, mean in zip(bucket, grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(mean.view_as(grad))
            parameter.grad = grad


def _buckets(parameters: list[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    """Runs of parameters of one dtype with at most BUCKET_ELEMENTS elements (a larger parameter stands alone)."""
    bucket: list[nn.Parameter] = []
    elements = 0
    for parameter in parameters:
        if bucket and (elements + parameter.numel() > BUCKET_ELEMENTS or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, elements = [], 0
        bucket.append(parameter)
        elements += parameter.numel()
    if bucket:
        yield bucket


@dataclass(frozen=True)
class Rngs:
    """All randomness of one training step, as a function of (seed, step, sample) and nothing else.

    `shared` is the same on every rank, for decisions; `SampleRngs` are the draws of samples. So a resumed run needs no
    saved generator, and N ranks draw what one process with N times the batch draws.
    """

    seed: int
    step: int
    device: torch.device
    stream: int = 0  # players of one step draw from different streams

    @property
    def shared(self) -> torch.Generator:
        """On the CPU, where decisions are made: reading them from a GPU would wait for it."""
        return torch.Generator().manual_seed(mix_seed(self.seed, self.step, self.stream, 0))


class SampleRngs:
    """Draws of the samples of one batch, [B, ...] at once.

    samples: their places in the step's whole batch. The n-th number that a sample draws is a hash of (seed, step,
    stream, sample, n): who computes the sample, in which pass and beside whom, changes nothing. A generator per sample
    would do the same with a kernel per sample and draw.
    """

    def __init__(self, rngs: Rngs, samples: range):
        self.samples = samples
        self.rngs = rngs
        self.step, self.stream = rngs.step, rngs.stream
        self.device = rngs.device
        index = torch.arange(samples.start, samples.stop, device=self.device)
        self.keys = hash_tensor(index + mix_seed(rngs.seed, rngs.step, rngs.stream, 1))
        self.num_drawn = 0

    @property
    def shared(self) -> torch.Generator:
        """For decisions of the whole step, the same in every pass and on every rank; it starts anew each time."""
        return self.rngs.shared

    def randn(self, *shape: int) -> Tensor:
        """Standard normal float32 [B, *shape]."""
        count = math.prod(shape)
        return normal(self._bits((count + 1) // 2))[:, :count].reshape(-1, *shape)

    def rand(self, *shape: int) -> Tensor:
        """Uniform float32 in [0, 1), [B, *shape]."""
        return uniform(self._bits(math.prod(shape))).reshape(-1, *shape)

    def at(self, places: Tensor) -> "SampleRngs":
        """The draws of the samples at these places of the batch (int64, on the device), going on from here.

        `samples` stays that of the whole batch: the host does not ask which they are.
        """
        some = copy(self)
        some.keys = self.keys[places]
        return some

    def _bits(self, count: int) -> Tensor:
        """The next `count` hashes of every sample, int64 [B, count]."""
        places = torch.arange(self.num_drawn, self.num_drawn + count, device=self.device)
        self.num_drawn += count
        return hash_tensor(self.keys[:, None] + places)


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several integers: near inputs give unrelated outputs."""
    state = 0
    for part in parts:
        state = hash_int(state ^ part)
    return state % 2**63
