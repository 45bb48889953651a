"""The pipeline against golden rollouts, and the promises of a stream."""

import gc
import weakref
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

import pipeline.causal_diffusion_inference as module
from pipeline import CausalDiffusionInferencePipeline, rollout
from pipeline.build import build_pipeline
from pipeline.rollout import FrameBlock, plan_blocks
from pipeline.samplers import SampleNoise
from tests.golden_data import below, load_golden, wan_config
from tests.wan.modules.test_causal_model import TOY
from utils.config import load_config
from utils.scheduler import FlowMatchScheduler
from utils.wan_wrapper import WanDiffusionWrapper
from wan.modules.weights import assign_weights

TOLERANCE = 1e-4
ROLLOUT, ROLLOUT_CONFIG = load_golden("h_causal_rollout")
GUIDED, GUIDED_CONFIG = load_golden("h_causal_multistep_cfg")
WEIGHTS = below(load_golden("a_causal_forward")[0], "w")


def no_draws(remember, generator, paths, block, latents, context_noise, draw):
    """The reference draws nothing when it remembers a block."""
    remember(generator, paths, block, latents, context_noise, torch.zeros)


class LatentsAsPixels:
    """A VAE for tests: pixels are twice the latents minus one, so that the pipeline gives latents back."""

    model = SimpleNamespace(spatial_stride=8)
    make_cache = list

    def decode_to_pixel(self, latents, cache):
        cache.append(latents.shape[1])  # a stream hands in one cache of its own
        return 2 * latents - 1


def golden_pipeline(config: dict, settings: dict, embeds: dict[str, torch.Tensor], **options):
    generator = WanDiffusionWrapper(
        is_causal=True,
        timestep_shift=settings.get("shift", config.get("shift", 5.0)),
        num_frame_per_block=settings["nfpb"],
        local_attn_size=settings.get("local", -1),
        sink_size=settings.get("sink", 0),
        from_scratch=True,
        model_config=wan_config(config),
    )
    assign_weights(generator.model, WEIGHTS, "golden")
    return CausalDiffusionInferencePipeline(
        generator,
        lambda prompts: torch.cat([embeds[prompt] for prompt in prompts]),
        LatentsAsPixels(),
        num_frame_per_block=settings["nfpb"],
        independent_first_frame=settings.get("indep", False),
        **options,
    )


@dataclass(frozen=True)
class ReferenceClock(FlowMatchScheduler):
    """The reference's clock where ours differs: times snap to a table, context_noise adds no noise at inference."""

    context_noise: float = 0.0

    def sigma(self, t, like):
        grid = self.warp(torch.linspace(1000, 0, 1001)[:-1])
        snapped = grid[(grid - torch.as_tensor(t).float().reshape(-1, 1)).abs().argmin(1)]
        return super().sigma(snapped.reshape(torch.as_tensor(t).shape), like)

    def add_noise(self, x0, noise, t):
        return x0 if t == self.context_noise else super().add_noise(x0, noise, t)


