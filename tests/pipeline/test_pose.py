"""Pose through the walk: streamed is whole, the unguided side sees none of it, a block's memory, clear refusals."""

import pytest
import torch

from pipeline import rollout as walk
from pipeline.build import build_pipeline
from pipeline.pose import DrivingPose, PoseSteering
from utils.config import load_config
from wan.modules.pose import DWPoseEmbedding, RandomRefPoseEmbedding, fold_pose_proj
from wan.modules.weights import save_safetensors

SIZE = {"height": 32, "width": 32}
WIDTH = 40  # 5120 of the release


def synthetic_checkpoint(width: int = WIDTH) -> dict[str, torch.Tensor]:
    """The release's layout: networks and LoRA of one pipeline in one flat dictionary."""
    torch.manual_seed(3)
    networks = {"dwpose_embedding": DWPoseEmbedding(width), "randomref_embedding_pose": RandomRefPoseEmbedding()}
    tensors = {}
    for name, network in networks.items():
        for key, parameter in network.named_parameters():
            tensors[f"pipe.{name}.{key}"] = torch.nn.init.normal_(parameter, std=0.2).detach()
    for module, size in (("self_attn.q", (32, 32)), ("ffn.0", (64, 32))):
        tensors[f"pipe.dit.blocks.0.{module}.lora_A.default.weight"] = torch.randn(2, size[1])
        tensors[f"pipe.dit.blocks.0.{module}.lora_B.default.weight"] = torch.randn(size[0], 2)
    return tensors


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("pose") / "unianimate.ckpt"
    torch.save(synthetic_checkpoint(), path)
    return path


@pytest.fixture
def posed(tiny_model_folder, checkpoint):
    """Makes pipelines that take a pose; with train_proj their zero pose_proj is replaced by random numbers."""

    def make(*overrides, folder=tiny_model_folder, train_proj=True):
        settings = [f"model_name={folder}", "device=cpu", "denoising_step_list=[1000,500]"]
        pipeline = build_pipeline(load_config(None, [*settings, *overrides]))
        assert pipeline.load_pose_embedding_weights(checkpoint) == {
            "dwpose_embedding": 14,
            "randomref_embedding_pose": 12,
        }
        if train_proj:
            torch.manual_seed(5)
            torch.nn.init.normal_(pipeline.generator.model.pose_proj.weight, std=0.3)
        return pipeline

    return make


