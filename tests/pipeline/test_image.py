"""Images as conditions: `y` streamed is `y` whole, every mode does what it says, and refuses what it cannot do."""

from itertools import islice

import pytest
import torch

from pipeline.build import build_pipeline
from pipeline.image import choose_image_mode, latents_of_still
from tests.wan.modules.test_causal_model import toy_model
from utils.conditioning import Conditioning, hold_last
from utils.config import load_config
from utils.wan_wrapper import WanVAEWrapper
from wan.configs import WAN_CONFIGS, WanConfig

SIZE = {"height": 32, "width": 32}
TOY_I2V = WanConfig(
    dim=48,
    ffn_dim=64,
    num_heads=2,
    num_layers=2,
    model_type="i2v",
    in_dim=10,
    out_dim=4,
    text_dim=12,
    text_len=5,
    freq_dim=16,
    clip_dim=8,
)


def build(folder, *overrides):
    settings = [f"model_name={folder}", "device=cpu", "denoising_step_list=[1000,500]"]
    return build_pipeline(load_config(None, [*settings, *overrides]))


def picture(seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def run(pipeline, num_frames=9, prompts=("a puppet",), image=None, **options):
    image = picture() if image is None else image
    return pipeline.inference(
        text_prompts=list(prompts),
        seeds=range(len(prompts)),
        num_frames=num_frames,
        input_image=image,
        return_latents=True,
        **SIZE,
        **options,
    )[1]


def test_y_streamed_is_y_whole(tiny_i2v_folder):
    pipeline = build(tiny_i2v_folder)
    clip = torch.cat([picture()[:, None], torch.zeros(1, 4 * 44, 3, 32, 32)], dim=1)
    whole = pipeline.vae.encode_to_latent(clip).transpose(1, 2)
    short = pipeline.encode_image(picture(), None)["y"]
    assert short.shape[2] < 30  # where this VAE's memory ends
    torch.testing.assert_close(hold_last(short, 0, 45)[:, 4:], whole, atol=1e-5, rtol=1e-5)
    blocks = [Conditioning(torch.zeros(1), y=short).frames(start, start + 3).y for start in range(0, 45, 3)]
    assert torch.equal(torch.cat(blocks, dim=2), pipeline.encode_image(picture(), 45)["y"])
    assert torch.equal(short[0, :4].amax((2, 3)), torch.eye(1, short.shape[2]).expand(4, -1))  # only latent 0 is known


def test_the_tail_is_found_in_the_embedded_vae_too():
    vae = WanVAEWrapper("puppet-tiny")
    latents = latents_of_still(vae, picture(), None)
    longer = vae.encode_to_latent(torch.cat([picture()[:, None], torch.zeros(1, 4 * 44, 3, 32, 32)], dim=1))
    assert latents.shape[1] < 45
    torch.testing.assert_close(longer[:, latents.shape[1] - 1 :].diff(dim=1).abs().max(), torch.tensor(0.0))
    torch.testing.assert_close(latents, longer[:, : latents.shape[1]], atol=1e-4, rtol=1e-4)


def test_cache_is_mask_with_image_and_clip():
    model = toy_model(config=TOY_I2V, num_frame_per_block=2)
    x, t = torch.randn(2, 4, 6, 4, 4), torch.rand(2, 3).mul(1000).repeat_interleave(2, dim=1)
    clean, y = torch.randn(2, 4, 6, 4, 4), torch.randn(2, 6, 6, 4, 4)
    context, tokens = torch.randn(2, 5, 12), torch.randn(2, 7, 8)
    with torch.no_grad():
        whole = model(x, t, context, tokens, y, clean_x=clean)
        cache, parts = model.make_kv_cache(2, 4, 4, 6), []
        for start in range(0, 6, 2):
            block = slice(start, start + 2)
            steer = (context, tokens, y[:, :, block])
            parts.append(model(x[:, :, block], t[:, block], *steer, kv_cache=cache))
            model(clean[:, :, block], torch.zeros(2, 2), *steer, kv_cache=cache)
            cache.commit(2)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, atol=1e-4, rtol=1e-4)


def test_prompt_and_image_are_forgotten_apart():
    model = toy_model(config=TOY_I2V, num_frame_per_block=2)
    x, y = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 6, 2, 4, 4)
    texts, images = torch.randn(2, 1, 5, 12), torch.randn(2, 1, 7, 8)

    def flow(text, image, cache):
        with torch.no_grad():
            return model(x, torch.tensor([500.0]), texts[text], images[image], y, kv_cache=cache)

    fresh = {(i, j): flow(i, j, model.make_kv_cache(1, 4, 4, 2)) for i in (0, 1) for j in (0, 1)}
    assert not torch.allclose(fresh[0, 0], fresh[0, 1]) and not torch.allclose(fresh[0, 0], fresh[1, 0])
    cache = model.make_kv_cache(1, 4, 4, 2)
    assert torch.equal(flow(0, 0, cache), fresh[0, 0])
    assert torch.equal(flow(1, 1, cache), fresh[0, 0])  # both are remembered
    cache.forget_prompt()
    assert torch.equal(flow(1, 1, cache), fresh[1, 0])
    cache.forget_image()
    assert torch.equal(flow(0, 1, cache), fresh[1, 1])


