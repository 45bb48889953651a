"""LoRA: the released names at full size, every spelling of them, nothing half merged."""

import gzip
import json

import pytest
import torch

from tests.golden_data import FOLDER
from tests.wan.modules.test_causal_model import toy_model
from wan.configs import WAN_CONFIGS
from wan.modules.lora import find_lora, merge_lora
from wan.modules.model import WanModel

MODULES = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k", "cross_attn.v")
MODULES += ("cross_attn.o", "ffn.0", "ffn.2")


def released_names(model, rank=3, name="pipe.dit.{}.lora_{}.default.weight", sides="AB"):
    """Random updates of a model under the names of UniAnimate's release."""
    tensors = {}
    for i in range(len(model.blocks)):
        for module in MODULES:
            out, width = model.get_parameter(f"blocks.{i}.{module}.weight").shape
            tensors[name.format(f"blocks.{i}.{module}", sides[0])] = torch.randn(rank, width)
            tensors[name.format(f"blocks.{i}.{module}", sides[1])] = torch.randn(out, rank)
    return tensors


def test_the_released_file_fits_the_14b_model():
    published = json.loads(gzip.decompress((FOLDER / "manifests" / "unianimate_lora.json.gz").read_bytes()))
    tensors = {name: torch.empty(shape, device="meta") for name, shape in published.items()}
    assert len(tensors) == 800
    with torch.device("meta"):
        model = WanModel(WAN_CONFIGS["Wan2.1-I2V-14B-720P"])
    ranks = merge_lora(model, tensors)
    assert len(ranks) == 400
    assert {*ranks.values()} == {128}
    assert not any("_img" in module for module in ranks)
    with torch.device("meta"):
        small = WanModel(WAN_CONFIGS["Wan2.1-T2V-1.3B"])
    with pytest.raises(ValueError, match=r"\[5120, 5120\], here it is \[1536, 1536\]"):
        merge_lora(small, tensors)


SPELLINGS = (
    ("pipe.dit.{}.lora_{}.default.weight", "AB"),
    ("{}.lora_{}.weight", "AB"),
    ("diffusion_model.{}.lora_{}.weight", ("down", "up")),
    ("base_model.model.{}.lora_{}.weight", "AB"),
)


@pytest.mark.parametrize(("name", "sides"), SPELLINGS)
def test_every_spelling_is_the_same_update(name, sides):
    model = toy_model()
    torch.manual_seed(1)
    tensors = released_names(model, name=name, sides=sides)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    merge_lora(model, tensors, alpha=0.5)
    for key, tensor in model.state_dict().items():
        module = key.removesuffix(".weight")
        expected = before[key]
        if module.removeprefix("blocks.0.").removeprefix("blocks.1.") in MODULES and key.endswith("weight"):
            halves = (tensors[name.format(module, side)] for side in reversed(sides))
            expected = expected + 0.5 * torch.matmul(*halves)
        torch.testing.assert_close(tensor, expected)


def test_a_files_own_alpha_is_over_its_rank():
    model = toy_model()
    tensors = {"blocks.0.ffn.0.lora_down.weight": torch.ones(4, 48), "blocks.0.ffn.0.alpha": torch.tensor(2.0)}
    tensors["blocks.0.ffn.0.lora_up.weight"] = torch.ones(model.config.ffn_dim, 4)
    before = model.blocks[0].ffn[0].weight.clone()
    merge_lora(model, tensors)
    torch.testing.assert_close(model.blocks[0].ffn[0].weight - before, torch.full_like(before, 2.0))


def test_what_does_not_fit_changes_nothing():
    model = toy_model()
    before = model.blocks[0].ffn[0].weight.clone()
    good = {"blocks.0.ffn.0.lora_A.weight": torch.ones(4, 48)}
    good["blocks.0.ffn.0.lora_B.weight"] = torch.ones(model.config.ffn_dim, 4)
    with pytest.raises(ValueError, match=r"blocks\.9\.ffn\.0, which this model does not have"):
        merge_lora(model, good | {name.replace("s.0", "s.9", 1): tensor for name, tensor in good.items()})
    assert torch.equal(model.blocks[0].ffn[0].weight, before)
    with pytest.raises(ValueError, match="only one of its two halves"):
        find_lora(dict([*good.items()][:1]))
    with pytest.raises(ValueError, match="no LoRA tensors"):
        merge_lora(model, {"dwpose_embedding.0.weight": torch.ones(1)})
