"""train.py and scripts/export_model.py: the doors, on the smallest VAE and transformer there are."""

from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

import train
from tests.scripts.loading import load_script
from trainer import TRAINERS
from utils.checkpoint import load_generator
from utils.config import Config, load_config
from utils.wan_wrapper import WanDiffusionWrapper, WanTextEncoder
from wan.configs import WAN_CONFIGS, WanConfig
from wan.modules.vae import load_vae

ROOT = Path(__file__).resolve().parents[1]
VAE = ["vae.dim=4", "vae.z_dim=4", "vae.dim_mult=[1,1,2]", "height=32", "width=32", "batch_size=2", "max_steps=2"]
VAE += ["data.num_frames=5", "data.tail_num_frames=5", "num_training_frames=3", "compile=false", "max_seconds=null"]
DIT = ["model_name=toy", "height=32", "width=32", "batch_size=2", "max_steps=2", "max_seconds=null", "compile=false"]
DIT += ["cuda_graphs=false"]  # a text encoder learns in some
DIT += ["data.pool_size=4", "data.min_fill=4", "data.encode_batch_size=2", "num_training_frames=3", "seed=4"]
DIT += ["text_encoder.d_model=16", "text_encoder.num_layers=1", "text_encoder.num_heads=2", "text_encoder.d_kv=8"]


@pytest.fixture(autouse=True)
def toy_sizes(monkeypatch):
    sizes = {"dim": 16, "ffn_dim": 32, "num_heads": 2, "num_layers": 1, "in_dim": 4, "out_dim": 4, "freq_dim": 16}
    monkeypatch.setitem(WAN_CONFIGS, "toy", WanConfig(**sizes, text_dim=16, text_len=24))
    monkeypatch.setattr("trainer.vae.STATISTICS_CLIPS", 2)


def export_main(arguments: list[str]) -> int:
    return load_script(ROOT / "scripts" / "export_model.py").main(arguments)


def run(config: str, logdir: Path, *more: str) -> int:
    return train.main(["--config_path", f"configs/{config}.yaml", "--logdir", str(logdir), "--no_visualize", *more])


def test_from_nothing_to_a_model_folder(tmp_path: Path, capsys):
    vae, dit = tmp_path / "vae", tmp_path / "dit"
    assert run("puppet_vae", vae, *VAE) == 0
    assert run("puppet_diffusion", dit, *DIT, "train_text_encoder=true", f"data.vae_folder={vae / 'export'}") == 0
    assert load_config(dit / "config.yaml").seed == 4

    assert export_main([str(dit), str(tmp_path / "model")]) == 0
    assert export_main([str(dit), str(tmp_path / "model.pt")]) == 0
    assert export_main([str(dit), str(tmp_path / "model.safetensors")]) == 0
    assert "step 2 of" in capsys.readouterr().out
    in_folder = WanDiffusionWrapper(str(tmp_path / "model"), is_causal=True, dtype=torch.float32).state_dict()
    for name in ("model.pt", "model.safetensors"):
        wrapper = WanDiffusionWrapper("toy", True, from_scratch=True, model_config=WAN_CONFIGS["toy"])
        load_generator(wrapper, tmp_path / name, use_ema=True)
        own = wrapper.state_dict()
        assert all(torch.allclose(own[key], in_folder[key], rtol=0.01, atol=1e-3) for key in own)
    assert WanTextEncoder(str(tmp_path / "model"))(["a puppet"]).shape == (1, 24, 16)
    load_vae(tmp_path / "model" / "Wan2.1_VAE.safetensors")


@pytest.fixture
def puppets(tmp_path_factory) -> dict[str, Path]:
    """Exports of a causal model and of a bidirectional teacher made from it, for the recipes that begin there."""
    home = tmp_path_factory.getbasetemp() / "puppets"
    folders = {name: home / name / "export" for name in ("vae", "causal", "teacher")}
    if not home.is_dir():
        made = {name: str(path) for name, path in folders.items()}
        assert run("puppet_vae", home / "vae", *VAE) == 0
        words = ["train_text_encoder=true", f"data.vae_folder={made['vae']}"]
        assert run("puppet_diffusion", home / "causal", *DIT, *words) == 0
        assert run("puppet_teacher", home / "teacher", *DIT, f"model_name={made['causal']}") == 0
    return folders