@pytest.mark.parametrize("steps", ["denoising_step_list=[1000,500]", "denoising_step_list=null"])
def test_an_i2v_stream_is_the_clip_cut_in_blocks(tiny_i2v_folder, steps):
    pipeline = build(tiny_i2v_folder, steps, "sampling_steps=2", "model_kwargs.local_attn_size=6")
    options = {"text_prompts": ["a", "b"], "seeds": [1, 2], "input_image": picture(batch=2), **SIZE}
    clip = pipeline.inference(num_frames=9, **options)
    blocks = list(islice(pipeline.stream(**options), 3))  # a stream without end begins in the same way
    assert torch.equal(torch.cat(blocks, dim=1), clip)
    other = pipeline.inference(num_frames=9, **options | {"input_image": picture(seed=1, batch=2)})
    assert not torch.allclose(other, clip, atol=1e-3)


def test_both_sides_of_guidance_see_the_image(tiny_i2v_folder, monkeypatch):
    pipeline = build(tiny_i2v_folder, "denoising_step_list=null", "sampling_steps=2")
    seen, forward = [], pipeline.generator.model.forward
    monkeypatch.setattr(
        pipeline.generator.model,
        "forward",
        lambda x, t, context, clip_fea, y, **options: seen.append(y) or forward(x, t, context, clip_fea, y, **options),
    )
    run(pipeline, num_frames=3)
    assert len(seen) == 4 and all(torch.equal(y, seen[0]) for y in seen)


def test_a_reference_pose_is_added_to_every_frame(tiny_i2v_folder):
    pipeline = build(tiny_i2v_folder)
    pose = torch.randn(1, 20, 4, 4)
    plain, posed = pipeline.encode_image(picture(), 5)["y"], pipeline.encode_image(picture(), 5, pose)["y"]
    torch.testing.assert_close(posed - plain, pose[:, :, None].expand(-1, -1, 5, -1, -1))
    with pytest.raises(ValueError, match="reference pose is"):
        pipeline.encode_image(picture(), 5, torch.randn(1, 20, 8, 4))


def test_context_is_a_given_first_frame(tiny_model_folder):
    pipeline = build(tiny_model_folder)
    by_hand = run(pipeline, num_frames=4, image=picture())
    given = pipeline.vae.encode_to_latent(picture()[:, None])
    assert torch.equal(by_hand[:, :1], given)
    options = {"text_prompts": ["a puppet"], "seeds": [0], "num_frames": 4, "return_latents": True, **SIZE}
    assert torch.equal(pipeline.inference(initial_latent=given, **options)[1], by_hand)


def test_a_reference_sink_is_seen_for_ever_and_never_shown(tiny_model_folder):
    pipeline = build(tiny_model_folder, "model_kwargs.local_attn_size=6", "model_kwargs.sink_size=1")
    one, other = (run(pipeline, 15, image=picture(seed), image_mode="ref_sink") for seed in (0, 1))
    assert one.shape[1] == 15
    assert pipeline.kv_cache_pos.slot(0) == 0 and pipeline.kv_cache_pos.start_frame == 13  # 0 and 12 remembered
    assert all(not torch.allclose(one[:, i], other[:, i], atol=1e-4) for i in (0, 14))


def test_a_bidirectional_i2v_model_takes_an_image(tiny_i2v_folder):
    pipeline = build(tiny_i2v_folder, "causal=false", "denoising_step_list=null", "sampling_steps=2")
    assert run(pipeline, 5).shape == (1, 5, 16, 4, 4)
    assert not torch.allclose(run(pipeline, 5), run(pipeline, 5, image=picture(1)), atol=1e-4)
    with pytest.raises(ValueError, match="give input_image"):
        pipeline.inference(text_prompts=["a"], num_frames=5, **SIZE)


def test_every_known_model_has_a_mode():
    assert choose_image_mode("auto", WAN_CONFIGS["Wan2.1-T2V-1.3B"]) == "context"
    assert choose_image_mode("auto", WAN_CONFIGS["Wan2.1-I2V-14B-720P"]) == "concat"
    with pytest.raises(ValueError, match="concat needs an i2v checkpoint.*use image_mode context"):
        choose_image_mode("concat", WAN_CONFIGS["Wan2.1-T2V-1.3B"])
    with pytest.raises(ValueError, match="is for t2v checkpoints"):
        choose_image_mode("ref_sink", WAN_CONFIGS["Wan2.1-I2V-14B-720P"])
    with pytest.raises(ValueError, match="'first' is unknown; use one of auto, context"):
        choose_image_mode("first", WAN_CONFIGS["Wan2.1-T2V-1.3B"])


def test_what_a_checkpoint_cannot_take_is_refused_before_anything_is_made(tiny_model_folder, tiny_i2v_folder):
    plain, i2v = build(tiny_model_folder, "model_kwargs.local_attn_size=6"), build(tiny_i2v_folder)
    with pytest.raises(ValueError, match="set model_kwargs.sink_size=1"):
        run(plain, image_mode="ref_sink")
    with pytest.raises(ValueError, match=r"input_image is \[1, 3, 16, 32\], the video needs \[1, 3, 32, 32\]"):
        run(plain, image=picture()[:, :, :16])
    with pytest.raises(ValueError, match="give input_image, or use a t2v model"):
        i2v.inference(text_prompts=["a"], num_frames=3, **SIZE)
    i2v.clip = None
    with pytest.raises(ValueError, match="CLIP tokens too"):
        run(i2v)


def test_guidance_in_one_pass_takes_images_along(tiny_i2v_folder):
    pipeline = build(tiny_i2v_folder, "denoising_step_list=null", "sampling_steps=2", "guidance_passes=two")
    two = run(pipeline, 6, ("a", "b"), picture(batch=2))
    pipeline.guidance_passes = "one"
    torch.testing.assert_close(run(pipeline, 6, ("a", "b"), picture(batch=2)), two, atol=1e-4, rtol=1e-4)
