"""pipeline/graphs.py: replayed passes are the passes. A tape of operations on fixed memory stands for a CUDA graph."""

import gc
from itertools import islice

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline import CausalDiffusionInferencePipeline
from pipeline.build import accelerate, build_pipeline, record_passes
from pipeline.graphs import CapturedPasses, CudaRecorder
from pipeline.rollout import Path, plan_blocks, rollout
from tests.pipeline.test_causal_diffusion_inference import SIZE, LatentsAsPixels, toy_pipeline
from utils.conditioning import Conditioning
from utils.config import load_config
from utils.wan_wrapper import WanDiffusionWrapper
from wan.configs import WanConfig


class Tape(TorchDispatchMode):
    """The operations that ran, with the tensors that they took and made."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, made))
        return made

    def play(self) -> None:
        """Once more, on the same tensors: what a result is made of may have changed, not where it lies."""
        for function, args, kwargs, made in self.operations:
            for old, new in zip(tree_leaves(made), tree_leaves(function(*args, **kwargs)), strict=True):
                if (
                    isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr()
                ):  # else a view, or written in place
                    old.copy_(new)


class OperationRecorder:
    """Records as a CUDA graph does: operations and the memory that they read and write, no Python."""

    def __init__(self):
        self.num_run = self.num_recorded = self.num_replayed = 0

    def run(self, function):
        self.num_run += 1
        return function()

    def record(self, function):
        self.num_recorded += 1
        with Tape() as tape:
            result = function()

        def replay():
            self.num_replayed += 1
            tape.play()

        return replay, result


def both(
    num_blocks: int, rope_base: str = "absolute", **options
) -> tuple[list[torch.Tensor], list[torch.Tensor], OperationRecorder]:
    """Blocks of a toy stream, made as they come and replayed, two videos one after the other."""
    recorder, found = OperationRecorder(), []
    for records in (False, True):
        pipeline = toy_pipeline(**options)
        pipeline.generator.model.rope_base = rope_base
        if records:
            pipeline.record_passes(recorder)
        found.append([])
        for prompt in "ab":
            length = {} if options.get("window", -1) != -1 else {"num_frames": 2 * num_blocks}
            stream = pipeline.stream(text_prompts=[prompt], seeds=[1], **SIZE, **length)
            found[-1] += list(islice(stream, num_blocks))
    return found[0], found[1], recorder


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert not torch.equal(expected[0], expected[len(expected) // 2])  # the second prompt is another one


@pytest.mark.parametrize(
    ("options", "num_blocks", "num_graphs"),
    [
        ({}, 3, 3 + 2),  # one for each length of the past, and one that remembers, but for the last block
        ({"window": 5, "sink": 1}, 7, 4 + 4),  # 2, 4 and 5 frames, and 5 again: the block in the ring's other slots
        ({"window": 5, "sink": 1, "rope_base": "window"}, 7, 4 + 4),
        ({"few": False, "guidance_scale": 2.0, "guidance_passes": "two"}, 2, 4 + 2),  # a cache for each side
        ({"few": False, "guidance_scale": 2.0, "guidance_passes": "one"}, 2, 2 + 1),
    ],
)
def test_replayed_passes_make_the_same_stream(options: dict, num_blocks: int, num_graphs: int):
    expected, found, recorder = both(num_blocks, **options)
    same(found, expected)
    assert recorder.num_run == recorder.num_recorded == num_graphs
    assert recorder.num_replayed > recorder.num_recorded


def switched(passes, kv_cache, num_blocks: int = 4) -> list[torch.Tensor]:
    """A walk of blocks of two latents in two steps whose prompt is another one in its second half."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(2, 1, 5, 12, generator=generator).to(kv_cache.keys[0].device)
    noise = torch.randn(num_blocks, 1, 2, 4, 4, 4, generator=generator).to(words.device)
    path = Path(Conditioning(words[0]), kv_cache)

    def sample(block, paths):
        if block.start == num_blocks:
            path.conditioning = Conditioning(words[1])
            kv_cache.forget_prompt()
        x = noise[block.start // 2]
        for t in (1000.0, 500.0):
            _, x0 = passes(x, paths[0].conditioning, torch.zeros(1, 2, device=x.device) + t, kv_cache=kv_cache)
            x = passes.scheduler.add_noise(x0, noise[block.start // 2], 500.0)
        return x0

    with torch.no_grad():
        return [x for _, x in rollout(passes, [path], plan_blocks(2 * num_blocks, 2), sample)]


def test_a_prompt_may_change_in_mid_stream():
    generator, recorder = toy_pipeline(window=4).generator, OperationRecorder()
    expected = switched(generator, generator.model.make_kv_cache(1, 4, 4))
    passes, cache = CapturedPasses(generator, recorder), generator.model.make_kv_cache(1, 4, 4)
    for _ in range(2):
        cache.reset()
        same(switched(passes, cache), expected)
    assert recorder.num_recorded == 3 + 3  # none for the other prompt: its keys lie where the first one's lay


def test_an_image_model_reads_its_image_block_by_block(tiny_i2v_folder):
    settings = ["device=cpu", "denoising_step_list=[1000,500]", "num_frame_per_block=1"]
    pipeline = build_pipeline(load_config(None, [f"model_name={tiny_i2v_folder}", *settings]))
    options = {"text_prompts": ["a"], "seeds": [0], "num_frames": 2, "height": 16, "width": 16, "return_latents": True}
    images = torch.rand(2, 1, 3, 16, 16) * 2 - 1
    expected = [pipeline.inference(input_image=image, **options)[1] for image in images]
    pipeline.record_passes(OperationRecorder())
    same([pipeline.inference(input_image=image, **options)[1] for image in images], expected)


def test_a_result_outlives_the_next_pass():
    generator = toy_pipeline().generator
    passes, cache = CapturedPasses(generator, OperationRecorder()), generator.model.make_kv_cache(1, 4, 4, 2)
    words, t = Conditioning(torch.randn(1, 5, 12)), torch.full((1, 2), 500.0)
    with torch.no_grad():
        for x in torch.randn(3, 1, 2, 4, 4, 4):
            flow, x0 = passes(x, words, t, kv_cache=cache)
            kept = flow.clone()
            passes(x + 1, words, t, kv_cache=cache)
            assert torch.equal(flow, kept) and torch.equal(x0, generator.scheduler.flow_to_x0(kept, x, t))


def test_recordings_go_with_their_cache():
    pipeline = toy_pipeline(window=4)
    pipeline.record_passes(OperationRecorder())
    for size in (32, 48):
        next(pipeline.stream(text_prompts=["a"], seeds=[1], height=size, width=32))
        gc.collect()
        assert list(pipeline.denoiser.passes) == [pipeline.kv_cache_pos]


# ------------------------------------------------------------------------------------------------ on a GPU

SIZES = WanConfig(
    dim=256, ffn_dim=512, num_heads=2, num_layers=4, in_dim=4, out_dim=4, text_dim=12, text_len=5, freq_dim=32
)
WALKS = [{}, {"local_attn_size": 12, "sink_size": 3}]


def gpu_pipeline(dtype: torch.dtype, **window) -> CausalDiffusionInferencePipeline:
    """Four steps, blocks of three, weights of a size that makes itself felt; drawn in float32, whatever the dtype."""
    torch.manual_seed(0)
    generator = WanDiffusionWrapper(is_causal=True, from_scratch=True, model_config=SIZES, **window)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.06)
    words = torch.randn(1, 5, 12).to("cuda", dtype)
    generator = generator.to("cuda", dtype).eval().requires_grad_(False)
    steps = [1000, 750, 500, 250]
    vae = LatentsAsPixels()
    vae.device = generator.model.device
    return CausalDiffusionInferencePipeline(generator, lambda prompts: words, vae, denoising_step_list=steps)


def latents_of(pipeline: CausalDiffusionInferencePipeline) -> torch.Tensor:
    options = {"text_prompts": ["a"], "seeds": [1], "num_frames": 21, "height": 128, "width": 128}
    return pipeline.inference(**options, return_latents=True)[1]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("walk", WALKS, ids=["whole past", "window and sink"])
def test_cuda_graphs_compute_what_launches_do(walk: dict):
    """Over 21 latents, three times: as the passes come and are recorded, then replayed only."""
    pipeline = gpu_pipeline(torch.bfloat16, **walk)
    expected = latents_of(pipeline)
    pipeline.record_passes(CudaRecorder(pipeline.device))
    for _ in range(3):
        assert relative(latents_of(pipeline), expected) < 1e-3  # the same kernels: equal, but for their choice


@pytest.mark.gpu
def test_attention_in_8_bits_is_replayed():
    """From the third block on there are keys enough for it: 2,304 and 3,072."""
    options = {"text_prompts": ["a"], "seeds": [1], "num_frames": 12, "height": 256, "width": 256}
    pipeline, found = gpu_pipeline(torch.bfloat16), {}
    for backend in ("auto", "int8"):
        pipeline.generator.model.attention_backend = backend
        found[backend] = pipeline.inference(**options, return_latents=True)[1]
    assert torch.equal(found["int8"][:, :6], found["auto"][:, :6])
    assert 0 < relative(found["int8"], found["auto"]) < 0.02
    pipeline.record_passes(CudaRecorder(pipeline.device))
    for _ in range(3):
        assert relative(pipeline.inference(**options, return_latents=True)[1], found["int8"]) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("walk", WALKS, ids=["whole past", "window and sink"])
@pytest.mark.parametrize(("linear_dtype", "share"), [("auto", 2.0), ("float8", 10.0)])
def test_max_is_off_within_the_error_of_bfloat16(walk: dict, linear_dtype: str, share: float):
    """Off and float32 are as far apart as bfloat16 makes them; max may be so far from off, too: `share` times."""
    off = latents_of(gpu_pipeline(torch.bfloat16, **walk))
    allowed = share * relative(off, latents_of(gpu_pipeline(torch.float32, **walk)))
    fast = gpu_pipeline(torch.bfloat16, **walk)
    config = load_config(overrides=["compile=max", f"linear_dtype={linear_dtype}"])
    accelerate(fast.generator, config)
    record_passes(fast, config)
    for _ in range(2):
        assert 0 < relative(latents_of(fast), off) < allowed


@pytest.mark.gpu
def test_a_prompt_may_change_in_mid_stream_of_cuda_graphs(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)  # a trainer's test before it may have set it
    generator = toy_pipeline(window=4).generator.cuda()
    passes, cache = (
        CapturedPasses(generator, CudaRecorder(generator.model.device)),
        generator.model.make_kv_cache(1, 4, 4),
    )
    expected = switched(generator, generator.model.make_kv_cache(1, 4, 4))
    for _ in range(3):
        cache.reset()
        same(switched(passes, cache), expected)
    assert len(passes.passes[cache]) == 3


@pytest.mark.gpu
def test_replays_never_wait_for_the_device():
    pipeline = gpu_pipeline(torch.bfloat16, local_attn_size=12, sink_size=3)
    pipeline.record_passes(CudaRecorder(pipeline.device))
    stream = pipeline.stream(text_prompts=["a"], seeds=[1], height=128, width=128)
    assert len(list(islice(stream, 8))) == 8
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(islice(stream, 6))) == 6
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_another_size_takes_the_memory_of_the_last_one():
    """Recordings go with their cache; those of the next one find a pool of their own."""
    pipeline = gpu_pipeline(torch.bfloat16, local_attn_size=6)
    pipeline.record_passes(CudaRecorder(pipeline.device))
    options = {"text_prompts": ["a"], "seeds": [1], "num_frames": 9, "width": 128}
    first = pipeline.inference(**options, height=128)
    used = []
    for _ in range(2):
        pipeline.inference(**options, height=256)
        assert relative(pipeline.inference(**options, height=128), first) < 1e-3
        gc.collect()
        torch.cuda.empty_cache()
        used.append(torch.cuda.memory_reserved())
    assert used[1] <= used[0]