def dance(num_frames: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(1, num_frames, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def run(pipeline, pose=None, num_frames=6, **options):
    return pipeline.inference(
        text_prompts=["a puppet"],
        seeds=[1],
        num_frames=num_frames,
        dwpose_data=pose,
        return_latents=True,
        **SIZE,
        **options,
    )[1]


def test_a_new_pose_proj_changes_nothing_and_says_so(posed, caplog):
    pipeline = posed(train_proj=False)
    assert "pose_proj (40 -> 32) is all zeros" in caplog.text
    assert torch.equal(run(pipeline), run(pipeline, dance(21)))


def test_pose_steers_and_strength_scales(posed):
    pipeline = posed()
    plain, full = run(pipeline), run(pipeline, dance(21))
    assert (plain - full).abs().max() > 1e-2
    assert torch.equal(run(pipeline, dance(21), pose_strength=0.0), plain)
    weak = run(pipeline, dance(21), pose_strength=0.05)
    assert (weak - plain).abs().mean() < (full - plain).abs().mean()


@pytest.mark.parametrize("chunk", [1, 7, 21])
def test_streamed_is_whole(posed, chunk):
    pipeline = posed()
    pose = dance(21)
    whole = run(pipeline, pose)
    torch.testing.assert_close(run(pipeline, iter(pose.split(chunk, dim=1))), whole, atol=1e-4, rtol=1e-4)


def tokens_of(pipeline, pose, spans, **options) -> torch.Tensor:
    matrix = fold_pose_proj(pipeline.dwpose_embedding, pipeline.generator.model.pose_proj)
    driving = DrivingPose(pipeline.dwpose_embedding, matrix, pose, (1, 32, 32), **options)
    return torch.cat([driving.frames(*span) for span in spans], dim=2)


SPANS = [(0, 3), (3, 6), (6, 9)]


@torch.no_grad()
def test_exact_tokens_are_those_of_the_whole_clip(posed):
    pipeline = posed()
    pose = dance(33)
    whole = pipeline.generator.model.pose_proj(pipeline.dwpose_embedding(pose.transpose(1, 2)).movedim(1, -1)).movedim(
        -1, 1
    )
    tokens = tokens_of(pipeline, pose, SPANS, num_frames=33)
    torch.testing.assert_close(tokens, whole, atol=1e-4, rtol=1e-4)
    held = tokens_of(pipeline, pose, SPANS, num_frames=33, steering=PoseSteering(lookahead="hold"))
    guessed = [2, 5]  # a block's last latent, but for the clip's last, which has no future to wait for
    certain = [i for i in range(9) if i not in guessed]
    torch.testing.assert_close(held[:, :, certain], whole[:, :, certain], atol=1e-4, rtol=1e-4)
    assert all((held[:, :, i] - whole[:, :, i]).abs().max() > 1e-3 for i in guessed)


@torch.no_grad()
@pytest.mark.parametrize(("lookahead", "read"), [("exact", 13), ("hold", 9)])
def test_no_more_is_read_than_needed(posed, lookahead, read):
    pipeline = posed()
    came = []

    def camera():
        for i in range(40):
            came.append(i)
            yield dance(1, seed=i)

    matrix = fold_pose_proj(pipeline.dwpose_embedding, pipeline.generator.model.pose_proj)
    driving = DrivingPose(
        pipeline.dwpose_embedding, matrix, camera(), (1, 32, 32), steering=PoseSteering(lookahead=lookahead)
    )
    driving.frames(0, 3)
    assert len(came) == read + 1  # one more is waiting, to know whether there is one


@torch.no_grad()
def test_a_pose_shorter_than_the_video_stays_as_it_ends(posed):
    pipeline = posed()
    short = dance(7)
    longer = torch.cat([short, short[:, -1:].expand(-1, 26, -1, -1, -1)], dim=1)
    ours, theirs = (tokens_of(pipeline, pose, SPANS, num_frames=33) for pose in (short, longer))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_video_is_as_long_as_its_pose(posed):
    pipeline = posed()
    assert run(pipeline, dance(21), num_frames=None).shape[1] == 6
    live = pipeline.stream(text_prompts=["a puppet"], seeds=[1], dwpose_data=iter(dance(20).split(4, dim=1)), **SIZE)
    assert [block.shape[1] for block in live] == [9, 12]


def test_the_unguided_side_sees_no_pose_and_the_clean_pass_does(posed, monkeypatch):
    pipeline = posed("denoising_step_list=null", "sampling_steps=2", "guidance_scale=2.0")
    seen = []
    original = walk.denoise_path

    def spy(generator, path, block, x, t, *shortcut, **options):
        cache = next(name for name in ("pos", "neg", "ref") if path.kv_cache is getattr(pipeline, f"kv_cache_{name}"))
        seen.append((cache, float(torch.as_tensor(t)) == 0, path.conditioning.pose is not None))
        return original(generator, path, block, x, t, *shortcut, **options)

    monkeypatch.setattr(walk, "denoise_path", spy)
    run(pipeline, dance(21))
    assert {(cache, posed) for cache, _, posed in seen} == {("pos", True), ("neg", False)}
    assert ("pos", True, True) in seen  # the pass that remembers
    seen.clear()
    run(pipeline, dance(21), pose_end=0.5, pose_guidance_scale=1.5)
    assert {cache for cache, *_ in seen} == {"pos", "neg", "ref"}
    steps = [posed for cache, clean, posed in seen if cache == "pos" and not clean]
    assert steps == [True, False] * 2
    assert all(posed for cache, clean, posed in seen if cache == "pos" and clean)
    assert not any(posed for cache, _, posed in seen if cache == "ref")


def test_own_guidance_of_the_pose(posed):
    """w = 1 is the plain walk; with guidance for words there are three sides."""
    pipeline = posed()
    plain = run(pipeline, dance(21))
    assert torch.equal(run(pipeline, dance(21), pose_guidance_scale=1.0), plain)
    assert (run(pipeline, dance(21), pose_guidance_scale=2.0) - plain).abs().max() > 1e-3
    many = posed("denoising_step_list=null", "sampling_steps=2", "guidance_scale=2.0")
    assert (run(many, dance(21), pose_guidance_scale=3.0) - run(many, dance(21))).abs().max() > 1e-3


def test_memory_stays_over_300_blocks(posed):
    pipeline = posed()
    matrix = fold_pose_proj(pipeline.dwpose_embedding, pipeline.generator.model.pose_proj)
    frame = dance(1)[..., :16, :16]
    driving = DrivingPose(pipeline.dwpose_embedding, matrix, iter(lambda: frame, None), (1, 16, 16))
    sizes = set()
    with torch.no_grad():
        for block in range(300):
            assert driving.frames(block, block + 1).shape == (1, 32, 1, 1, 1)
            sizes.add(driving.num_bytes)
    assert len(sizes) == 1


def test_a_reference_pose_goes_where_the_model_has_room(posed, tiny_i2v_folder):
    pipeline = posed(folder=tiny_i2v_folder)
    image, drawing = torch.zeros(1, 3, 32, 32), torch.rand(1, 3, 64, 48)
    plain = run(pipeline, dance(21), input_image=image)
    assert (run(pipeline, dance(21), input_image=image, random_ref_dwpose=drawing) - plain).abs().max() > 1e-3
    t2v = posed("model_kwargs.sink_size=1")
    hidden = {"input_image": image, "image_mode": "ref_sink"}
    without = run(t2v, dance(21), **hidden)
    assert without.shape[1] == 6
    assert not torch.equal(run(t2v, dance(21), **hidden, random_ref_dwpose=drawing), without)


def test_a_trained_pose_proj_comes_with_its_checkpoint(posed, tmp_path):
    pipeline = posed(train_proj=False)
    proj = {"pose_proj.weight": torch.randn(32, WIDTH), "pose_proj.bias": torch.zeros(32)}
    save_safetensors(synthetic_checkpoint() | proj, tmp_path / "trained.safetensors")
    assert pipeline.load_pose_embedding_weights(tmp_path / "trained.safetensors")["pose_proj"] == 2
    assert torch.equal(pipeline.generator.model.pose_proj.weight, proj["pose_proj.weight"])


def test_the_lora_of_the_same_file_is_merged(posed, checkpoint):
    pipeline = posed()
    before = pipeline.generator.model.blocks[0].ffn[0].weight.clone()
    assert pipeline.load_unianimate_lora(checkpoint) == {"blocks.0.self_attn.q": 2, "blocks.0.ffn.0": 2}
    assert not torch.equal(pipeline.generator.model.blocks[0].ffn[0].weight, before)


def test_checkpoints_that_do_not_fit_are_refused(posed, tiny_model_folder, tmp_path):
    pipeline = posed()
    tensors = synthetic_checkpoint()
    cut = {name: tensor for name, tensor in tensors.items() if not name.endswith("dwpose_embedding.6.bias")}
    save_safetensors(cut, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"missing 6\.bias \[16\]"):
        pipeline.load_pose_embedding_weights(tmp_path / "cut.safetensors")
    save_safetensors({"blocks.0.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no pose networks"):
        pipeline.load_pose_embedding_weights(tmp_path / "other.safetensors")
    save_safetensors(synthetic_checkpoint(48), tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match="width 48 came, this model takes 40"):
        pipeline.load_pose_embedding_weights(tmp_path / "wide.safetensors")


MISTAKES = (
    ({"pose": dance(5), "pose_strength": 3.0}, "lies in"),
    ({"pose": dance(5), "pose_start": 0.6, "pose_end": 0.5}, "0 <= start < end <= 1"),
    ({"pose": dance(5), "pose_lookahead": "never"}, "use one of exact, hold"),
    ({"pose": dance(5) * 255}, "floats in \\[0, 1\\], or uint8"),
    ({"pose": dance(5)[0]}, r"\[1, frames, 3, height, width\] is needed"),
    ({"pose": dance(5)[:, :0]}, "the pose has no frames"),
    ({"pose": dance(5), "random_ref_dwpose": dance(1)[0]}, "give input_image too"),
)


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_mistakes_get_a_sentence(posed, options, message):
    with pytest.raises(ValueError, match=message):
        run(posed(), **options)


def test_a_pose_needs_weights(tiny_model_folder):
    settings = [f"model_name={tiny_model_folder}", "device=cpu", "denoising_step_list=[1000,500]"]
    with pytest.raises(ValueError, match="no pose weights are loaded"):
        run(build_pipeline(load_config(None, settings)), dance(5))


def test_teacache_computes_where_the_pose_comes_or_goes(posed, monkeypatch):
    pipeline = posed("denoising_step_list=null", "sampling_steps=4", "guidance_scale=1.0")
    reused = []
    original = walk.denoise_path

    def spy(generator, path, block, x, t, shortcut=None, **options):
        reused.append(None if shortcut is None else shortcut.reuse)
        return original(generator, path, block, x, t, shortcut, **options)

    monkeypatch.setattr(walk, "denoise_path", spy)
    monkeypatch.setattr(pipeline, "_steps_computed", lambda skip: (True, False, False, True))
    run(pipeline, dance(9), num_frames=3)
    assert reused == [False, True, True, False]
    reused.clear()
    run(pipeline, dance(9), num_frames=3, pose_end=0.5)
    assert reused == [False, True, False, False]
