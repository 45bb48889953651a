"""utils/memory.py: the plan's exact parts are exact, and the card it is meant for is enough."""

import pytest
import torch
from torch import nn

from utils.memory import module_bytes, plan_inference
from wan.configs import WAN_CONFIGS, WanConfig
from wan.modules.causal_model import CausalWanModel
from wan.modules.vae import WanVAE

SMALL = WanConfig(dim=32, ffn_dim=64, num_heads=2, num_layers=3, in_dim=4, out_dim=4, text_dim=16, text_len=8)
CPU = torch.device("cpu")


@pytest.mark.parametrize(("window", "num_frames"), [(-1, 9), (6, 9), (6, None)])
def test_weights_and_caches_are_exact(window: int, num_frames: int | None):
    model = CausalWanModel(SMALL, local_attn_size=window).bfloat16()
    plan = plan_inference(SMALL, height=64, width=32, num_frames=num_frames, local_attn_size=window, num_paths=2)
    assert plan.resident["transformer"] == module_bytes(model)
    cache = model.make_kv_cache(1, 8, 4, num_frames)
    assert plan.resident["KV cache"] == 2 * cache.num_bytes


def test_published_sizes():
    with torch.device("meta"):
        vae = WanVAE()
    plan = plan_inference(WAN_CONFIGS["Wan2.1-T2V-1.3B"], height=480, width=832, num_frames=21, vae=vae)
    assert round(plan.resident["transformer"] / 1e9, 2) == 2.84
    assert round(plan.resident["KV cache"] / 1e9, 1) == 6.0
    assert plan.peak < 24e9  # the card it is meant for
    assert "peak" in str(plan)


def test_an_offloaded_text_encoder_counts_only_while_it_reads():
    encoder = nn.Linear(1000, 1000)
    options = {"height": 64, "width": 32, "num_frames": 3, "text_encoder": encoder}
    stays, leaves = (plan_inference(SMALL, **options, offload_text_encoder=offload) for offload in (False, True))
    assert stays.resident["text encoder"] == leaves.phases["reading the prompt"] == module_bytes(encoder) // 2
    assert leaves.peak < stays.peak
    leaves.check(CPU)  # a few MB: every machine has them


def test_endless_streams_need_a_window():
    with pytest.raises(ValueError, match="set model_kwargs.local_attn_size"):
        plan_inference(SMALL, height=64, width=32, num_frames=None)


def test_an_image_tower_counts():
    sizes = {"height": 32, "width": 32, "num_frames": 3}
    plan = plan_inference(WAN_CONFIGS["puppet-tiny"], clip=torch.nn.Linear(10, 10), dtype=torch.float32, **sizes)
    assert plan.resident["CLIP"] == 4 * 110
