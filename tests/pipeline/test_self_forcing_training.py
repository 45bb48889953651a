"""The training walk is the inference walk; its gradient stays in its block and does not know how memory is saved."""

import pytest
import torch
from torch import Tensor

from pipeline import CausalDiffusionInferencePipeline, SelfForcingTrainingPipeline, Trajectory
from pipeline.samplers import SampleNoise
from tests.pipeline.test_causal_diffusion_inference import LatentsAsPixels
from tests.wan.modules.test_causal_model import TOY
from utils.conditioning import Conditioning
from utils.distributed import Rngs
from utils.wan_wrapper import WanDiffusionWrapper

EMBEDS = torch.randn(2, TOY.text_len, TOY.text_dim, generator=torch.Generator().manual_seed(1))
NOISE = torch.randn(2, 8, TOY.in_dim, 4, 4, generator=torch.Generator().manual_seed(2))
STEPS = [1000, 750, 500, 250]
MODES = {
    "plain": {},
    "window": {"window": 4},
    "window and sink": {"window": 4, "sink": 1},
    "relative positions": {"window": 4, "sink": 1, "rope_base": "window"},
    "noisy context": {"context_noise": 100.0},
    "no clean pass": {"clean_context": False},
    "no clean pass, window and sink": {"clean_context": False, "window": 4, "sink": 1},
}


def make_generator(window: int = -1, sink: int = 0, rope_base: str = "absolute") -> WanDiffusionWrapper:
    torch.manual_seed(0)
    options = {"local_attn_size": window, "sink_size": sink, "rope_base": rope_base, "num_frame_per_block": 2}
    generator = WanDiffusionWrapper(is_causal=True, from_scratch=True, model_config=TOY, **options)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return generator


def make_pipeline(
    window: int = -1, sink: int = 0, rope_base: str = "absolute", steps: list[float] = STEPS, **options
) -> SelfForcingTrainingPipeline:
    return SelfForcingTrainingPipeline(
        make_generator(window, sink, rope_base), num_frame_per_block=2, denoising_step_list=steps, **options
    )


def walk(pipeline: SelfForcingTrainingPipeline, exits: list[int] | int, noise: Tensor = NOISE, **options) -> Trajectory:
    given = options["initial_latent"].shape[1] if "initial_latent" in options else 0
    num_blocks = sum(not block.given for block in pipeline.plan(given + noise.shape[1], given))
    exits = [exits] * num_blocks if isinstance(exits, int) else exits
    return pipeline.rollout(noise, Conditioning(EMBEDS), exit_steps=exits, draw=SampleNoise([5, 6]), **options)


def inference(pipeline: SelfForcingTrainingPipeline, steps: list[float], noise: Tensor = NOISE, **options) -> Tensor:
    twin = CausalDiffusionInferencePipeline(
        pipeline.generator,
        lambda prompts: EMBEDS,
        LatentsAsPixels(),
        num_frame_per_block=2,
        denoising_step_list=steps,
        context_noise=pipeline.context_noise,
        clean_context=pipeline.clean_context,
        independent_first_frame=pipeline.independent_first_frame,
    )
    _, latents = twin.inference(noise, ["one", "two"], seeds=[5, 6], return_latents=True, **options)
    return latents


