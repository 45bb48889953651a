"""utils/flops.py: the formula counts what torch counts, and what the sizes of Wan give on paper."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.wan.modules.test_causal_model import TOY
from utils.flops import pass_flops, pose_flops
from wan.configs import WAN_CONFIGS
from wan.modules.causal_model import CausalWanModel
from wan.modules.pose import DWPoseEmbedding


def test_a_pass_counts_as_torch_counts_it():
    """Attention as plain matrix products: torch does not count the CPU's fused kernel."""
    model = CausalWanModel(TOY, num_frame_per_block=2)
    x, t = torch.randn(1, TOY.in_dim, 2, 4, 4), torch.zeros(1, 2)
    words = torch.randn(1, TOY.text_len, TOY.text_dim)
    cache, tokens = model.make_kv_cache(1, 4, 4, 4), 2 * 4
    time_layers = 2 * 2 * (TOY.freq_dim * TOY.dim + TOY.dim**2 + 6 * TOY.dim**2)  # per frame; not counted by us
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for num_keys, text_keys in ((tokens, True), (tokens, False)):
            with FlopCounterMode(display=False) as counter:
                model(x, t, words, kv_cache=cache)
            ours = pass_flops(TOY, tokens, num_keys, text_keys=text_keys)
            assert counter.get_total_flops() - time_layers == ours
        cache.commit(2)
        with FlopCounterMode(display=False) as counter:
            model(x, t, words, kv_cache=cache)
    assert counter.get_total_flops() - time_layers == pass_flops(TOY, tokens, 2 * tokens, text_keys=False)


def test_wan_on_paper():
    assert pass_flops(WAN_CONFIGS["Wan2.1-T2V-1.3B"], 32760) == pytest.approx(283e12, rel=0.01)
    assert pass_flops(WAN_CONFIGS["Wan2.1-T2V-14B"], 32760) == pytest.approx(1676e12, rel=0.01)
    blocks = [pass_flops(WAN_CONFIGS["Wan2.1-T2V-1.3B"], 4680, 4680 * n) for n in range(1, 8)]
    assert sum(blocks) == pytest.approx(198e12, rel=0.01)


def test_pose_network_is_counted_as_torch_counts_it():
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        DWPoseEmbedding(8)(torch.zeros(1, 3, 9, 32, 48))
    assert pose_flops(9, 32, 48, 8) == counter.get_total_flops()
