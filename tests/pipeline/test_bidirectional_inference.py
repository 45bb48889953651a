"""The whole-clip pipeline: its promises to a caller who knows the causal one."""

import pytest
import torch

from pipeline import BidirectionalInferencePipeline
from pipeline.build import build_pipeline
from utils.config import load_config

SIZE = {"num_frames": 3, "height": 32, "width": 48}
STEPS = ["sampling_steps=2", "guidance_scale=2"]


@pytest.fixture(scope="module")
def pipeline(tiny_model_folder) -> BidirectionalInferencePipeline:
    return build_pipeline(load_config(overrides=[f"model_name={tiny_model_folder}", "causal=false", *STEPS]), "cpu")


def test_a_whole_clip_in_one_piece(pipeline):
    (streamed,) = pipeline.stream(text_prompts="a puppet", seeds=[1], **SIZE)
    clip, latents = pipeline.inference(text_prompts=["a puppet"], seeds=[1], return_latents=True, **SIZE)
    assert clip.shape == (1, 9, 3, 32, 48) and latents.shape == (1, 3, 16, 4, 6)
    assert torch.equal(streamed, clip) and 0 <= clip.min() < clip.max() <= 1


def test_a_video_depends_on_its_own_prompt_and_seed_only(pipeline):
    together = pipeline.inference(text_prompts=["a puppet", "a wall"], seeds=[1, 2], **SIZE)
    alone = pipeline.inference(text_prompts=["a wall"], seeds=[2], **SIZE)
    torch.testing.assert_close(alone[0], together[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_guidance_of_one_asks_for_no_negative_prompt(pipeline, monkeypatch):
    asked = []
    encode = pipeline.text_encoder.forward
    monkeypatch.setattr(
        pipeline.text_encoder, "forward", lambda prompts: asked.append(list(prompts)) or encode(prompts)
    )
    monkeypatch.setattr(pipeline, "guidance_scale", 1.0)
    pipeline.inference(text_prompts=["a puppet"], seeds=[1], **SIZE)
    assert asked == [["a puppet"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 100}, "height 100 and width 48 must be multiples of 16 and 16"),
        ({"width": None}, "width None"),
        ({"text_prompts": []}, "no prompt"),
        ({"num_frames": None}, "needs num_frames"),
        ({"seeds": [1, 2]}, "1 samples but 2 seeds"),
        ({"initial_latent": torch.zeros(1, 1, 16, 4, 6)}, "set causal=true"),
    ],
)
def test_what_does_not_fit_is_refused(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline.inference(**{"text_prompts": ["a puppet"], **SIZE, **arguments})
