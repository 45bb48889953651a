"""Pose and image learned with the transformer: steps, resuming, and the way from the export to inference.py."""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

import inference
from pipeline.build import build_pipeline
from tests.test_inference import MANY_STEPS
from tests.trainer.toy import FEW_STEPS, make, state
from trainer.consistency import ConsistencyTrainer
from trainer.data import check_calls
from trainer.diffusion import DiffusionTrainer
from trainer.distillation import ScoreDistillationTrainer
from utils.config import ConfigError, load_config
from utils.distributed import Rngs, SampleRngs
from utils.pose.keypoints import save_keypoints
from utils.video import write_video
from wan.configs import POSE_FILES, WanConfig
from world.puppet import joints, sample_scenes

pytestmark = pytest.mark.usefixtures("toy_sizes")

CONTROL = ["control.pose_dim=8", "control.pose_dropout=0.5", "control.image_dropout=0.5", "batch_size=4"]


def make_trainer(folder: Path, vae_folder: Path, *overrides: str) -> DiffusionTrainer:
    return make(DiffusionTrainer, folder, vae_folder, *CONTROL, *overrides)


def test_resumed_is_uninterrupted(tmp_path: Path, vae_folder: Path):
    make_trainer(tmp_path / "whole", vae_folder, "max_steps=2").train(visualize=False)
    for steps in (1, 2):
        make_trainer(tmp_path / "parts", vae_folder, f"max_steps={steps}").train(visualize=False)
    ours, theirs = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert ours.keys() == theirs.keys() and "student/weights/dwpose_embedding.0.weight" in ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def exported(tmp_path_factory, vae_folder: Path) -> Path:
    """What a run that learned pose and image has exported."""
    home = tmp_path_factory.getbasetemp() / "control"
    if not home.is_dir():
        make_trainer(home, vae_folder, "max_steps=2", "ema.weight=0", "optimizer.lr=0.02").train()
    return home / "export"


def test_an_export_is_found_and_followed_by_inference(exported: Path, tmp_path: Path):
    assert WanConfig.from_folder(exported).pose_dim == 8
    assert (exported / POSE_FILES[0]).stat().st_size < 2e6
    assert (exported.parent / "samples" / "step_000002.png").is_file()
    points = joints(sample_scenes(1, 3), torch.arange(21))[0]
    np.savez(tmp_path / "dance.npz", keypoints=points.numpy(), width=128, height=128, fps=16)
    settings = [f"model_name={exported}", "height=32", "width=32", *MANY_STEPS, "model_kwargs.local_attn_size=6"]
    common = ["--prompt", "a puppet", "--seed", "3", "--device", "cpu", "--num_output_frames", "6", *settings]
    for name, more in (("without", []), ("with", ["--pose", str(tmp_path / "dance.npz")])):
        assert inference.main([*common, "--output_folder", str(tmp_path / name), *more]) == 0
    lines = [json.loads((tmp_path / name / "metadata.jsonl").read_text()) for name in ("without", "with")]
    assert lines[0]["num_frames"] == lines[1]["num_frames"] == 21
    assert lines[0]["fingerprint"] != lines[1]["fingerprint"]


def test_what_inference_loads_is_what_training_had(exported: Path, tmp_path: Path, vae_folder: Path):
    settings = ["from_scratch=false", f"model_name={exported}", "train_text_encoder=false", "max_steps=1"]
    trainer = make_trainer(tmp_path / "further", vae_folder, *settings)  # an exported model is trained further
    pipeline = build_pipeline(load_config(None, [f"model_name={exported}", "device=cpu"]))
    assert pipeline.generator.model.pose_proj.weight.any()
    for ours, theirs in (
        (trainer.pose_embedding, pipeline.dwpose_embedding),
        (trainer.generator.model.pose_proj, pipeline.generator.model.pose_proj),
    ):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    without = make(DiffusionTrainer, tmp_path / "without", vae_folder, *settings)
    without.train(visualize=False)  # a model that knows poses goes on without: its networks stay with it
    assert (tmp_path / "without" / "export" / POSE_FILES[0]).read_bytes() == (exported / POSE_FILES[0]).read_bytes()
    with pytest.raises(ValueError, match="width 16 came, this model takes 8"):
        make_trainer(tmp_path / "wide", vae_folder, *settings, "control.pose_dim=16")


def test_a_few_step_student_learns_to_follow(exported: Path, tmp_path: Path, vae_folder: Path):
    settings = [*FEW_STEPS, f"model_name={exported}", "max_steps=1", "guidance_scale=1"]
    trainer = make(ConsistencyTrainer, tmp_path / "few", vae_folder, *CONTROL, *settings)
    before = trainer.generator.model.pose_proj.weight.clone()
    assert trainer.teacher.model.pose_proj.weight.any()
    trainer.train()
    assert not torch.equal(trainer.generator.model.pose_proj.weight, before)
    folder = tmp_path / "few" / "export"
    assert (folder / POSE_FILES[0]).read_bytes() == (exported / POSE_FILES[0]).read_bytes()  # theirs are the teacher's
    lines = [json.loads(line) for line in (tmp_path / "few" / "metrics.jsonl").read_text().splitlines()]
    assert {"student/loss", "student/error_noisy_half", "student/loss_imaged_posed"} <= lines[0].keys()
    (folder / POSE_FILES[0]).unlink()
    with pytest.raises(ConfigError, match=r"no pose_embedding.safetensors .* start from a model that has learned"):
        make(ConsistencyTrainer, tmp_path / "none", vae_folder, *CONTROL, *settings, f"model_name={folder}")