@pytest.mark.parametrize("num_steps", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_the_training_walk_is_the_inference_walk(mode: str, num_steps: int):
    pipeline = make_pipeline(**MODES[mode], steps=STEPS[:num_steps])
    trajectory = walk(pipeline, num_steps - 1)
    expected = inference(pipeline, STEPS[:num_steps])
    assert trajectory.latents.requires_grad
    if "window" not in MODES[mode]:
        assert torch.equal(trajectory.latents, expected)
    else:  # a ring of the window's size holds the same keys in another order
        torch.testing.assert_close(trajectory.latents, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("given", [1, 3])
@pytest.mark.parametrize("clean_context", [True, False])
def test_a_prefix_is_gone_on_from_as_in_inference(given: int, clean_context: bool):
    pipeline = make_pipeline(clean_context=clean_context)
    prefix = torch.randn(2, given, TOY.in_dim, 4, 4, generator=torch.Generator().manual_seed(3))
    trajectory = walk(pipeline, 3, NOISE[:, :4], initial_latent=prefix)
    assert torch.equal(trajectory.latents, inference(pipeline, STEPS, NOISE[:, :4], initial_latent=prefix))
    assert torch.equal(trajectory.latents[:, :given], prefix)
    assert trajectory.first_grad_frame == given


def test_a_first_frame_of_its_own():
    pipeline = make_pipeline(independent_first_frame=True)
    pipeline.generator.model.independent_first_frame = True
    trajectory = walk(pipeline, 3, NOISE[:, :5])
    assert torch.equal(trajectory.latents, inference(pipeline, STEPS, NOISE[:, :5]))


def test_an_early_exit_is_the_walk_of_a_shorter_step_list():
    pipeline = make_pipeline()
    for exit_step in range(4):
        trajectory = walk(pipeline, exit_step)
        assert torch.equal(trajectory.latents, inference(pipeline, STEPS[: exit_step + 1]))
        assert (trajectory.t_from, trajectory.t_to) == (STEPS[exit_step], [*STEPS, 0][exit_step + 1])
    mixed = walk(pipeline, [0, 3, 1, 2])
    assert (mixed.t_from, mixed.t_to) == (None, None)
    assert torch.equal(mixed.latents[:, :2], walk(pipeline, 0).latents[:, :2])


def test_times_between_steps_are_told_on_the_unshifted_grid():
    pipeline = make_pipeline(steps=[1000, 937.5, 2500 / 3, 625], warp_denoising_step=False)
    assert walk(pipeline, 1).t_from == pytest.approx(750, abs=1e-3)
    assert walk(pipeline, 2).t_to == pytest.approx(250, abs=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_no_gradient_crosses_blocks(mode: str):
    pipeline = make_pipeline(**MODES[mode])
    noise = NOISE.clone().requires_grad_()
    walk(pipeline, 0, noise).latents[:, -2:].square().sum().backward()
    assert noise.grad[:, :-2].abs().max() == 0
    assert noise.grad[:, -2:].abs().min() > 0


@pytest.mark.parametrize("mode", MODES)
def test_checkpointing_changes_nothing(mode: str):
    gradients = []
    for checkpointing in (False, True):
        pipeline = make_pipeline(**MODES[mode])
        pipeline.generator.model.gradient_checkpointing = checkpointing
        walk(pipeline, 1).latents.square().sum().backward()
        gradients.append({name: p.grad for name, p in pipeline.generator.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(grad.abs().max() > 0 for name, grad in gradients[0].items() if not name.endswith("k.bias")), "all learn"


def test_only_the_end_of_a_long_clip_learns():
    pipeline = make_pipeline(num_grad_frames=4)
    noise = NOISE.clone().requires_grad_()
    trajectory = walk(pipeline, 0, noise)
    assert trajectory.first_grad_frame == 6  # frame 4 becomes the scores' first frame, 5 is of its block
    trajectory.latents.square().sum().backward()
    learns = noise.grad.abs().amax(dim=(0, 2, 3, 4)) > 0
    assert learns.tolist() == [False] * 6 + [True] * 2
    assert torch.equal(trajectory.latents, inference(pipeline, STEPS[:1]))


@pytest.mark.parametrize("clean_context", [True, False])
def test_mixed_precision_leaves_no_parameter_behind(clean_context: bool):
    """Autocast keeps cast weights: those that a step without gradient cast must not serve the exit step."""
    gradients = []
    for half in (False, True):
        pipeline = make_pipeline(clean_context=clean_context, cache_dtype=torch.bfloat16 if half else None)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            latents = walk(pipeline, 2).latents
        assert latents.dtype == torch.float32
        latents.square().mean().backward()
        gradients.append({name: p.grad for name, p in pipeline.generator.named_parameters()})
    whole, rounded = (torch.cat([grad.flatten() for grad in each.values()]) for each in gradients)
    assert (whole - rounded).norm() < 0.03 * whole.norm()


def test_without_gradient_nothing_carries_one():
    with torch.no_grad():
        assert not walk(make_pipeline(), 2).latents.requires_grad


def test_exit_steps_are_a_decision_of_the_step_and_of_nothing_else():
    pipeline = make_pipeline()

    def draw(step: int, **settings: bool) -> list[int]:
        vars(pipeline).update({"same_step_across_blocks": True, "last_step_only": False, **settings})
        return pipeline.draw_exit_steps(3, Rngs(0, step, torch.device("cpu")).shared)

    assert draw(7) == draw(7)
    assert {tuple(draw(step)) for step in range(40)} == {(i,) * 3 for i in range(4)}
    assert len({tuple(draw(step, same_step_across_blocks=False)) for step in range(40)}) > 20
    assert draw(0, last_step_only=True) == [3, 3, 3]
    with pytest.raises(ValueError):
        walk(pipeline, [1, 1, 1])  # four blocks
