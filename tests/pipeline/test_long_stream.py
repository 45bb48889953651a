"""A stream without end under a window with a sink: the same memory and the same work for every block."""

import gc
from itertools import islice

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.build import build_pipeline
from utils.config import load_config

WARM_BLOCKS, BLOCKS = 6, 20


class Work(TorchDispatchMode):
    """Counts operations and the numbers they make."""

    def __init__(self):
        super().__init__()
        self.counts = [0, 0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [item for item in (out if isinstance(out, tuple | list) else [out]) if isinstance(item, torch.Tensor)]
        self.counts[0] += 1
        self.counts[1] += sum(tensor.numel() for tensor in tensors)
        return out


def live_bytes() -> int:
    """Bytes of all tensors that are alive, shared memory counted once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def test_memory_and_work_stay_the_same(tiny_model_folder):
    settings = [f"model_name={tiny_model_folder}", "lora_ckpt=null", "device=cpu", "height=32", "width=32"]
    config = load_config("configs/presets/embedded.yaml", [*settings, "denoising_step_list=[1000,500]"])
    pipeline = build_pipeline(config)
    stream = pipeline.stream(text_prompts=["a red puppet"], seeds=[0], num_frames=None, height=32, width=32)
    work, memory = [], []
    for pixels in islice(stream, WARM_BLOCKS):
        shape = pixels.shape
    for number in range(BLOCKS):
        with Work() as counter:
            pixels = next(stream)
        assert pixels.shape == shape and pixels.isfinite().all()
        work.append(tuple(counter.counts))
        if number in (0, BLOCKS - 1):
            memory.append(live_bytes())
    assert pipeline.kv_cache_pos.start_frame == 3 * (WARM_BLOCKS + BLOCKS - 1)  # the newest block is not yet context
    assert memory[0] == memory[1]
    assert len(set(work)) == 1