@pytest.mark.parametrize("case", ROLLOUT_CONFIG["subcases"])
def test_few_step_rollout_reproduces_the_reference(case, monkeypatch):
    settings, tensors = ROLLOUT_CONFIG["subcases"][case], below(ROLLOUT, case)
    draws = iter([tensors[key] for key in sorted(tensors) if key.startswith("renoise")])
    monkeypatch.setattr(module, "SampleNoise", lambda seeds, device: lambda shape: next(draws).reshape(shape))
    steps = settings.get("steps", [1000, 750, 500, 250])
    pipeline = golden_pipeline(
        ROLLOUT_CONFIG,
        settings,
        {"prompt": tensors["context"]},
        denoising_step_list=steps,
        warp_denoising_step=settings.get("warp", True),
        context_noise=settings.get("context_noise", 0),
    )
    if settings.get("context_noise"):
        pipeline.generator.scheduler = ReferenceClock(5.0, context_noise=float(settings["context_noise"]))
        monkeypatch.setattr(rollout, "remember", partial(no_draws, rollout.remember))
    assert pipeline.timesteps == pytest.approx(settings["denoising_step_list"], abs=1e-3)
    _, latents = pipeline.inference(
        tensors["noise"], ["prompt"], initial_latent=tensors.get("initial_latent"), return_latents=True
    )
    torch.testing.assert_close(latents, tensors["latents"], atol=TOLERANCE, rtol=TOLERANCE)
    with pytest.raises(StopIteration):
        next(draws)
    # Keys of every frame that became context; the last block never does here, and always does in the reference.
    cache, size = pipeline.kv_cache_pos, pipeline.kv_cache_pos.frame_seqlen
    total, held = latents.shape[1], min(latents.shape[1], cache.capacity)
    frames = [*range(settings.get("sink", 0) if total > held else 0)]
    frames += range(total - held + len(frames), total)
    for position, frame in enumerate(frames):
        if frame >= cache.start_frame:
            continue
        theirs = tensors["final_kv_L0.k"][:, position * size : (position + 1) * size]
        ours = cache.keys[0][:, cache.slot(frame) * size : (cache.slot(frame) + 1) * size]
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("case", GUIDED_CONFIG["subcases"])
def test_many_step_guidance_reproduces_the_reference(case):
    settings, tensors = GUIDED_CONFIG["subcases"][case], below(GUIDED, case)
    pipeline = golden_pipeline(
        GUIDED_CONFIG,
        settings,
        {"prompt": tensors["prompt_embeds"], "": tensors["negative_embeds"]},
        guidance_scale=settings["cfg"],
        solver=settings["solver"],
        sampling_steps=settings["steps"],
    )
    _, latents = pipeline.inference(
        tensors["noise"], ["prompt"], initial_latent=tensors.get("initial_latent"), return_latents=True
    )
    torch.testing.assert_close(latents, tensors["latents"], atol=TOLERANCE, rtol=TOLERANCE)


def toy_pipeline(window: int = -1, sink: int = 0, few: bool = True, **options) -> CausalDiffusionInferencePipeline:
    torch.manual_seed(0)
    generator = WanDiffusionWrapper(
        is_causal=True,
        num_frame_per_block=2,
        local_attn_size=window,
        sink_size=sink,
        from_scratch=True,
        model_config=TOY,
    )
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.1)

    def embed(prompts):
        rows = [
            torch.randn(5, 12, generator=torch.Generator().manual_seed(sum(map(ord, prompt)))) for prompt in prompts
        ]
        return torch.stack(rows)

    few_steps = {"denoising_step_list": [1000, 500]} if few else {"sampling_steps": 3}
    return CausalDiffusionInferencePipeline(
        generator.eval(), embed, LatentsAsPixels(), num_frame_per_block=2, **few_steps, **options
    )


SIZE = {"height": 32, "width": 32}


@pytest.mark.parametrize("few", [True, False])
def test_a_stream_is_the_clip_cut_in_blocks(few):
    pipeline = toy_pipeline(few=few)
    clip = pipeline.inference(text_prompts=["a", "b"], seeds=[1, 2], num_frames=6, **SIZE)
    blocks = list(pipeline.stream(text_prompts=["a", "b"], seeds=[1, 2], num_frames=6, **SIZE))
    assert [block.shape[1] for block in blocks] == [2, 2, 2]
    assert torch.equal(torch.cat(blocks, dim=1), clip)


def test_the_first_frame_can_come_before_the_rest_of_its_block():
    pipeline, options = toy_pipeline(), {"text_prompts": ["a"], "seeds": [1], **SIZE}
    clip = pipeline.inference(num_frames=6, **options)
    for given in (None, torch.randn(1, 1, 4, 4, 4)):
        whole = pipeline.inference(num_frames=6 if given is None else 7, initial_latent=given, **options)
        blocks = list(
            pipeline.stream(num_frames=whole.shape[1], initial_latent=given, first_frame_alone=True, **options)
        )
        assert [block.shape[1] for block in blocks] == ([1, 1, 2, 2] if given is None else [1, 2, 2, 2])
        torch.testing.assert_close(torch.cat(blocks, dim=1), whole)
    assert torch.equal(pipeline.inference(num_frames=6, first_frame_alone=True, **options), clip)


