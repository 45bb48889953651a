"""Steps that are left out: a plan made once, nothing at threshold 0, never the first, the last or the clean pass."""

import json

import numpy as np
import pytest
import torch

from pipeline.build import build_pipeline
from pipeline.teacache import PUBLISHED, ChangeMeter, TeaCache, fit, load_coefficients, modulation_changes
from tests.pipeline.test_causal_diffusion_inference import SIZE, toy_pipeline
from utils.config import load_config
from utils.solvers import make_solver
from wan.configs import WAN_CONFIGS

OPTIONS = {"text_prompts": ["a"], "seeds": [1], "num_frames": 6, **SIZE}
LINEAR = (1.0, 0.0)  # a step's change is that of its modulation


def pipeline_of(threshold: float | None, **options):
    pipeline = toy_pipeline(few=False, teacache=None if threshold is None else TeaCache(LINEAR, threshold), **options)
    pipeline.sampling_steps = 8
    return pipeline


def test_threshold_zero_changes_no_bit():
    assert torch.equal(pipeline_of(0.0).inference(**OPTIONS), pipeline_of(None).inference(**OPTIONS))


def test_a_plan_computes_first_and_last_and_fewer_with_a_higher_threshold():
    model, timesteps = toy_pipeline().generator.model, make_solver("unipc", 12, 3.0, "cpu").timesteps
    typical = modulation_changes(model, timesteps).mean()
    plans = [TeaCache(LINEAR, times * typical).plan(model, timesteps) for times in (0.0, 1.5, 3.0, 1e9)]
    assert all(plan[0] and plan[-1] and len(plan) == 12 for plan in plans)
    assert sum(plans[0]) == 12 > sum(plans[1]) > sum(plans[2]) > sum(plans[3]) == 2
    assert TeaCache(LINEAR, 1.5 * typical).plan(model, timesteps) == plans[1]
    assert TeaCache(LINEAR, 0.2).plan(model, timesteps[-1:]) == (True,)


def test_only_planned_steps_run_the_blocks_and_clean_passes_always_do():
    pipeline = pipeline_of(0.5)
    plan = pipeline._steps_computed(0)
    assert 2 < sum(plan) < 8
    ran, first = [], pipeline.generator.model.blocks[0]
    first.register_forward_pre_hook(lambda *_: ran.append(1))
    pipeline.inference(**OPTIONS)
    assert len(ran) == 2 * (3 * sum(plan) + 2)  # two sides of guidance; three blocks, two of which become context


def test_both_sides_in_one_pass_leave_out_the_same():
    videos = [pipeline_of(0.5, guidance_passes=passes).inference(**OPTIONS) for passes in ("one", "two")]
    torch.testing.assert_close(*videos, atol=1e-5, rtol=1e-5)


def test_a_driving_video_has_a_plan_of_the_steps_it_takes(tiny_model_folder):
    settings = [f"model_name={tiny_model_folder}", "device=cpu", "sampling_steps=8", "solver=euler"]
    pipeline = build_pipeline(load_config(None, settings))
    pipeline.teacache = TeaCache(LINEAR, 1e9)
    video = torch.rand(1, 9, 3, 32, 32)
    pipeline.inference(text_prompts=["a"], seeds=[0], video=video, strength=0.5, height=32, width=32)
    assert pipeline._steps_computed(4) == (True, False, False, True)


def test_a_bidirectional_model_leaves_out_steps_too(tiny_model_folder):
    settings = [f"model_name={tiny_model_folder}", "device=cpu", "sampling_steps=8", "causal=false"]
    pipeline = build_pipeline(load_config(None, settings))
    full = pipeline.inference(**OPTIONS)
    pipeline.teacache = TeaCache(LINEAR, 0.0)
    assert torch.equal(pipeline.inference(**OPTIONS), full)
    pipeline.teacache = TeaCache(LINEAR, 1e9)
    assert not torch.allclose(pipeline.inference(**OPTIONS), full, atol=1e-4)


def test_the_meter_sees_what_the_blocks_add():
    pipeline = pipeline_of(0.0)
    with ChangeMeter(pipeline.generator.model) as meter:
        pipeline.inference(**OPTIONS)
    changes = meter.changes()
    assert changes.shape == (7,) and (changes > 0).all()
    with ChangeMeter(pipeline.generator.model) as idle:
        pass
    pipeline.inference(**OPTIONS)  # the hook is gone
    assert idle.changes().size == 0


def test_a_fit_finds_its_polynomial():
    modulation = np.linspace(0.05, 0.6, 12)
    wanted = (3.0, -2.0, 0.5, 1.0, 0.1)
    np.testing.assert_allclose(fit(modulation, np.polyval(wanted, modulation)), wanted, atol=1e-6)
    with pytest.raises(ValueError, match="sampling_steps of 6 or more"):
        fit(modulation[:4], modulation[:4])


def test_modulation_changes_by_hand():
    model = toy_pipeline().generator.model
    times = torch.tensor([900.0, 500.0, 100.0])
    with torch.no_grad():
        one, two, three = (model.embed_time(t.view(1, 1))[1] for t in times)
    by_hand = [((b - a).abs().mean() / a.abs().mean()).item() for a, b in ((one, two), (two, three))]
    np.testing.assert_allclose(modulation_changes(model, times), by_hand, rtol=1e-5)


def test_coefficients_come_from_the_folder_or_the_publication(tmp_path, caplog):
    assert set(PUBLISHED) <= set(WAN_CONFIGS)
    path = tmp_path / "teacache.json"
    assert load_coefficients(path, "Wan2.1-T2V-1.3B", "") == PUBLISHED["Wan2.1-T2V-1.3B"]
    with pytest.raises(ValueError, match="make it with: python scripts/calibrate_teacache.py"):
        load_coefficients(path, "mine", "")
    path.write_text(json.dumps({"coefficients": [1, 2], "weights": "abc"}))
    assert load_coefficients(path, "mine", "abc") == (1.0, 2.0) and not caplog.text
    load_coefficients(path, "mine", "other")
    assert "made for other weights" in caplog.text
    path.write_text("{}")
    with pytest.raises(ValueError, match="no TeaCache calibration"):
        load_coefficients(path, "mine", "abc")


def test_few_steps_refuse(tiny_model_folder):
    with pytest.raises(ValueError, match="few-step one needs all"):
        toy_pipeline(few=True, teacache=TeaCache(LINEAR, 0.1))
    with pytest.raises(ValueError, match="teacache is 0.1; it is 0 for few-step"):
        load_config(None, ["denoising_step_list=[1000,500]", "teacache=0.1"])