DISTILLATION = ["num_training_frames=6", "model_kwargs.local_attn_size=3", "denoising_step_list=[1000,500]"]


@pytest.mark.parametrize("recipe", ["puppet_dmd", "puppet_dmd_streams", "puppet_sid", "puppet_causvid"])
def test_every_distillation_takes_its_steps(recipe: str, puppets, tmp_path: Path):
    models = [f"model_name={puppets['causal']}", f"distillation.real_name={puppets['teacher']}"]
    models += ["distillation.num_grad_frames=3"] if recipe == "puppet_dmd_streams" else []
    assert run(recipe, tmp_path, *DIT, *DISTILLATION, *models) == 0
    names = [path.name for path in (tmp_path / "export").iterdir()]
    assert "diffusion_pytorch_model.safetensors" in names and "Wan2.1_VAE.safetensors" in names
    metrics = (tmp_path / "metrics.jsonl").read_text()
    assert "student/loss" in metrics and "critic/grad_norm" in metrics


REAL_CLIPS = ["data.kind=puppet", "data.path=null", "data.text_cache=null", "generator_ckpt=null", "use_ema=false"]
REAL_CLIPS += ["distillation.init_ckpt=null", "total_batch_size=null", "optimizer.schedule=constant"]


@pytest.mark.parametrize(
    "recipe",
    ["puppet_diffusion_forcing", "causal_diffusion", "puppet_consistency", "causal_consistency", "puppet_gan"]
    + ["self_forcing_gan", "puppet_pose"],
)
def test_every_recipe_on_clips_takes_its_steps(recipe: str, puppets, tmp_path: Path):
    window = 4 if recipe == "puppet_pose" else 3
    settings = [*DIT, *REAL_CLIPS, f"model_name={puppets['causal']}", f"model_kwargs.local_attn_size={window}"]
    settings += ["num_training_frames=6", "gan.discriminator_warmup_steps=0", "sampling_steps=2"]
    if recipe.endswith("gan"):
        settings += [f"distillation.fake_name={puppets['teacher']}"]
    assert run(recipe, tmp_path, *settings) == 0
    assert (tmp_path / "export" / "diffusion_pytorch_model.safetensors").is_file()
    metrics = (tmp_path / "metrics.jsonl").read_text()
    assert "student/loss" in metrics and ("critic/logits_real" in metrics) == recipe.endswith("gan")


@pytest.mark.parametrize("recipe", ["puppet_ode", "ode_init"])
def test_ode_pairs_are_made_and_learned_from(recipe: str, puppets, tmp_path: Path):
    settings = [*DIT, f"model_name={puppets['causal']}", "model_kwargs.local_attn_size=3", "num_training_frames=6"]
    settings += ["data.text_cache=null", f"data.path={tmp_path / 'pairs'}", "total_batch_size=null", "device=cpu"]
    config = ["--config_path", f"configs/{recipe}.yaml", *settings]
    script = load_script(ROOT / "scripts" / "generate_ode_pairs.py")
    assert script.main([*config, "--causal_teacher", "--puppet_captions", "4", "--steps", "4"]) == 0
    assert run(recipe, tmp_path / "run", *settings) == 0
    assert (tmp_path / "run" / "export" / "diffusion_pytorch_model.safetensors").is_file()
    assert "student/loss_state_3" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_running_again_resumes(tmp_path: Path):
    assert run("puppet_vae", tmp_path, *VAE) == 0
    assert run("puppet_vae", tmp_path, *VAE, "max_steps=3") == 0
    assert [path.name for path in (tmp_path / "training_state").iterdir()] == ["step_00000003"]


def test_dry_run_prints_the_resolved_config_and_writes_nothing(tmp_path: Path, capsys):
    assert run("puppet_vae", tmp_path / "run", "--dry_run", "optimizer.lr=0.125") == 0
    assert "lr: 0.125" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_no_save(tmp_path: Path):
    assert run("puppet_vae", tmp_path, *VAE, "--no_save", "--disable-wandb", "logging.wandb=true") == 0
    assert not (tmp_path / "training_state").exists()
    assert (tmp_path / "metrics.jsonl").is_file()


