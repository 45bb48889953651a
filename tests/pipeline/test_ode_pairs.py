"""pipeline/ode_pairs.py: a trajectory is the pipeline's own Euler sampling, stopped at the student's times."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pipeline import BidirectionalInferencePipeline, CausalDiffusionInferencePipeline
from pipeline.build import build_pipeline
from pipeline.ode_pairs import grid_places, ode_trajectory
from pipeline.samplers import SampleNoise
from utils.conditioning import Conditioning
from utils.config import load_config
from utils.scheduler import FlowMatchScheduler

PROMPTS = ["a red puppet", "a wall"]
STEPS = [1000, 750, 500, 250]


def make_pipeline(folder, *overrides: str) -> BidirectionalInferencePipeline | CausalDiffusionInferencePipeline:
    settings = ["solver=euler", "sampling_steps=8", "guidance_scale=2.5", "timestep_shift=5", "num_frame_per_block=2"]
    return build_pipeline(load_config(overrides=[f"model_name={folder}", *settings, *overrides]), "cpu")


def trajectory(pipeline, noise: Tensor, **options) -> Tensor:
    embeds, negative = pipeline.text_encoder(PROMPTS), pipeline.text_encoder(["", ""])
    return ode_trajectory(
        pipeline.generator,
        noise,
        Conditioning(embeds),
        Conditioning(negative),
        timesteps=pipeline.generator.scheduler.warp(STEPS).tolist(),
        steps=8,
        guidance_scale=2.5,
        **options,
    )


@pytest.mark.parametrize(
    ("overrides", "frames", "options"),
    [
        (["causal=false", "num_output_frames=3"], 3, {}),
        (["num_output_frames=6", "num_training_frames=6"], 6, {"num_frame_per_block": 2}),
        (
            ["independent_first_frame=true", "num_output_frames=5", "num_training_frames=21", "context_noise=100"],
            5,
            {"num_frame_per_block": 2, "independent_first_frame": True, "context_noise": 100},
        ),
    ],
    ids=["bidirectional", "causal", "context noise"],
)
def test_its_end_is_what_the_pipeline_samples(tiny_model_folder, overrides, frames, options):
    pipeline = make_pipeline(tiny_model_folder, *overrides)
    noise = torch.randn(2, frames, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    _, expected = pipeline.inference(noise, PROMPTS, seeds=[1, 2], return_latents=True)
    states = trajectory(pipeline, noise, draw=SampleNoise([1, 2]), **options)
    assert states.shape == (2, 5, frames, 16, 4, 4) and states.dtype == torch.float32
    assert torch.equal(states[:, 0], noise)
    assert torch.equal(states[:, -1], expected)


def test_every_state_is_one_of_the_same_ode(tiny_model_folder):
    """Euler by hand: x' = x + (sigma' - sigma) flow from any state arrives at the next."""
    pipeline = make_pipeline(tiny_model_folder, "causal=false", "num_output_frames=3")
    noise = torch.randn(2, 3, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    states = trajectory(pipeline, noise)
    embeds, negative = (Conditioning(pipeline.text_encoder(words)) for words in (PROMPTS, ["", ""]))
    grid = FlowMatchScheduler(5.0).warp(torch.linspace(1000, 0, 9))
    x = noise
    with torch.no_grad():
        for i, (t, then) in enumerate(pairwise(grid)):
            if i % 2 == 0:
                torch.testing.assert_close(states[:, i // 2], x, rtol=1e-4, atol=1e-4)
            times = t.expand(2, 3)
            away, flow = (pipeline.generator(x, words, times)[0] for words in (negative, embeds))
            x = x + (then - t) / 1000 * (away + 2.5 * (flow - away))
    torch.testing.assert_close(states[:, -1], x, rtol=1e-4, atol=1e-4)


def test_guidance_of_one_takes_one_path(tiny_model_folder):
    pipeline = make_pipeline(tiny_model_folder, "causal=false", "num_output_frames=3", "guidance_scale=1")
    noise = torch.randn(2, 3, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    _, expected = pipeline.inference(noise, PROMPTS, return_latents=True)
    embeds = Conditioning(pipeline.text_encoder(PROMPTS))
    states = ode_trajectory(pipeline.generator, noise, embeds, timesteps=[1000.0], steps=8)
    assert states.shape[1] == 2
    assert torch.equal(states[:, -1], expected)


def test_places_on_the_training_grid():
    for shift in (3.0, 5.0, 8.0):
        scheduler = FlowMatchScheduler(shift)
        assert grid_places(scheduler.warp([1000, 750, 500, 250]).tolist(), 48, shift) == [0, 12, 24, 36]
        assert grid_places(scheduler.warp([1000, 500]).tolist(), 48, shift) == [0, 24]
    with pytest.raises(ValueError, match=r"48 solver steps at shift 5.0 do not pass through t = 921.1; use a number"):
        grid_places(FlowMatchScheduler(5.0).warp([1000, 700]).tolist(), 48, 5.0)
    with pytest.raises(ValueError, match="do not pass through"):  # steps warped by another shift, as upstream's pairs
        grid_places(FlowMatchScheduler(5.0).warp([1000, 750]).tolist(), 48, 8.0)
