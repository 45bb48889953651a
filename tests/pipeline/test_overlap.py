"""pipeline/overlap.py: decoded beside denoising or after it, the pictures are the same; on a CPU see test_build.py."""

from functools import partial
from itertools import islice

import pytest
import torch

from pipeline.build import build_pipeline
from pipeline.graphs import CudaRecorder
from utils.config import load_config

SIZE = {"height": 128, "width": 128}
pytestmark = pytest.mark.gpu  # a CPU has no streams


def build(folder, *overrides):
    settings = [f"model_name={folder}", "device=cuda:0", "dtype=float32", "denoising_step_list=[1000,750,500,250]"]
    return build_pipeline(load_config(None, [*settings, "model_kwargs.local_attn_size=6", *overrides]))


def devices() -> list[str]:
    return ["auto", *(["cuda:1"] if torch.cuda.device_count() > 1 else [])]


def equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(found, expected)


def test_pictures_are_those_of_the_sequential_road(tiny_model_folder):
    """Whole clips, streams that are dropped half-way, after a driving video; launched and replayed; again and again."""
    plain = build(tiny_model_folder)
    options = {"text_prompts": ["a puppet"], "seeds": [3], **SIZE}
    clip = plain.inference(num_frames=15, **options).cpu()
    drive = torch.rand(1, 33, 3, 128, 128) * 2 - 1
    driven = plain.inference(video=drive, strength=0.5, **options).cpu()
    for device in devices():
        beside = build(tiny_model_folder, "vae_overlap=true", f"vae_device={device}")
        for records in (False, True):
            if records:
                beside.record_passes(CudaRecorder(beside.device))
            same = partial(torch.testing.assert_close, atol=1e-4, rtol=0) if records else equal
            for _ in range(4):
                same(beside.inference(num_frames=15, **options).cpu(), clip)
                begun = list(islice(beside.stream(**options), 2))
                same(torch.cat(begun, dim=1).cpu(), clip[:, : 1 + 4 * 5])
            same(beside.inference(video=drive, strength=0.5, **options).cpu(), driven)
            pieces = iter(drive.split(5, dim=1))
            same(beside.inference(video=pieces, strength=0.5, num_frames=9, **options).cpu(), driven)
