"""Pose networks: the published numbers, streams equal to whole clips in fixed memory, the published names."""

import gzip
import json
import math

import pytest
import torch

from tests.golden_data import FOLDER, below, load_golden, wan_config
from tests.wan.modules.test_causal_model import toy_model
from wan.configs import WAN_CONFIGS
from wan.modules.causal_model import CausalWanModel
from wan.modules.lora import merge_lora
from wan.modules.model import WanModel
from wan.modules.pose import (
    DWPoseEmbedding,
    RandomRefPoseEmbedding,
    StreamingPoseEncoder,
    fold_pose_proj,
    pose_weights,
    project_features,
)
from wan.modules.weights import assign_weights

TOLERANCE = 1e-4


def manifest(name: str) -> dict[str, list[int]]:
    return json.loads(gzip.decompress((FOLDER / "manifests" / f"{name}.json.gz").read_bytes()))


@pytest.fixture(scope="module")
def golden():
    """Inputs and outputs, and (dwpose_embedding, randomref_embedding_pose, transformer)."""
    tensors, sizes = load_golden("f_unianimate")
    config = wan_config({**sizes, "model_type": "i2v", "in_dim": 36, "pose_dim": sizes["dim"]})
    video, reference, model = DWPoseEmbedding(sizes["dim"]), RandomRefPoseEmbedding(), WanModel(config)
    assign_weights(video, below(tensors, "w.dwpose_embedding"), "golden")
    assign_weights(reference, below(tensors, "w.randomref_embedding_pose"), "golden")
    assign_weights(model, below(tensors, "w.dit"), "golden")
    return tensors, video, reference, model


def frames_of(tensors) -> torch.Tensor:
    return tensors["dwpose_frames"][None].float() / 255


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


@torch.no_grad()
def test_pose_networks_reproduce_the_reference(golden):
    tensors, video, reference, _ = golden
    features = video(frames_of(tensors))
    same(features, tensors["dwpose_features"])
    same(project_features(video.features(frames_of(tensors)), video.last_linear()), tensors["dwpose_features"])
    drawing = tensors["ref_pose_frame"].permute(2, 0, 1)[None].float() / 255
    same(reference(drawing)[:, :, None], tensors["ref_pose_features"])


@torch.no_grad()
def test_the_conditioned_transformer_reproduces_the_reference(golden):
    tensors, _, _, model = golden
    model = WanModel(model.config)
    assign_weights(model, {name: tensor.clone() for name, tensor in below(tensors, "w.dit").items()}, "golden")
    pose = tensors["dwpose_features"].flatten(2).transpose(1, 2)
    y = tensors["y"] + tensors["ref_pose_features"]

    def flow(context, pose):
        return model(tensors["x"], tensors["t"], context, tensors["clip_fea"], y, add_condition=pose)

    same(flow(tensors["context_pos"], pose), tensors["noise_pred_pos"])
    same(flow(tensors["context_neg"], None), tensors["noise_pred_neg"])
    merged = merge_lora(model, below(tensors, "lora"), float(tensors["lora.alpha"]))
    assert len(merged) == 20
    assert {*merged.values()} == {4}
    same(flow(tensors["context_pos"], pose), tensors["noise_pred_pos_lora"])


def test_the_networks_are_the_published_ones_at_full_size():
    with torch.device("meta"):
        modules = {"dwpose_embedding": DWPoseEmbedding(), "randomref_embedding_pose": RandomRefPoseEmbedding()}
    ours = {f"{name}.{key}": list(t.shape) for name, m in modules.items() for key, t in m.state_dict().items()}
    assert ours == manifest("unianimate_modules")
    assert [sum(p.numel() for p in module.parameters()) for module in modules.values()] == [368_752, 12_628]
    published = {f"pipe.{key}": torch.empty(shape, device="meta") for key, shape in ours.items()}
    assert {name: len(pose_weights(published, name)) for name in modules} == {
        "dwpose_embedding": 14,
        "randomref_embedding_pose": 12,
    }


