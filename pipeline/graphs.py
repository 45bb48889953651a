"""A stream's passes as CUDA graphs: the host launches one thing per pass, and the GPU does not wait for it.

What a pass launches depends on where its block lies in the cache and on shapes, not on its time: denoising steps share
a graph, and the clean pass, which needs less, has one of its own. A cache of the whole past has these for each block of
the longest video so far; a ring comes back to the same slots, so that a stream without end has few (KVContext.layout).

All that changes between passes lies in memory that stays: latents, times and rotations are copied there before a
replay, keys of the past are in the cache's slab, and those of a new prompt take the place of the old one's.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from utils.conditioning import Conditioning
from utils.scheduler import FlowMatchScheduler
from utils.wan_wrapper import WanDiffusionWrapper
from wan.modules.causal_model import CausalWanModel
from wan.modules.kv_cache import KVCache, KVContext
from wan.modules.model import Shortcut
from wan.modules.rope import Rope

Result = TypeVar("Result")
Inputs = tuple[Tensor | None, ...]  # latents [B, F, C, H, W], times [B, F], y and pose tokens: what a pass is given


class Recorder(Protocol):
    """What turns a function that launches things into something that launches them again, on the same memory."""

    def run(self, function: Callable[[], Result]) -> Result:
        """The function's result, computed as it comes: it compiles, and chooses its kernels."""
        ...

    def record(self, function: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """(replay, result): every replay computes what the function would and puts it into the same tensors."""
        ...


class CudaRecorder:
    """Records on a stream of its own. All recordings share their memory, so one is replayed at a time."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self.pool = None

    def run(self, function: Callable[[], Result]) -> Result:
        caller = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            result = function()
        caller.wait_stream(self.stream)
        return result

    def record(self, function: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        graph = torch.cuda.CUDAGraph()
        if not self.graphs:  # torch gives up a pool with the last graph that lives in it
            self.pool = torch.cuda.graph_pool_handle()
        self.graphs.add(graph)
        # thread_local: what other threads do (NCCL's watchdog, pictures for a browser) is none of its business.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            result = function()
        return graph.replay, result


class RecordedPass:
    """One pass in memory that stays: the first time it is run as it comes, the second recorded, and then replayed."""

    def __init__(self) -> None:
        self.inputs: Inputs | None = None
        self.rope: tuple[Rope, Rope] | None = None
        self.start_frame = -1  # of the block whose rotations lie there
        self.replay: Callable[[], None] | None = None
        self.flow: Tensor | None = None

    def __call__(
        self,
        model: CausalWanModel,
        recorder: Recorder,
        cache: KVCache,
        past: KVContext,
        inputs: Inputs,
        keys_only: bool = False,
    ) -> Tensor:
        """Flow [B, C, F, H, W], to be copied before the next pass."""
        known = self.inputs is not None
        self._fill(model, past, inputs)
        if self.replay is not None:
            self.replay()
            return self.flow
        static, rope = self.inputs, self.rope

        def run() -> Tensor:
            x, t, y, pose = static
            tokens, grid = model.embed(x.transpose(1, 2), y, pose)
            attend = model.attend_cached(past, rope)
            return model.run(tokens, t, None, None, attend, grid, cache, keys_only=keys_only)

        if not known:
            return recorder.run(run)
        self.replay, self.flow = recorder.record(run)  # which computes nothing yet
        self.replay()
        return self.flow

    def _fill(self, model: CausalWanModel, past: KVContext, inputs: Inputs) -> None:
        if self.inputs is None:
            self.inputs = tuple(None if tensor is None else tensor.clone() for tensor in inputs)
        else:
            for ours, theirs in zip(self.inputs, inputs, strict=True):
                if ours is not None:
                    ours.copy_(theirs)
        if past.start_frame == self.start_frame:
            return
        patch, (height, width) = model.config.patch_size, inputs[0].shape[-2:]
        rope = model.stream_rope(past, height // patch[1], width // patch[2])
        if self.rope is None:
            self.rope = rope
        else:
            for ours, theirs in zip(sum(self.rope, ()), sum(rope, ()), strict=True):
                ours.copy_(theirs)
        self.start_frame = past.start_frame


class CapturedPasses:
    """A generator that replays its passes over a KV cache; all others it makes as they come.

    Weights may change in place (load_state_dict, a merged LoRA), not move: recordings know their addresses.
    """

    def __init__(self, generator: WanDiffusionWrapper, recorder: Recorder):
        self.generator = generator
        self.recorder = recorder
        self.passes: WeakKeyDictionary[KVCache, dict[tuple, RecordedPass]] = WeakKeyDictionary()

    @property
    def scheduler(self) -> FlowMatchScheduler:
        return self.generator.scheduler

    def __call__(
        self,
        x: Tensor,
        conditioning: Conditioning,
        timestep: Tensor,
        *,
        kv_cache: KVCache | None = None,
        shortcut: Shortcut | None = None,
        keys_only: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """WanDiffusionWrapper.forward's flow and x0."""
        if kv_cache is None or shortcut is not None or torch.is_grad_enabled():
            options = {"shortcut": shortcut, "keys_only": keys_only}
            return self.generator(x, conditioning, timestep, kv_cache=kv_cache, **options)
        model = self.generator.model
        model.read_prompt(conditioning.prompt_embeds, conditioning.clip_feature, kv_cache)
        past = kv_cache.context(x.shape[1])
        inputs = (x, timestep, conditioning.y, conditioning.add_condition)
        key = (past.layout, signature(inputs), prompt_address(kv_cache), keys_only)
        passes = self.passes.setdefault(kv_cache, {})
        recorded = passes.setdefault(key, RecordedPass())
        flow = recorded(model, self.recorder, kv_cache, past, inputs, keys_only)
        flow = flow.transpose(1, 2).to(torch.float32, copy=True)
        return flow, self.scheduler.flow_to_x0(flow, x, timestep)


def signature(inputs: Inputs) -> tuple:
    """What a replay cannot change about its inputs."""
    return tuple(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in inputs)


def prompt_address(kv_cache: KVCache) -> tuple[int, ...]:
    """Where the prompt's and the image's keys lie: the same for every prompt, see KVCache.remember_text."""
    return tuple(keys[0].data_ptr() for keys in (kv_cache.text[0], kv_cache.image[0]) if keys is not None)