@pytest.mark.parametrize("few", [True, False])
def test_a_video_depends_on_its_own_prompt_and_seed_only(few):
    pipeline = toy_pipeline(few=few)
    together = pipeline.inference(text_prompts=["a", "b"], seeds=[1, 2], num_frames=4, **SIZE)
    swapped = pipeline.inference(text_prompts=["b", "a"], seeds=[2, 1], num_frames=4, **SIZE)
    alone = pipeline.inference(text_prompts=["b"], seeds=[2], num_frames=4, **SIZE)
    torch.testing.assert_close(swapped.flip(0), together, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(alone[0], together[1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_a_longer_video_begins_as_the_shorter_one():
    pipeline = toy_pipeline(window=4, sink=1)
    short = pipeline.inference(text_prompts=["a"], seeds=[1], num_frames=4, **SIZE)
    endless = pipeline.stream(text_prompts=["a"], seeds=[1], **SIZE)
    torch.testing.assert_close(torch.cat(list(islice(endless, 2)), dim=1), short)


def test_extension_goes_on_from_given_frames():
    """Generating 6 latents = generating 4 and going on for 2 with the same noise."""
    pipeline = toy_pipeline(few=False)
    noise = SampleNoise([3])((1, 6, 4, 4, 4))
    _, whole = pipeline.inference(noise, ["a"], return_latents=True)
    _, extended = pipeline.inference(noise[:, 4:], ["a"], initial_latent=whole[:, :4], return_latents=True)
    torch.testing.assert_close(extended, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("num_given", [1, 2, 3, 5])
def test_any_number_of_given_frames(num_given):
    pipeline = toy_pipeline()
    given = torch.randn(1, num_given, 4, 4, 4)
    total = num_given + 4
    _, latents = pipeline.inference(
        text_prompts=["a"], seeds=[0], num_frames=total, initial_latent=given, return_latents=True, **SIZE
    )
    assert latents.shape[1] == total and torch.equal(latents[:, :num_given], given)


def test_a_stream_may_be_dropped_and_begun_again():
    pipeline = toy_pipeline(window=4)
    first = pipeline.stream(text_prompts=["a"], seeds=[1], **SIZE)
    begun = next(first)
    second = pipeline.stream(text_prompts=["a"], seeds=[1], **SIZE)
    assert torch.equal(next(second), begun)
    with pytest.raises(RuntimeError, match="newer stream"):
        next(first)


@pytest.mark.parametrize("rope_base", ["absolute", "window"])
def test_a_stream_copies_no_number_to_the_device(rope_base, monkeypatch):
    """On CUDA such a copy waits for everything before it; the test below sees it, this one needs no GPU."""
    pipeline = toy_pipeline(window=5, sink=1)
    pipeline.generator.model.rope_base = rope_base
    stream = pipeline.stream(text_prompts=["a"], seeds=[1], **SIZE)
    next(stream)
    for maker in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, maker, lambda *_, **__: pytest.fail("a tensor is made of host numbers"))
    assert len(list(islice(stream, 5))) == 5


@pytest.mark.gpu
@pytest.mark.parametrize("rope_base", ["absolute", "window"])
def test_a_stream_never_waits_for_the_device(rope_base):
    pipeline = toy_pipeline(window=5, sink=1)
    pipeline.generator.cuda().model.rope_base = rope_base
    stream = pipeline.stream(text_prompts=["a"], seeds=[1], **SIZE)
    next(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(islice(stream, 5))) == 5
    finally:
        torch.cuda.set_sync_debug_mode("default")


def bytes_of_all_tensors() -> int:
    gc.collect()
    return sum(x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor)


def test_three_hundred_blocks_in_constant_memory(tiny_model_folder):
    """Key/value ring, VAE cache, prompt memory and the walk itself: nothing grows."""
    settings = [f"model_name={tiny_model_folder}", "height=16", "width=16", "denoising_step_list=[1000]"]
    pipeline = build_pipeline(load_config(overrides=[*settings, "model_kwargs.local_attn_size=6"]), "cpu")
    stream = pipeline.stream(text_prompts=["a puppet"], seeds=[0], height=16, width=16)
    assert next(stream).shape == (1, 9, 3, 16, 16)
    sizes = [bytes_of_all_tensors() for index, _ in enumerate(islice(stream, 299)) if index in (2, 150, 298)]
    assert sizes[0] == sizes[1] == sizes[2]
    assert pipeline.kv_cache_pos.start_frame == 3 * 299  # the newest block is remembered when the next one is asked for


def test_guidance_of_one_walks_one_path():
    pipeline = toy_pipeline(few=False, guidance_scale=1.0)
    pipeline.inference(text_prompts=["a"], seeds=[0], num_frames=2, **SIZE)
    assert pipeline.kv_cache_neg is None


def test_memory_is_kept_between_videos_of_one_shape():
    pipeline = toy_pipeline(window=4)
    pipeline.inference(text_prompts=["a"], seeds=[0], num_frames=8, **SIZE)
    cache = pipeline.kv_cache_pos
    pipeline.inference(text_prompts=["b"], seeds=[0], num_frames=8, **SIZE)
    assert pipeline.kv_cache_pos is cache
    pipeline.inference(text_prompts=["b"], seeds=[0], num_frames=8, height=32, width=48)
    assert pipeline.kv_cache_pos is not cache


def test_old_memory_goes_before_new_comes(monkeypatch):
    """Two caches of two sizes at once would be 12 GB for 1.3B."""
    pipeline = toy_pipeline(few=False)
    make, alive = pipeline.generator.model.make_kv_cache, weakref.WeakSet()

    def counted(*arguments):
        most.append(len(alive))
        alive.add(cache := make(*arguments))
        return cache

    monkeypatch.setattr(pipeline.generator.model, "make_kv_cache", counted)
    for num_frames in (4, 6):
        most = []
        pipeline.inference(text_prompts=["a"], seeds=[0], num_frames=num_frames, **SIZE)
        assert most == [0, 1]  # one for the prompt, one for the negative prompt


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"text_prompts": [], "num_frames": 2}, "no prompt"),
        ({"text_prompts": ["a"], "num_frames": 5}, "5 latent frames do not split into blocks of 2; use 4 or 6"),
        ({"text_prompts": ["a"], "num_frames": 4, "height": 30}, "multiples of 16"),
        ({"text_prompts": ["a"], "num_frames": 4, "seeds": [1, 2]}, "1 samples but 2 seeds"),
        ({"text_prompts": ["a"]}, "num_frames or noise"),
        ({"text_prompts": ["a"], "num_frames": 2, "initial_latent": torch.zeros(1, 2, 4, 4, 4)}, "more than are given"),
        ({"text_prompts": ["a"], "num_frames": 4, "initial_latent": torch.zeros(2, 2, 4, 4, 4)}, r"\[2, 2, 4, 4, 4\]"),
    ],
)
def test_mistakes_are_refused_before_anything_is_made(arguments, message):
    with pytest.raises(ValueError, match=message):
        toy_pipeline().inference(**{**SIZE, **arguments})