def toy_embedding(out_dim=6, dtype=torch.float32) -> DWPoseEmbedding:
    torch.manual_seed(0)
    embedding = DWPoseEmbedding(out_dim).to(dtype)
    for parameter in embedding.parameters():
        torch.nn.init.normal_(parameter, std=0.07)
    return embedding


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 29])
def test_any_chunking_is_the_whole_clip(chunk):
    embedding = toy_embedding(dtype=torch.float64)
    clip = torch.rand(1, 3, 29, 16, 16, dtype=torch.float64)
    matrix = embedding[-1].weight.flatten(1)
    for n in range(1, 30):
        encoder = StreamingPoseEncoder(embedding)
        pieces = [encoder.push(piece) for piece in clip[:, :, :n].split(chunk, dim=2)]
        features = torch.cat([*pieces, encoder.flush()], dim=2)
        whole = embedding(clip[:, :, :n])
        ours = torch.einsum("dc,bcfhw->bdfhw", matrix, features) + embedding[-1].bias.view(1, -1, 1, 1, 1)
        torch.testing.assert_close(ours, whole, atol=1e-12, rtol=1e-12)
        assert features.shape[2] == math.ceil(math.ceil((n + 3) / 2) / 2)


@torch.no_grad()
def test_81_frames_stream_as_they_come():
    embedding = toy_embedding()
    clip = torch.rand(1, 3, 81, 16, 16)
    encoder = StreamingPoseEncoder(embedding)
    arrivals, features = [], []
    for i in range(81):
        new = encoder.push(clip[:, :, i : i + 1])
        arrivals += [i] * new.shape[2]
        features.append(new)
    assert arrivals == [4 * v + 4 for v in range(20)]  # latent v is certain with pose frame 4v + 4
    features.append(encoder.flush())
    whole = embedding(clip)
    assert whole.shape[2] == 21
    ours = project_features(torch.cat(features, dim=2), embedding.last_linear())
    torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("num_frames", range(1, 82, 4))
def test_as_many_latents_as_the_vae_makes(num_frames):
    assert toy_embedding().features(torch.rand(1, 3, num_frames, 16, 16)).shape[2] == 1 + (num_frames - 1) // 4


@torch.no_grad()
def test_memory_does_not_grow_with_the_clip():
    encoder = StreamingPoseEncoder(toy_embedding())
    sizes = set()
    for _ in range(60):
        encoder.push(torch.rand(1, 3, 8, 16, 16))
        sizes.add(encoder.num_bytes)
    assert len(sizes) == 1
    whole = encoder.push(torch.rand(1, 3, 200, 16, 16))
    assert whole.shape[2] == 50
    assert {encoder.num_bytes} == sizes


@torch.no_grad()
def test_a_peek_supposes_that_the_pose_stays_and_moves_nothing():
    embedding = toy_embedding()
    clip = torch.rand(1, 3, 13, 16, 16)
    encoder = StreamingPoseEncoder(embedding)
    first = encoder.push(clip[:, :, :9])
    supposed = encoder.peek()
    held = torch.cat([clip[:, :, :9], clip[:, :, 8:9].expand(-1, -1, 4, -1, -1)], dim=2)
    torch.testing.assert_close(supposed, embedding.features(held)[:, :, 2:3], atol=1e-5, rtol=1e-5)
    rest = torch.cat([first, encoder.push(clip[:, :, 9:]), encoder.flush()], dim=2)
    torch.testing.assert_close(rest, embedding.features(clip), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_folded_is_unfolded():
    embedding, proj = toy_embedding(40), torch.nn.Linear(40, 12)
    features = embedding.features(torch.rand(1, 3, 9, 32, 16))
    unfolded = project_features(project_features(features, embedding.last_linear()), proj)
    folded = fold_pose_proj(embedding, proj)
    assert list(folded.weight.shape) == [12, 64]
    torch.testing.assert_close(project_features(features, folded), unfolded, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="makes 40 numbers per token, pose_proj takes 41"):
        fold_pose_proj(embedding, torch.nn.Linear(41, 12))


def test_gradient_reaches_the_embedding_through_its_whole_clip():
    embedding = toy_embedding()
    embedding(torch.rand(1, 3, 5, 16, 16)).square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in embedding.parameters())


