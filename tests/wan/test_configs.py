"""wan/configs.py: a missing file is answered with a line that can be typed as it stands."""

from pathlib import Path

import pytest

from wan.configs import (
    CLIP_FILES,
    TOKENIZER_FOLDERS,
    VAE_FILES,
    WAN_CONFIGS,
    WanConfig,
    find_model_file,
    find_model_folder,
)
from wan.modules.model import WanModel

SMALL = WanConfig(dim=32, ffn_dim=64, num_heads=2, num_layers=1)


def folder_with_config_only(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(SMALL.to_json())
    return path


@pytest.mark.parametrize("name", [name for name in WAN_CONFIGS if name.startswith("Wan2.1-")])
def test_published_files_are_fetched_by_the_repository(tmp_path, name):
    """Naming one file would not do: a Wan folder has its tokenizer as google/umt5-xxl/, not tokenizer/."""
    folder = folder_with_config_only(tmp_path / name)
    line = f"hf download Wan-AI/{name} --local-dir {folder}$"
    for candidates in (VAE_FILES, TOKENIZER_FOLDERS, CLIP_FILES):
        with pytest.raises(FileNotFoundError, match=line):
            find_model_file(folder, candidates)
    with pytest.raises(FileNotFoundError, match=line):
        WanModel.from_pretrained(folder)


def test_files_that_no_hub_has_are_not_looked_for_there(tmp_path):
    own = folder_with_config_only(tmp_path / "mine")
    embedded = folder_with_config_only(tmp_path / "puppet-tiny")
    for folder, remedy in ((own, "copy it from the model"), (embedded, f"git checkout -- {embedded}")):
        with pytest.raises(FileNotFoundError, match=remedy):
            find_model_file(folder, VAE_FILES)
        with pytest.raises(FileNotFoundError, match=remedy):
            WanModel.from_pretrained(folder)


def test_models_are_found_by_path_and_by_name(tmp_path, monkeypatch):
    folder = folder_with_config_only(tmp_path / "wan_models" / "mine")
    monkeypatch.chdir(tmp_path)
    assert find_model_folder(folder) == folder
    assert find_model_folder("mine") == Path("wan_models/mine")
    assert find_model_folder("puppet-tiny").is_dir()  # beside the package, from anywhere
    with pytest.raises(FileNotFoundError, match="hf download Wan-AI/Wan2.1-T2V-14B --local-dir wan_models/Wan2.1-T2V"):
        find_model_folder("Wan2.1-T2V-14B")
