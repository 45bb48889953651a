"""trainer/distillation.py: every score distillation takes its steps, resumes exactly, and leaves a few-step model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.build import build_pipeline
from tests import ranks as gloo
from tests.trainer.toy import ALONE, DrawnData, make, make_student, state
from trainer.diffusion import DiffusionTrainer
from trainer.distillation import ScoreDistillationTrainer
from utils.config import ConfigError, load_config
from utils.distributed import Ranks, init_distributed, shutdown

pytestmark = pytest.mark.usefixtures("toy_sizes")

MODES = {
    "dmd": [],
    "dmd by exit step": ["distillation.ts_schedule=true", "distillation.ts_schedule_max=true"],
    "dmd without clean pass": ["clean_context=false", "gradient_checkpointing=true"],
    "dmd on long rollouts": ["num_training_frames=12", "distillation.num_grad_frames=6", "seed=1"],
    "dmd from an image": [
        "distillation.num_input_frames=1", "num_training_frames=7", "distillation.num_grad_frames=7",
    ],
    "dmd in one step": ["denoising_step_list=[1000]", "distillation.fake_guidance_scale=2"],
    "sid": ["distribution_loss=sid"],
    "sid with checkpointing": ["distribution_loss=sid", "gradient_checkpointing=true"],
    "causvid": ["distribution_loss=causvid"],
    "causvid on noisy context": ["distribution_loss=causvid", "teacher_forcing=false"],
}  # fmt: skip


def distil(folder: Path, folders: tuple[Path, Path], *overrides: str, ranks: Ranks = ALONE) -> ScoreDistillationTrainer:
    return make_student(ScoreDistillationTrainer, folder, folders, *overrides, ranks=ranks)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_moves_student_and_critic(mode: str, tmp_path: Path, folders):
    trainer = distil(tmp_path, folders, *MODES[mode])
    before = {p.name: {n: w.detach().clone() for n, w in p.module.named_parameters()} for p in trainer.players}
    teacher = {name: p.detach().clone() for name, p in trainer.objective.scores.real.named_parameters()}
    trainer.train(save=False, visualize=False)
    for player in trainer.players:
        still = [n for n, p in player.module.named_parameters() if torch.equal(p, before[player.name][n])]
        assert not still, player.name
    assert all(torch.equal(p, teacher[name]) for name, p in trainer.objective.scores.real.named_parameters())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert ["student/loss" in line for line in lines] == [True, False, True]
    assert all(0.01 < line["critic/loss"] < 20 for line in lines)


def test_resumed_is_uninterrupted(tmp_path: Path, folders):
    distil(tmp_path / "whole", folders, "max_steps=4").train(visualize=False)
    distil(tmp_path / "parts", folders, "max_steps=2").train(visualize=False)
    distil(tmp_path / "parts", folders, "max_steps=4").train(visualize=False)
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("loss", ["dmd", "sid", "causvid"])
def test_accumulated_passes_are_one_large_batch(loss: str, tmp_path: Path, folders):
    settings = [f"distribution_loss={loss}", "max_steps=1"]
    distil(tmp_path / "large", folders, *settings, "batch_size=4").train(visualize=False)
    distil(tmp_path / "small", folders, *settings, "total_batch_size=4").train(visualize=False)
    large, small = state(tmp_path / "large"), state(tmp_path / "small")
    for name, tensor in large.items():
        if "/exp_avg/" in name:  # the gradients
            torch.testing.assert_close(tensor, small[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("loss", ["dmd", "sid"])
def test_checkpointing_changes_nothing(loss: str, tmp_path: Path, folders):
    for checkpointing in ("true", "false"):
        settings = [f"distribution_loss={loss}", f"gradient_checkpointing={checkpointing}", "max_steps=2"]
        distil(tmp_path / checkpointing, folders, *settings).train(visualize=False)
    on, off = state(tmp_path / "true"), state(tmp_path / "false")
    assert all(torch.equal(on[name], off[name]) for name in on)


def run_on_drawn_data(folder: Path, folders: tuple[Path, Path], *overrides: str, ranks: Ranks = ALONE) -> None:
    trainer = distil(folder, folders, "max_steps=1", *overrides, ranks=ranks)
    trainer.source.open = DrawnData
    draw = trainer.objective.generate.pipeline.draw_exit_steps
    exits = []
    trainer.objective.generate.pipeline.draw_exit_steps = lambda *args: exits.append(draw(*args)) or exits[-1]
    trainer.train(visualize=False)
    (folder / f"exits_{ranks.rank}.json").write_text(json.dumps(exits))


FOUR_STEPS = "denoising_step_list=[1000,750,500,250]"
LOSSES = {
    "dmd": ["distribution_loss=dmd"],
    "sid": ["distribution_loss=sid"],
    "a stream that goes on": [
        "distillation.num_streams=1", "num_training_frames=60", "distillation.num_grad_frames=6",
        "distillation.last_step_only=true", "max_steps=2", "optimizer.lr=1e-7",
    ],
}  # fmt: skip
CASES = {  # strategy of two ranks, and the loss
    "replicas": ("no_shard", "dmd"),
    "shards": ("full", "dmd"),
    "shards and a loss that goes back through the critic": ("full", "sid"),
    "shards and streams": ("full", "a stream that goes on"),
}


def test_two_ranks_are_one_process(tmp_path: Path, folders):
    """Replicated or sharded, each with half of the batch; and both leave their rollouts at the same steps."""
    done = gloo.run(__file__, 2, str(tmp_path), *map(str, folders), timeout=240)
    assert done.returncode == 0, done.stderr
    for loss, settings in LOSSES.items():
        run_on_drawn_data(tmp_path / loss, folders, "batch_size=2", FOUR_STEPS, *settings)
    for case, (_, loss) in CASES.items():
        one, two = state(tmp_path / loss), state(tmp_path / case)
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            if "/exp_avg/" in name or "/streams/" in name:  # the gradients, and what is gone on from
                torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        exits = [json.loads((tmp_path / case / f"exits_{rank}.json").read_text()) for rank in range(2)]
        assert exits[0] == exits[1] == json.loads((tmp_path / loss / "exits_0.json").read_text())


def test_the_export_is_a_few_step_model(tmp_path: Path, folders):
    distil(tmp_path, folders).train()
    assert (tmp_path / "samples" / "step_000003.png").stat().st_size > 1000
    settings = [f"model_name={tmp_path / 'export'}", "denoising_step_list=[1000,500]", "height=32", "width=32"]
    pipeline = build_pipeline(load_config(overrides=[*settings, "model_kwargs.local_attn_size=6", "device=cpu"]))
    assert pipeline.inference(text_prompts=["a red puppet"], num_frames=6, height=32, width=32).shape[1] == 21


def test_a_long_rollouts_first_latent_needs_the_end_only(tmp_path: Path, folders):
    trainer = distil(tmp_path, folders, "max_steps=1")
    clip = torch.randn(1, 9, 4, 4, 4)
    latent = trainer.first_latent(clip)
    assert latent.shape == (1, 1, 4, 4, 4)
    assert torch.equal(latent, trainer.first_latent(clip[:, 1:]))
    assert not torch.equal(latent, trainer.first_latent(clip[:, :8]))


def test_training_starts_from_its_own_checkpoint(tmp_path: Path, folders):
    weights = {n: torch.full_like(p, 0.5) for n, p in distil(tmp_path, folders).generator.named_parameters()}
    torch.save({"generator": weights}, tmp_path / "init.pt")
    trainer = distil(tmp_path, folders, f"distillation.init_ckpt={tmp_path / 'init.pt'}", "generator_ckpt=absent.pt")
    assert all((p == 0.5).all() for p in trainer.generator.parameters())


def test_training_starts_from_a_low_rank_update(tmp_path: Path, folders):
    """Of the student, not of its teacher; what it exports needs the update no more."""
    update = {"A": torch.ones(1, 16), "B": torch.ones(32, 1)}
    save_file(
        {f"blocks.0.ffn.0.lora_{side}.weight": half for side, half in update.items()}, tmp_path / "one.safetensors"
    )
    plain, trainer = (distil(tmp_path, folders, *more) for more in ([], [f"lora_ckpt={tmp_path / 'one.safetensors'}"]))
    name = "blocks.0.ffn.0.weight"
    for network, value in ((lambda run: run.generator, 1.0), (lambda run: run.objective.scores.real, 0.0)):
        change = network(trainer).model.get_parameter(name).float() - network(plain).model.get_parameter(name).float()
        torch.testing.assert_close(change, torch.full_like(change, value))
    trainer.train(visualize=False)
    exported = load_file(tmp_path / "export" / "diffusion_pytorch_model.safetensors")[name].float()
    averaged = trainer.learners[0].ema.average[f"generator.model.{name}"]
    torch.testing.assert_close(exported, averaged, rtol=1e-2, atol=1e-3)
    assert not (tmp_path / "export" / "one.safetensors").exists()


def test_settings_that_cannot_work(tmp_path: Path, folders, vae_folder: Path, tiny_model_folder: Path):
    with pytest.raises(ConfigError, match="set causal: true and denoising_step_list"):
        distil(tmp_path, folders, "denoising_step_list=null")
    with pytest.raises(ConfigError, match="train_text_encoder: false"):
        distil(tmp_path, folders, "train_text_encoder=true")
    with pytest.raises(ConfigError, match="use a teacher of the same VAE"):
        distil(tmp_path, folders, f"distillation.real_name={tiny_model_folder}")
    make(DiffusionTrainer, tmp_path / "other", vae_folder, "max_steps=1", "seed=9").train(visualize=False)
    with pytest.raises(ConfigError, match="was trained with another text encoder"):
        distil(tmp_path, folders, f"distillation.real_name={tmp_path / 'other' / 'export'}")
    with pytest.raises(ValueError, match="whose last 4 are judged"):
        distil(tmp_path, folders, "distillation.num_grad_frames=4")


def on_two_ranks(arguments: list[str]) -> None:
    two_ranks = init_distributed("cpu")
    home, causal, teacher = map(Path, arguments)
    for case, (strategy, loss) in CASES.items():
        options = ["batch_size=1", FOUR_STEPS, f"sharding_strategy={strategy}", *LOSSES[loss]]
        run_on_drawn_data(home / case, (causal, teacher), *options, ranks=two_ranks)
    shutdown()


if __name__ == "__main__":
    gloo.main(on_two_ranks, [gloo.OPTIMIZER, gloo.TEXT_ENCODER])
