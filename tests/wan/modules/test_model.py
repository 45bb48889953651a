"""The bidirectional transformer: golden vectors, diffusers as a second witness, the official names and shapes."""

import gzip
import json

import pytest
import torch

from tests.golden_data import FOLDER, below, load_golden, wan_config
from wan.configs import WAN_CONFIGS, WanConfig
from wan.modules.causal_model import CausalWanModel
from wan.modules.model import WanModel, WanRMSNorm, sinusoidal_embedding
from wan.modules.rope import apply_rope, rope_frequencies
from wan.modules.weights import assign_weights, load_weights, save_safetensors

TOLERANCE = 1e-4
MANIFESTS = {
    "wan2.1_t2v_1.3b": "Wan2.1-T2V-1.3B",
    "wan2.1_t2v_14b": "Wan2.1-T2V-14B",
    "wan2.1_i2v_14b": "Wan2.1-I2V-14B-480P",
}


def manifest(name: str) -> dict[str, list[int]]:
    with gzip.open(FOLDER / "manifests" / f"{name}.json.gz", "rt", encoding="utf-8") as file:
        return json.load(file)


@pytest.mark.parametrize("name", ["b_wan_t2v", "b_wan_i2v"])
def test_forward_reproduces_the_reference(name):
    tensors, config = load_golden(name)
    model = WanModel(wan_config(config))
    assign_weights(model, below(tensors, "w"), name)
    for case in config["subcases"]:
        inputs = below(tensors, case)
        with torch.no_grad():
            out = model(inputs["x"], inputs["t"], inputs["context"], inputs.get("clip_fea"), inputs.get("y"))
        torch.testing.assert_close(out, inputs["out"], atol=TOLERANCE, rtol=TOLERANCE)


def test_forward_equals_diffusers():
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    tensors, config = load_golden("b_wan_t2v")
    weights, inputs = below(tensors, "w"), below(tensors, "b2")
    model = WanModel(wan_config(config))
    assign_weights(model, weights, "golden")
    theirs = WanTransformer3DModel(
        num_attention_heads=config["num_heads"],
        attention_head_dim=config["dim"] // config["num_heads"],
        in_channels=config["in_dim"],
        out_channels=config["out_dim"],
        text_dim=config["text_dim"],
        freq_dim=config["freq_dim"],
        ffn_dim=config["ffn_dim"],
        num_layers=config["num_layers"],
    )
    theirs.load_state_dict(convert_wan_transformer_to_diffusers(dict(weights)))
    with torch.no_grad():
        ours = model(inputs["x"], inputs["t"], inputs["context"])
        oracle = theirs(inputs["x"], inputs["t"], inputs["context"], return_dict=False)[0]
    torch.testing.assert_close(ours, oracle, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("network", [WanModel, CausalWanModel])
@pytest.mark.parametrize("name", MANIFESTS)
def test_names_and_shapes_are_the_official_checkpoints(name, network):
    with torch.device("meta"):
        model = network(WAN_CONFIGS[MANIFESTS[name]])
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == manifest(name)


def test_parameter_counts():
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in WanModel(config).parameters()) for name, config in WAN_CONFIGS.items()}
    assert counts["Wan2.1-T2V-1.3B"] == 1_418_996_800
    assert counts["Wan2.1-T2V-14B"] == 14_288_491_584
    assert counts["Wan2.1-I2V-14B-720P"] == 16_394_878_784


def test_primitives_reproduce_the_reference():
    tensors, config = load_golden("k_primitives")
    sinus = below(tensors, "sinus")
    torch.testing.assert_close(
        sinusoidal_embedding(sinus["t"], config["freq_dim"]), sinus["out_f64"].float(), atol=1e-6, rtol=0
    )
    rope, (frames, height, width) = below(tensors, "rope"), config["grid"]
    num_tokens = frames * height * width
    for start, key in ((0, "out"), (int(rope["start_frame"]), "out_start")):
        positions = rope_frequencies(config["head_dim"], range(start, start + frames), height, width)
        rotated = apply_rope(rope["x"][:, :num_tokens], positions)
        torch.testing.assert_close(rotated, rope[key][:, :num_tokens], atol=1e-5, rtol=1e-5)
    norm = below(tensors, "norm")
    rms = WanRMSNorm(config["dim"], eps=1e-6)
    rms.weight.data = norm["rms_weight"].float()
    torch.testing.assert_close(rms(norm["x"]), norm["rms_out"], atol=1e-5, rtol=1e-5)
    unpatchify = below(tensors, "unpatchify")
    _, channels, frames, height, width = unpatchify["video"].shape
    small = WanConfig(dim=8, ffn_dim=8, num_heads=1, num_layers=1, out_dim=channels)
    video = WanModel(small).unpatchify(unpatchify["tokens"], (frames, height // 2, width // 2))
    assert torch.equal(video, unpatchify["video"])


def test_positions_have_no_table_to_outgrow():
    cos, sin = rope_frequencies(128, [10**6], 1, 1)
    angles = 10**6 * 10000.0 ** -(torch.arange(22, dtype=torch.float64) / 22)
    torch.testing.assert_close(cos[0, 0, :22], angles.cos().float())
    torch.testing.assert_close(sin[0, 0, :22], angles.sin().float())
    assert torch.equal(rope_frequencies(64, range(3, 6), 2, 2)[0], rope_frequencies(64, [3, 4, 5], 2, 2)[0])


def test_saved_and_loaded_weights_are_the_same(tmp_path):
    _, config = load_golden("b_wan_t2v")
    model = WanModel(wan_config(config))
    model.save_pretrained(tmp_path)
    loaded = WanModel.from_pretrained(tmp_path)
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert WanModel.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_wrong_weights_are_refused_with_the_first_difference(tmp_path):
    config = WanConfig(dim=8, ffn_dim=8, num_heads=1, num_layers=1)
    model = WanModel(config)
    weights = model.state_dict()
    weights["head.head.bias"] = torch.zeros(3)
    weights["stranger"] = weights.pop("patch_embedding.bias")
    with pytest.raises(
        ValueError, match=r"missing patch_embedding.bias \[8\]; unexpected stranger.*head.head.bias has \[3\]"
    ):
        assign_weights(model, weights, "test")
    path = tmp_path / "cut.safetensors"
    save_safetensors(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged or cut off.*download it again"):
        load_weights(model, [path])
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_weights(model, [tmp_path / "absent.pt"])
