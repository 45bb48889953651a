"""Video to video: any length, any pieces, constant memory; strength says how much is left."""

import gc
from itertools import islice

import pytest
import torch

from pipeline.driving import DrivingVideo, skipped_steps, whole_blocks
from pipeline.rollout import plan_blocks
from tests.pipeline.test_image import SIZE, build, picture

FEW, MANY = "denoising_step_list=[1000,750,500,250]", "denoising_step_list=null"


def clip(num_frames: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, num_frames, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def options(**more):
    return {"text_prompts": ["a puppet"], "seeds": [0], **SIZE, **more}


@pytest.fixture(scope="module", params=[FEW, MANY], ids=["few", "many"])
def pipeline(request, tiny_model_folder):
    return build(tiny_model_folder, request.param, "sampling_steps=4", "model_kwargs.local_attn_size=6")


@pytest.mark.parametrize("num_frames", [1, 5, 9, 10, 30])
def test_as_many_frames_come_out_as_went_in(pipeline, num_frames):
    assert pipeline.inference(**options(video=clip(num_frames))).shape == (1, num_frames, 3, 32, 32)


def test_pieces_make_the_same_video_as_the_whole(pipeline):
    whole = pipeline.inference(**options(video=clip(30)))
    for size in (1, 7, 16):
        streamed = pipeline.stream(**options(video=iter(clip(30).split(size, dim=1))))
        torch.testing.assert_close(torch.cat(list(streamed), dim=1), whole, atol=1e-4, rtol=1e-4)


def test_full_strength_ignores_the_video_and_little_keeps_it(pipeline):
    free = pipeline.inference(**options(num_frames=9))
    distance = {}
    for strength in (0.25, 0.5, 1.0):
        made = pipeline.inference(**options(video=clip(33), strength=strength))
        distance[strength] = (
            (made - pipeline.inference(**options(video=clip(33, seed=1), strength=strength))).abs().mean()
        )
    assert torch.equal(made, free)
    assert distance[0.25] > distance[0.5] > distance[1.0] == 0


def test_the_text_is_followed(pipeline):
    one, other = (pipeline.inference(**options(video=clip(9), text_prompts=[text])) for text in ("red", "blue"))
    assert not torch.allclose(one, other, atol=1e-4)


def test_each_block_is_made_after_its_own_latents(tiny_model_folder):
    """One step from a little noise, and a network that predicts no flow: what comes out is what went in."""
    pipeline = build(tiny_model_folder, "denoising_step_list=[1000,1]", "model_kwargs.local_attn_size=6")
    torch.nn.init.zeros_(pipeline.generator.model.head.head.weight)
    torch.nn.init.zeros_(pipeline.generator.model.head.head.bias)
    latents = pipeline.inference(**options(video=clip(33), strength=0.5, return_latents=True))[1]
    torch.testing.assert_close(latents, pipeline.vae.encode_to_latent(clip(33)), atol=0.03, rtol=0)


def test_a_first_image_and_a_reference_go_together_with_a_video(tiny_model_folder):
    pipeline = build(tiny_model_folder, FEW, "model_kwargs.local_attn_size=6", "model_kwargs.sink_size=1")
    first = pipeline.inference(**options(video=clip(13), input_image=picture(), return_latents=True))
    assert first[0].shape[1] == 13
    assert torch.equal(first[1][:, :1], pipeline.vae.encode_to_latent(picture()[:, None]))
    assert pipeline.inference(**options(video=clip(13), input_image=picture(), image_mode="ref_sink")).shape[1] == 13


def test_a_video_without_end_takes_constant_memory(tiny_model_folder):
    pipeline = build(tiny_model_folder, "denoising_step_list=[1000,500]", "model_kwargs.local_attn_size=6")

    def camera():
        while True:
            yield clip(5)

    stream, sizes = pipeline.stream(**options(video=camera())), []
    for index, _ in enumerate(islice(stream, 25)):
        if index in (3, 13, 23):  # blocks of 12 frames after pieces of 5: the same rest waits every 5 blocks
            gc.collect()
            sizes.append(sum(x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor))
    assert sizes[0] == sizes[1] == sizes[2]


def test_mistakes_are_sentences(pipeline):
    with pytest.raises(ValueError, match="no frames"):
        pipeline.inference(**options(video=clip(0)))
    with pytest.raises(ValueError, match=r"\[1, frames, 3, 32, 32\] is needed"):
        pipeline.inference(**options(video=clip(9)[..., :16]))
    for strength in (0, 1.5):
        with pytest.raises(ValueError, match=r"strength is .*\(0, 1\]"):
            pipeline.inference(**options(video=clip(9), strength=strength))


def test_steps_and_blocks_are_counted():
    assert [skipped_steps(4, strength) for strength in (0.01, 0.25, 0.5, 0.75, 1.0)] == [3, 3, 2, 1, 0]
    assert [whole_blocks(n, (1, 3)) for n in (1, 4, 5)] == [4, 4, 7] and whole_blocks(7, (0, 3)) == 9


def test_given_frames_use_up_their_part_of_the_video(pipeline):
    driving = DrivingVideo(pipeline.vae, clip(21), (1, 32, 32))
    latents = [driving.latents for _ in driving.follow(plan_blocks(None, 3, False, 2), num_hidden=1)]
    # blocks [0, 2) given, of which 0 is hidden, [2, 5), [5, 8): 1, 3 and 2 latents' worth of frames, the last filled up
    assert [part.shape[1] for part in latents] == [1, 3, 3] and driving.num_frames == 21
    whole = pipeline.vae.encode_to_latent(clip(21))
    torch.testing.assert_close(torch.cat(latents, dim=1)[:, :6], whole, atol=1e-4, rtol=1e-4)