def test_self_forcing_learns_to_follow_from_a_teacher_that_does(exported: Path, tmp_path: Path, vae_folder: Path):
    poses = ["control.pose_dim=8", "control.image_dropout=1", f"model_name={exported}", "max_steps=1"]
    frozen = ["causal=false", "teacher_forcing=false", "from_scratch=false", "train_text_encoder=false"]
    folder = tmp_path / "teacher"
    make(DiffusionTrainer, folder, vae_folder, *frozen, *poses, "control.frozen=true").train(visualize=False)
    student = [*FEW_STEPS, *poses, "distillation.num_grad_frames=6"]
    teacher = f"distillation.real_name={folder / 'export'}"
    trainer = make(ScoreDistillationTrainer, tmp_path / "student", vae_folder, *student, teacher)
    trainer.start()
    batch = trainer.prepare(SampleRngs(Rngs(0, 0, trainer.device), range(2)))
    assert not batch.conditioning.pose[0].any() and batch.conditioning.pose[1].any() and batch.negative.pose is None
    learners = trainer.generator.model.pose_proj, trainer.objective.scores.fake.model.pose_proj
    before = [proj.weight.clone() for proj in learners]
    trainer.train_step()
    assert not any(torch.equal(proj.weight, old) for proj, old in zip(learners, before, strict=True))
    (folder / "export" / POSE_FILES[0]).unlink()
    with pytest.raises(ConfigError, match="train it from there with control.frozen: true"):
        make(ScoreDistillationTrainer, tmp_path / "other", vae_folder, *student, teacher)


def test_held_out_clips_are_steered_too(tmp_path: Path, vae_folder: Path):
    trainer = make_trainer(tmp_path, vae_folder, "max_steps=1")
    trainer.start()
    metrics = trainer.held_out(trainer.objective.loss)
    assert {"loss", "loss_plain_posed", "loss_plain_unposed", "loss_imaged_posed"} <= metrics.keys()


def test_batches_that_sharded_networks_could_not_share():
    for size, dropout, works in ((1, 0.5, True), (4, 0.5, True), (3, 0.8, False), (3, 1, True)):
        config = load_config(None, ["control.pose_dim=8", f"control.image_dropout={dropout}", f"batch_size={size}"])
        with nullcontext() if works else pytest.raises(ConfigError, match="set batch_size: 1"):
            check_calls(config, 12)


REFUSED = (
    (["causal=false", "teacher_forcing=false"], "no images; set control.image_dropout: 1"),
    (["teacher_forcing=false"], "teacher_forcing: true"),
    (["trainer=gan"], "trainer: diffusion, consistency or score_distillation"),
    (["trainer=score_distillation"], "no images; set control.image_dropout: 1"),
    (["trainer=consistency", "consistency.causal_teacher=false"], "consistency.causal_teacher: true"),
    (["data.kind=latents", "data.path=x"], "data.kind: videos .keypoint files stand beside"),
    (["data.kind=videos", "data.path=x", "pose_drawing=legacy"], "set pose_drawing: native or body"),
    (["control.wrong_action=2"], "control.wrong_action is 2"),
    (["num_training_frames=3"], "must fit into a clip"),
)


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_settings_that_cannot_work(settings: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(None, ["control.pose_dim=8", *settings])


@pytest.fixture
def people(tmp_path: Path) -> list[str]:
    """Settings that learn from four videos, of which three have keypoints."""
    folder = tmp_path / "people"
    for name in "abcd":
        write_video(folder / f"{name}.mp4", torch.rand(42, 3, 32, 32), fps=16)
        (folder / f"{name}.txt").write_text(f"puppet {name}")
        if name != "d":
            points = joints(sample_scenes(1, ord(name)), torch.arange(42))[0]
            save_keypoints(folder / f"{name}.npz", points, 128, 128, 16)
    return ["data.kind=videos", f"data.path={folder}"]


def test_step_0_on_videos_is_that_without_pose(people: list[str], tmp_path: Path, vae_folder: Path):
    settings = [*people, "control.image_dropout=1", "control.pose_dropout=0", "max_steps=1"]
    trainer = make_trainer(tmp_path / "run", vae_folder, *settings)
    trainer.start()
    losses = []
    for objective in (trainer.objective, trainer.objective.plain):
        rngs = SampleRngs(Rngs(0, 0, trainer.device), range(4))
        batch = trainer.prepare(rngs)
        assert batch.controls.drawings.any()
        losses.append(objective.loss(batch, rngs)[0])
    assert torch.equal(*losses)
    torch.nn.init.normal_(trainer.generator.model.pose_proj.weight)
    torch.nn.init.normal_(trainer.generator.model.head.head.weight)
    rngs = SampleRngs(Rngs(0, 0, trainer.device), range(4))
    assert not torch.equal(trainer.objective.loss(trainer.prepare(rngs), rngs)[0], losses[0])


def test_pose_and_image_are_learned_from_videos(people: list[str], tmp_path: Path, vae_folder: Path):
    make_trainer(tmp_path, vae_folder, *people, "max_steps=1").train(visualize=False)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert {"student/loss_plain_posed", "student/loss_imaged_posed"} <= line.keys()
    assert (tmp_path / "export" / POSE_FILES[0]).is_file()


def test_videos_without_any_keypoints_are_refused(people: list[str], tmp_path: Path, vae_folder: Path):
    for path in (tmp_path / "people").glob("*.npz"):
        path.unlink()
    with pytest.raises(ValueError, match="none of the 4 videos"):
        make_trainer(tmp_path / "run", vae_folder, *people, "max_steps=1").train(visualize=False)