def test_block_plans():
    def plan(*arguments):
        return [(block.start, block.stop, block.given) for block in islice(plan_blocks(*arguments), 5)]

    assert plan(6, 3) == [(0, 3, False), (3, 6, False)]
    assert plan(7, 3, True) == [(0, 1, False), (1, 4, False), (4, 7, False)]
    assert plan(13, 3, False, 7)[:3] == [(0, 1, True), (1, 4, True), (4, 7, True)]
    assert plan(9, 3, True, 3) == [(0, 1, True), (1, 3, True), (3, 6, False), (6, 9, False)]
    assert plan(None, 2)[-1] == (8, 10, False)
    assert FrameBlock(3, 6).num_frames == 3


@pytest.mark.parametrize("given", [None, torch.randn(2, 1, 4, 4, 4)])
def test_guidance_in_one_pass_is_guidance_in_two(given):
    options = {"text_prompts": ["a", "b"], "seeds": [1, 2], "num_frames": 6 + (given is not None), **SIZE}
    videos = []
    for passes in ("two", "one"):
        pipeline = toy_pipeline(window=4, sink=1, few=False, guidance_passes=passes)
        videos.append(pipeline.inference(**options, initial_latent=given))
        assert (pipeline.kv_cache_neg is None) == (passes == "one")
    assert pipeline.kv_cache_pos.keys[0].shape[0] == 4
    torch.testing.assert_close(videos[1], videos[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(pipeline.inference(**options, initial_latent=given), videos[1])  # in the memory that is there


def test_one_pass_and_two_take_turns_on_one_pipeline():
    pipeline = toy_pipeline(few=False)
    options = {"text_prompts": ["a"], "seeds": [1], "num_frames": 4, **SIZE}
    two = pipeline.inference(**options)
    pipeline.guidance_passes = "one"
    torch.testing.assert_close(pipeline.inference(**options), two, atol=1e-5, rtol=1e-5)
    pipeline.guidance_passes = "two"
    assert torch.equal(pipeline.inference(**options), two)
    with pytest.raises(ValueError, match="'perhaps' is unknown; use 'auto', 'one' or 'two'"):
        toy_pipeline(guidance_passes="perhaps")
