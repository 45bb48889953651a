"""Shared by the trainers' tests: the toy model and its VAE."""

from pathlib import Path

import pytest

from tests.scripts.loading import load_script
from tests.trainer.toy import ALONE, SIZES, make, small_tokenizer
from trainer.diffusion import DiffusionTrainer
from trainer.vae import VAETrainer
from utils.config import load_config
from wan.configs import WAN_CONFIGS


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory) -> Path:
    """A tiny VAE with four latent channels, untrained."""
    folder = tmp_path_factory.mktemp("vae")
    settings = ["trainer=vae", "height=32", "width=32", "batch_size=2", "vae.dim=4", "vae.z_dim=4"]
    settings += ["vae.dim_mult=[1,1,2]", "data.num_frames=5", "data.tail_num_frames=5", "max_steps=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.vae.STATISTICS_CLIPS", 2)
        VAETrainer(load_config(overrides=settings), ALONE, folder).train(visualize=False)
    return folder / "export"


@pytest.fixture
def toy_sizes(monkeypatch):
    """The toy model by name, and evaluations as small as it."""
    monkeypatch.setitem(WAN_CONFIGS, "toy", SIZES)
    monkeypatch.setattr("trainer.latents.NUM_SAMPLES", 1)
    monkeypatch.setattr("trainer.latents.NUM_EVAL_SAMPLES", 2)
    monkeypatch.setattr("trainer.latents.train_tokenizer", small_tokenizer)


@pytest.fixture
def folders(tmp_path_factory, vae_folder: Path, toy_sizes) -> tuple[Path, Path]:
    """A causal model with a text encoder, and a bidirectional teacher of the same words."""
    home = tmp_path_factory.getbasetemp() / "distillation"
    causal, teacher = home / "causal", home / "teacher"
    if not home.is_dir():
        make(DiffusionTrainer, causal, vae_folder, "max_steps=2").train(visualize=False)
        words = f"data.text_encoder_folder={causal / 'export'}"
        bidirectional = ["causal=false", "teacher_forcing=false", "train_text_encoder=false", words, "max_steps=2"]
        make(DiffusionTrainer, teacher, vae_folder, *bidirectional).train(visualize=False)
    return causal / "export", teacher / "export"


@pytest.fixture
def pairs(tmp_path_factory, folders: tuple[Path, Path]) -> tuple[Path, Path]:
    """Trajectories of the causal model given its own past, and of the bidirectional teacher."""
    home = tmp_path_factory.getbasetemp() / "pairs"
    settings = [f"model_name={folders[0]}", "height=32", "width=32", "num_training_frames=6", "device=cpu"]
    settings += ["denoising_step_list=[1000,500]", "model_kwargs.local_attn_size=6"]
    if not home.is_dir():
        home.mkdir()
        (home / "student.yaml").write_text("trainer: ode\n")
        script = load_script(Path(__file__).parents[2] / "scripts" / "generate_ode_pairs.py")
        common = ["--config_path", str(home / "student.yaml"), "--puppet_captions", "6", "--steps", "4", *settings]
        assert script.main([*common, "--causal_teacher", "--output", str(home / "causal")]) == 0
        bidirectional = [f"distillation.real_name={folders[1]}", "--output", str(home / "bidirectional")]
        assert script.main([*common, *bidirectional]) == 0
    return home / "causal", home / "bidirectional"
