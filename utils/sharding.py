"""One network on many GPUs: FSDP2 on a (replicate, shard) mesh, and plain local tensors for everything around it.

Every transformer block is gathered when it computes and let go after it, forward and backward; so is the rest of the
transformer. What steps, clips and averages works on `LocalParameters`, this rank's part as ordinary tensors: without
sharding these are the parameters themselves, so there is one road for both.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from utils.distributed import Ranks, broadcast_tensors
from wan.modules.model import WanModel


@dataclass(frozen=True)
class Sharding:
    """Over which ranks networks are cut, and what they compute in. mesh None: every rank holds them whole.

    compute_dtype: of gathered weights, None as they are stored; gradients are reduced in float32, and float32 is what
    stays. offload: shards, gradients and moments lie in main memory.
    """

    ranks: Ranks
    mesh: DeviceMesh | None = None
    compute_dtype: torch.dtype | None = None
    offload: bool = False

    @property
    def build_device(self) -> torch.device:
        """Where to make a network that will be cut: rank 0 in main memory, the others without memory at all."""
        if self.mesh is None:
            return self.ranks.device
        return torch.device("cpu" if self.ranks.is_main else "meta")

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that hold one copy together."""
        return None if self.mesh is None else self.mesh.get_group("shard")

    def keeps(self, tensor: Tensor) -> bool:
        """Whether this rank is the one to save its part: others hold the same part of the same tensor."""
        if not isinstance(tensor, DTensor):
            return self.ranks.is_main
        return self.mesh.ndim == 1 or self.mesh.get_local_rank("replicate") == 0


