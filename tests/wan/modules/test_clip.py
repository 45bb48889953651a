"""CLIP's vision tower from Wan's names: golden features, preprocessing, and files that do not fit."""

import pytest
import torch
from safetensors.torch import save_file

from tests.golden_data import load_golden
from wan.modules.clip import load_clip_vision, preprocess

# The last block, the final norm and the head are zeroed in the file: Wan never runs them.


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_golden("e_clip_vision")[0]


@pytest.fixture(scope="module")
def weights(golden) -> dict[str, torch.Tensor]:
    tower = {f"visual.{name[2:]}": tensor for name, tensor in golden.items() if name.startswith("w.")}
    return tower | {"log_scale": torch.zeros(()), "textual.norm.weight": torch.ones(3)}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_matches_golden(golden, weights, tmp_path, suffix):
    path = tmp_path / f"clip{suffix}"
    torch.save(weights, path) if suffix == ".pth" else save_file(weights, path)
    model = load_clip_vision(path, dtype=torch.float32, num_heads=4)
    features = model(golden["image"])
    assert features.shape == (1, 10, 32)
    torch.testing.assert_close(features, golden["out_31"], atol=1e-5, rtol=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_preprocess_matches_golden(golden):
    torch.testing.assert_close(preprocess(golden["image"], 42), golden["model_input"], atol=1e-5, rtol=1e-5)


def test_features_have_the_models_precision(golden, weights, tmp_path):
    save_file(weights, tmp_path / "clip.safetensors")
    model = load_clip_vision(tmp_path / "clip.safetensors", dtype=torch.bfloat16, num_heads=4)
    features = model(golden["image"].bfloat16())
    assert features.dtype == torch.bfloat16
    assert (features - golden["out_31"]).abs().mean() < 0.05 * golden["out_31"].std()


def test_pictures_come_to_where_the_model_is(golden, weights, tmp_path):
    """An image is loaded on the CPU, whatever device the model is on; "meta" stands for a GPU here."""
    save_file(weights, tmp_path / "clip.safetensors")
    model = load_clip_vision(tmp_path / "clip.safetensors", num_heads=4).to("meta")
    assert model(golden["image"]).device.type == "meta"


def test_load_names_what_does_not_fit(weights, tmp_path):
    path = tmp_path / "clip.safetensors"
    save_file({name: tensor for name, tensor in weights.items() if "0.norm1.bias" not in name}, path)
    with pytest.raises(ValueError, match=r"missing encoder\.layers\.0\.layer_norm1\.bias"):
        load_clip_vision(path, num_heads=4)
    save_file(weights | {"visual.surprise": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="unexpected surprise"):
        load_clip_vision(path, num_heads=4)
    save_file({"textual.norm.weight": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="no CLIP vision tower"):
        load_clip_vision(path)
