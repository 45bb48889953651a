"""trainer/gan.py: who learns when, on what."""

import json
from pathlib import Path

import pytest
import torch

from tests.scripts.loading import load_script
from tests.trainer.toy import make_student
from trainer.gan import GANTrainer

pytestmark = pytest.mark.usefixtures("toy_sizes")

PENALTIES = ["gan.r1_weight=0.1", "gan.r2_weight=0.1", "gan.denoising_weight=0.5", "gan.concat_time_embeddings=true"]


@pytest.mark.parametrize("mode", [[], ["gan.relativistic=false"], PENALTIES, ["clean_context=false"]], ids=str)
def test_every_mode_moves_student_and_discriminator(mode: list[str], tmp_path: Path, folders):
    trainer = make_student(GANTrainer, tmp_path, folders, "max_steps=4", *mode)
    before = {p.name: {n: w.detach().clone() for n, w in p.module.named_parameters()} for p in trainer.players}
    trainer.train(save=False, visualize=False)
    for player in trainer.players:
        still = {n for n, p in player.module.named_parameters() if torch.equal(p, before[player.name][n])}
        assert still <= {"head._cls_pred_branch.3.bias"}, player.name  # which a difference of two logits does not see
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert ["student/loss" in line for line in lines] == [True, False, True, False]
    assert all({"critic/logits_real", "critic/logits_fake"} <= line.keys() for line in lines)
    assert all(("critic/r1" in line) == (mode is PENALTIES) for line in lines)


def test_the_discriminator_warms_up_alone(tmp_path: Path, folders):
    settings = ["gan.discriminator_warmup_steps=3", "max_steps=6", "distillation.dfake_gen_update_ratio=2"]
    make_student(GANTrainer, tmp_path, folders, *settings).train(save=False, visualize=False)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert ["student/loss" in line for line in lines] == [False, False, False, True, False, True]
    assert all("critic/loss" in line for line in lines)


def test_the_critic_has_an_optimizer_of_its_own(tmp_path: Path, folders):
    trainer = make_student(GANTrainer, tmp_path, folders, "critic_optimizer.lr=0.25", "max_steps=1")
    trainer.train(save=False, visualize=False)
    assert [learner.settings.lr for learner in trainer.learners] == [1e-3, 0.25]


def test_the_head_is_saved_with_the_critic_and_comes_back(tmp_path: Path, folders):
    trainer = make_student(GANTrainer, tmp_path, folders, "max_steps=2")
    trainer.train(visualize=False)
    again = make_student(GANTrainer, tmp_path, folders, "max_steps=3")
    again.resume()
    pairs = zip(trainer.players[1].module.state_dict().items(), again.players[1].module.state_dict().values(), strict=1)
    assert all(torch.equal(a, b) for (_, a), b in pairs)
    assert any(name.startswith("head._gan_ca_blocks") for name in trainer.players[1].module.state_dict())


def test_the_critic_is_exported_under_its_published_names(tmp_path: Path, folders):
    trainer = make_student(GANTrainer, tmp_path / "run", folders, "max_steps=1")
    trainer.train(visualize=False)
    script = load_script(Path(__file__).parents[2] / "scripts" / "export_model.py")
    assert script.main([str(tmp_path / "run"), str(tmp_path / "gan.pt")]) == 0
    critic = torch.load(tmp_path / "gan.pt", weights_only=True)["critic"]
    discriminator = trainer.objective.discriminator
    names = {f"model.{name}" for name in discriminator.score.model.state_dict()}
    assert critic.keys() == names | discriminator.head.state_dict().keys()
    assert torch.equal(critic["model.head.head.weight"], discriminator.score.model.head.head.weight)