def make_mesh(strategy: str, ranks: Ranks, group_size: int | None, ranks_per_node: int) -> DeviceMesh | None:
    """hybrid_full: one copy per `group_size` ranks (None: per node); full: one copy over all; no_shard: None.

    A run of a single process without a process group has nothing to cut networks over: None.
    """
    if strategy == "no_shard" or not dist.is_initialized():
        return None
    kind = ranks.device.type
    if strategy == "full":
        return init_device_mesh(kind, (ranks.size,), mesh_dim_names=("shard",))
    size = group_size or min(ranks_per_node, ranks.size)
    if ranks.size % size:
        fits = ", ".join(str(n) for n in range(1, ranks.size + 1) if ranks.size % n == 0)
        raise ValueError(
            f"sharding_group_size {size} does not divide {ranks.size} ranks; use one of {fits}, or "
            "sharding_strategy: full"
        )
    return init_device_mesh(kind, (ranks.size // size, size), mesh_dim_names=("replicate", "shard"))


# --- cutting ---


def distribute(module: nn.Module, sharding: Sharding) -> None:
    """Give every rank its part of rank 0's weights: transformers inside `module` cut, everything else whole.

    The transformers were made on `sharding.build_device`. Works in place: whoever holds `module` goes on using it.
    """
    if sharding.mesh is not None:
        for transformer in [m for m in module.modules() if isinstance(m, WanModel)]:
            _shard_transformer(transformer, sharding)
    broadcast_tensors(_unsharded(module), sharding.ranks)


def _shard_transformer(transformer: WanModel, sharding: Sharding) -> None:
    source = dict(_tensors(transformer)) if sharding.ranks.is_main else {}
    transformer.to("meta")
    options = {
        "mesh": sharding.mesh,
        "reshard_after_forward": True,  # also the root: a kept copy would go stale when the optimizer steps
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=sharding.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
        "offload_policy": CPUOffloadPolicy(pin_memory=_pins(sharding)) if sharding.offload else OffloadPolicy(),
    }
    for block in transformer.blocks:
        fully_shard(block, **options)
        register_fsdp_forward_method(block, "prompt_keys")
    fully_shard(transformer, **options)
    transformer.to_empty(device="cpu" if sharding.offload else sharding.ranks.device)
    transformer.compute_device, transformer.compute_dtype = sharding.ranks.device, sharding.compute_dtype
    _spread(transformer, source, sharding)
    # Else the first pass does it, with whatever learns in that pass: a network that is first used while another one
    # learns (a critic in the student's step) would forget that its gradients are summed in, and are, float32.
    transformer._get_fsdp_state()._lazy_init()


@torch.no_grad()
def _spread(transformer: WanModel, source: dict[str, Tensor], sharding: Sharding) -> None:
    """Fill empty shards from rank 0's whole tensors, one tensor at a time."""
    for name, target in _tensors(transformer):
        shape, device = target.shape, sharding.ranks.device
        whole = source.pop(name).to(device, target.dtype) if sharding.ranks.is_main else None
        whole = torch.empty(shape, dtype=target.dtype, device=device) if whole is None else whole.contiguous()
        dist.broadcast(whole, src=0)
        local(target).copy_(cut(whole, target))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _pins(sharding: Sharding) -> bool:
    return sharding.ranks.device.type == "cuda"


def _unsharded(module: nn.Module) -> Iterable[Tensor]:
    return [tensor for _, tensor in _tensors(module) if not isinstance(tensor, DTensor)]


# --- parts and wholes ---


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory with the tensor; an ordinary tensor is its own part."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def cut(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor that every rank holds, cut as `like` is."""
    if not isinstance(like, DTensor):
        return whole
    whole = whole.to(like.device_mesh.device_type)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()


def dress(part: Tensor, like: Tensor) -> Tensor:
    """A part, on any device, as the DTensor it belongs to: cut as `like` is. Parts of whole tensors stay as they are.

    `DTensor.from_local` would move the part to the mesh's device; checkpoints take their copies in main memory.
    """
    if not isinstance(like, DTensor) or part.dim() == 0:  # an optimizer counts steps in a scalar
        return part
    return DTensor(part, like._spec, requires_grad=False)


def whole(part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor of a part (collective); it lies on the mesh's device."""
    if not isinstance(like, DTensor):
        return part
    part = part.to(like.device_mesh.device_type)
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    ).full_tensor()


@torch.no_grad()
def whole_state(module: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """A module's whole state dict in main memory on rank 0, empty elsewhere (collective), one tensor at a time."""
    state = {}
    for name, tensor in module.state_dict().items():
        full = whole(local(tensor), tensor)
        if ranks.is_main:
            state[name] = full.cpu()
    return state


class LocalParameters:
    """A module's learning parameters by name, as this rank holds them: ordinary tensors with ordinary gradients.

    Of a sharded module they share memory with its shards. So optimizers, norms and averages are the same fused kernels
    for one GPU and for many, and see no DTensor.
    """

    def __init__(self, module: nn.Module):
        self.sources = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.tensors = {
            name: nn.Parameter(local(p)) if isinstance(p, DTensor) else p for name, p in self.sources.items()
        }
        self.keeps_gradients = False  # zero_grad leaves their memory where it is, as a captured pass must find it

    def __len__(self) -> int:
        return len(self.tensors)

    def is_sharded(self, name: str) -> bool:
        return isinstance(self.sources[name], DTensor)

    @property
    def replicated(self) -> list[nn.Parameter]:
        """Parameters that every rank holds whole; their gradients are not reduced by sharding."""
        return [p for name, p in self.sources.items() if not self.is_sharded(name)]

    def take_gradients(self) -> None:
        """After a backward pass: the parts' gradients are those of the shards."""
        for name, source in self.sources.items():
            if self.is_sharded(name):
                self.tensors[name].data = local(source)  # a first pass may have padded the shard into new memory
                self.tensors[name].grad = None if source.grad is None else local(source.grad)

    def zero_grad(self) -> None:
        if self.keeps_gradients:
            gradients = [p.grad for p in self.tensors.values() if p.grad is not None]
            if gradients:  # none before the first pass
                torch._foreach_zero_(gradients)
            return
        for name, source in self.sources.items():
            source.grad = self.tensors[name].grad = None


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Sharded transformers inside `module` stay gathered after their first pass, for walks of many passes without grad.

    Costs one whole copy in the compute dtype while inside; everything is let go at the end, so nothing goes stale.
    """
    parts = [m for m in module.modules() if isinstance(m, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def defer_all_reduce(module: nn.Module, deferred: bool) -> None:
    """Whether the next backward pass keeps its sums within each copy of the network (accumulation over passes).

    Reducing within a copy goes on in every pass: whole gradients per GPU are what sharding is there to avoid.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_requires_all_reduce(not deferred, recurse=False)
