"""utils/config.py: every YAML loads, and every mistake is told in one sentence with the way out."""

from pathlib import Path

import pytest

from utils.config import ROOT, Config, ConfigError, config_hash, dump, load_config

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_yaml_loads_and_survives_a_dump(path: Path, tmp_path: Path):
    config = load_config(path)
    (tmp_path / "resolved.yaml").write_text(dump(config))
    assert load_config(tmp_path / "resolved.yaml") == config


def test_layers_override_each_other(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("sampling_steps: 8\noptimizer:\n  lr: 1.0e-3\n")
    config = load_config(tmp_path / "run.yaml", ["optimizer.lr=2e-3", "denoising_step_list=[1000,500]"])
    assert isinstance(config, Config)
    assert (config.sampling_steps, config.optimizer.lr, config.optimizer.beta1) == (8, 2e-3, 0.9)
    assert config.denoising_step_list == [1000.0, 500.0]


@pytest.mark.parametrize(
    ("given", "word"),
    [("true", "default"), ("false", "off"), ("off", "off"), ("on", "default"), ("default", "default"), ("max", "max")],
)
def test_compile_takes_words_and_booleans(given: str, word: str, tmp_path: Path):
    """YAML itself reads off and on as booleans."""
    config = load_config(overrides=[f"compile={given}"])
    (tmp_path / "given.yaml").write_text(f"compile: {given}\n")
    (tmp_path / "resolved.yaml").write_text(dump(config))
    assert load_config(tmp_path / "given.yaml") == load_config(tmp_path / "resolved.yaml") == config
    assert (config.compile, config.compiles) == (word, word != "off")


def test_hash_follows_the_settings():
    assert config_hash(load_config()) == config_hash(load_config(overrides=["seed=0"]))
    assert config_hash(load_config()) != config_hash(load_config(overrides=["seed=1"]))


def test_relative_path_is_found_from_any_directory(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/self_forcing_dmd.yaml").model_name == "Wan2.1-T2V-1.3B"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["timestep_shfit=3"], "command line: no setting 'timestep_shfit'; did you mean 'timestep_shift'?"),
        (["model_kwargs.timestep_shift=5"], "did you mean 'timestep_shift'?"),
        (["lr=1"], "did you mean 'optimizer.lr'?"),
        (["optimizer.bta1=1"], "did you mean 'optimizer.beta1'?"),
        (["zzzzzz=1"], "utils/config.py"),
        (["fps=fast"], "setting 'fps'"),
        (["optimizer.lr=[1]"], "setting 'optimizer.lr'"),
        (["optimizer=3"], "setting 'optimizer'"),
        (["solver=heun"], "setting 'solver'"),
        (["compile=fast"], "setting 'compile'"),
        (["fps"], "'fps' is not of the form key=value"),
        (["negative_prompt=[a"], "not valid YAML"),
        (["num_output_frames=10"], "10 latent frames do not split into blocks of 3; use 9 or 12"),
        (["num_output_frames=2"], "2 latent frames do not split into blocks of 3; use 3 "),
        (["independent_first_frame=true", "num_training_frames=22"], "into one frame and blocks of 3; use 19 or 22"),
        (["height=130"], "height is 130; pixels come in multiples of 16: use 128 or 144"),
        (["width=0"], "use 16"),
        (["denoising_step_list=[250,1000]"], "descending timesteps"),
        (["denoising_step_list=[]"], "descending timesteps"),
        (["denoising_step_list=[1000]", "causal=false"], "few steps need a causal model"),
        (["model_kwargs.local_attn_size=2"], "less than one block of 3"),
        (["model_kwargs.sink_size=13"], "[0, 12]"),
        (["batch_size=4", "total_batch_size=10"], "use 8"),
        (["context_noise=-1"], "[0, 1000]"),
        (["sampling_steps=0"], "must be positive"),
        (["ema.weight=1"], "ema.weight"),
    ],
)
def test_mistakes_name_the_key_and_the_way_out(overrides: list[str], words: str):
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=overrides)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"fps: [16\nheight: 3", "line 2: not valid YAML"),
        (b"fps: 16\nfps: 8\n", "not valid YAML"),
        (b"- a\n- b\n", "'key: value'"),
        (b"fps: \xff\xfe", "UTF-8"),
        (b"num_output_frame: 21\n", "no setting 'num_output_frame'; did you mean 'num_output_frames'?"),
        (b"1: 2\n", "no setting '1'"),
    ],
)
def test_bad_files_are_named(text: bytes, words: str, tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=r"run\.yaml") as caught:
        load_config(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_lists_what_is_there(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no such file; configs/ holds .*default_config\.yaml"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path)