def test_every_trainer_that_a_config_may_name_is_there():
    assert set(get_args(get_type_hints(Config)["trainer"])) == set(TRAINERS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config_path", "configs/puppet_vae.yaml", "trainer=gna"], "expected one of ['vae', 'tiny_vae', 'text', "),
        (
            ["--config_path", "configs/puppet_dmd.yaml", "distribution_loss=gan"],
            "expected one of ['dmd', 'sid', 'causvid']",
        ),
        (["--config_path", "configs/none.yaml"], "no such file"),
        (["--config_path", "configs/puppet_vae.yaml", "bach_size=2"], "did you mean 'batch_size'?"),
        (["--config_path", "configs/puppet_vae.yaml", *VAE, "total_batch_size=3"], "no multiple of batch_size"),
        (["--config_path", "configs/puppet_diffusion.yaml", *DIT, "data.vae_folder=nowhere"], "nowhere holds none of"),
        (
            ["--config_path", "configs/puppet_dmd.yaml", "denoising_step_list=null"],
            "set causal: true and denoising_step",
        ),
        (["--config_path", "configs/puppet_dmd.yaml", "distillation.real_name=nobody"], "no model 'nobody'"),
        (["--config_path", "configs/puppet_tiny.yaml", "trainer=score_distillation"], "set max_steps or max_seconds"),
        (["--config_path", "configs/puppet_tiny.yaml", "trainer=consistancy"], "consistancy"),
        (["--config_path", "configs/puppet_consistency.yaml", "denoising_step_list=null"], "set causal: true and deno"),
        (
            ["--config_path", "configs/puppet_gan.yaml", "data.kind=prompts", "data.path=prompts/puppet_world.txt"],
            "this objective learns from clips; set data.kind to puppet",
        ),
        (["--config_path", "configs/puppet_ode.yaml", "data.path=nowhere"], "nowhere holds no ode pairs"),
        (
            ["--config_path", "configs/puppet_ode.yaml", "data.kind=puppet", "data.path=null"],
            "from trajectories",
        ),
        (["--config_path", "configs/puppet_gan.yaml", "gan.r1_sigma=0"], "gan.r1_sigma is 0.0; it is a length above 0"),
        (["--config_path", "configs/puppet_gan.yaml", "distillation.dfake_gen_update_ratio=0"], "it is at least 1"),
        (["--config_path", "configs/puppet_gan.yaml", "distillation.fake_name=logs/x/export"], "train it first"),
        (
            ["--config_path", "configs/puppet_dmd.yaml", "distribution_loss=dnd"],
            "one of ['dmd', 'sid', 'causvid']",
        ),
        (["--config_path", "configs/puppet_diffusion.yaml", "trainer=ode"], "set causal: true and denoising_step_list"),
        (["--config_path", "configs/puppet_gan.yaml", "distillation.fake_name=nobody"], "no model 'nobody'"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], words: str, tmp_path: Path, capsys):
    assert train.main([*arguments, "--logdir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_checkpoint_of_another_model_is_refused_with_its_sizes(puppets, tmp_path: Path, capsys):
    settings = [*DIT, "num_training_frames=6", "model_kwargs.local_attn_size=3", f"model_name={puppets['causal']}"]
    config = WanConfig.from_folder(puppets["causal"])
    other = WanDiffusionWrapper("", from_scratch=True, model_config=replace(config, dim=32))
    torch.save({"generator": other.state_dict()}, tmp_path / "other.pt")
    assert run("puppet_consistency", tmp_path / "run", *settings, f"generator_ckpt={tmp_path / 'other.pt'}") == 1
    error = capsys.readouterr().err
    assert "other.pt does not fit this model: " in error and "has [32, 4, 1, 2, 2] instead of [16, 4, 1, 2, 2]" in error


def test_a_run_folder_of_another_recipe_is_refused(puppets, tmp_path: Path, capsys):
    settings = [*DIT, "num_training_frames=6", "model_kwargs.local_attn_size=3", f"model_name={puppets['causal']}"]
    assert run("puppet_consistency", tmp_path, *settings) == 0
    assert run("puppet_gan", tmp_path, *settings, f"distillation.fake_name={puppets['teacher']}") == 1
    assert "holds a run of the consistency trainer, not gan; choose another --logdir" in capsys.readouterr().err