def test_an_empty_stream_is_refused():
    encoder = StreamingPoseEncoder(toy_embedding())
    with pytest.raises(ValueError, match="at least one"):
        encoder.push(torch.rand(1, 3, 0, 16, 16))
    with pytest.raises(ValueError, match="no frames were pushed"):
        encoder.flush()


@torch.no_grad()
def test_pose_streams_through_the_transformer_as_in_one_pass(golden):
    tensors, _, _, whole = golden
    model = CausalWanModel(whole.config, num_frame_per_block=2)
    assign_weights(model, below(tensors, "w.dit"), "golden")
    pose, y = tensors["dwpose_features"], tensors["y"] + tensors["ref_pose_features"]
    x, t = tensors["x"], torch.tensor([[0.0, 0.0, 500.0, 500.0]])

    def flow(cut, **options):
        tokens = pose[:, :, cut].flatten(2).transpose(1, 2)
        words, image = tensors["context_pos"], tensors["clip_fea"]
        return model(x[:, :, cut], t[:, cut], words, image, y[:, :, cut], add_condition=tokens, **options)

    masked, cache = flow(slice(0, 4)), model.make_kv_cache(1, *x.shape[3:], 4)
    blocks = [flow(slice(0, 2), kv_cache=cache)]
    cache.commit(2)
    blocks.append(flow(slice(2, 4), kv_cache=cache))
    torch.testing.assert_close(torch.cat(blocks, dim=2), masked, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_teacher_forcing_with_pose_is_the_stream_with_pose(golden):
    """The pose is on the clean half and on the noisy one, as it is in the clean pass and in the denoising one."""
    tensors, _, _, whole = golden
    model = CausalWanModel(whole.config, num_frame_per_block=2)
    assign_weights(model, below(tensors, "w.dit"), "golden")
    pose, y = tensors["dwpose_features"], tensors["y"] + tensors["ref_pose_features"]
    clean, noisy, t = tensors["x"], torch.randn_like(tensors["x"]), torch.full((1, 4), 600.0)
    words, image = tensors["context_pos"], tensors["clip_fea"]

    def flow(x, t, cut, **options):
        tokens = pose[:, :, cut].flatten(2).transpose(1, 2)
        return model(x[:, :, cut], t[:, cut], words, image, y[:, :, cut], add_condition=tokens, **options)

    forced = flow(noisy, t, slice(0, 4), clean_x=clean)
    cache = model.make_kv_cache(1, *clean.shape[3:], 4)
    blocks = []
    for cut in (slice(0, 2), slice(2, 4)):
        blocks.append(flow(noisy, t, cut, kv_cache=cache))
        flow(clean, torch.zeros_like(t), cut, kv_cache=cache)
        cache.commit(2)
    torch.testing.assert_close(forced, torch.cat(blocks, dim=2), atol=1e-5, rtol=1e-5)


def test_pose_proj_is_identity_where_widths_agree_and_zero_elsewhere():
    with torch.device("meta"):
        large = CausalWanModel(WAN_CONFIGS["Wan2.1-I2V-14B-480P"])
    names = set(large.state_dict())
    large.add_pose_proj(5120)
    assert isinstance(large.pose_proj, torch.nn.Identity)
    assert set(large.state_dict()) == names
    small = toy_model(num_frame_per_block=2)
    small.add_pose_proj(40)
    assert [small.pose_proj.in_features, small.pose_proj.out_features] == [40, small.config.dim]
    assert not small.pose_proj.weight.any()
    assert not small.pose_proj.bias.any()
    x, t, words = torch.randn(1, 4, 2, 4, 4), torch.zeros(1, 2), torch.randn(1, 5, 12)
    with torch.no_grad():
        assert torch.equal(small(x, t, words, add_condition=torch.randn(1, 8, 40)), small(x, t, words))
        projected = torch.randn(1, 8, small.config.dim)  # folded tokens are added as they are
        assert not torch.equal(small(x, t, words, add_condition=projected), small(x, t, words))
    with pytest.raises(ValueError, match=r"\(8, 41\) \(tokens, width\), the video has \(8, 40\)"):
        small(x, t, words, add_condition=torch.randn(1, 8, 41))
    with pytest.raises(ValueError, match="width 41 came, this model takes 40"):
        small.add_pose_proj(41)
