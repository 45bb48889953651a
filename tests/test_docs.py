"""docs/training.md and training_data.md speak of what is there: recipes, settings, files, sizes."""

import dataclasses
import re
from pathlib import Path

import pytest

from trainer import TRAINERS
from trainer.data import KINDS
from utils.config import Config

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
DATA_TEXT = (ROOT / "docs" / "training_data.md").read_text(encoding="utf-8")
CODE = re.findall(r"`([^`\n]+)`", TEXT + DATA_TEXT)
SECTIONS = {f.name: f.type for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)}
KINDS_OF_DATA = {kind for kinds in KINDS.values() for kind in kinds}
# In embedded_model.md and control.md.
TOLD_ELSEWHERE = {"puppet_first_blocks", "puppet_pose", "puppet_pose_few_steps", "wan_1.3b_pose"}
NOT_TRAINED = {"default_config", "puppet_tiny", "puppet_many_steps", "wan_1.3b"}


def test_every_recipe_and_every_trainer_is_named():
    recipes = {path.stem for path in (ROOT / "configs").glob("*.yaml")} - NOT_TRAINED - TOLD_ELSEWHERE
    assert not {name for name in recipes if f"`{name}`" not in TEXT}
    assert not {name for name in TRAINERS if f"`{name}`" not in TEXT}


def test_every_recipe_that_is_named_is_there():
    named = {word for word in CODE if re.fullmatch(r"(puppet|self_forcing|causal|ode)_[a-z]+", word)} - KINDS_OF_DATA
    assert len(named) > 12
    assert not {name for name in named if not (ROOT / "configs" / f"{name}.yaml").is_file()}


def test_every_setting_that_is_named_is_there():
    settings = [word.split(":")[0] for word in CODE if re.match(r"[a-z_]+(\.[a-z0-9_]+)?(: .*)?$", word)]
    dotted = [word.split(".") for word in settings if "." in word and word.split(".")[0] in SECTIONS]
    assert len(dotted) > 8
    for section, name in dotted:
        assert name in {f.name for f in dataclasses.fields(SECTIONS[section])}, f"{section}.{name}"
    plain = [word.split(":")[0] for word in CODE if re.match(r"[a-z_]+: ", word)]
    assert not set(plain) - {f.name for f in dataclasses.fields(Config)}


FILES = sorted(set(re.findall(r"(?:scripts|benchmarks|tests|pipeline|utils)/[\w/]+\.py", TEXT + DATA_TEXT)))


@pytest.mark.parametrize("path", FILES)
def test_every_file_that_is_named_is_there(path: str):
    assert (ROOT / path).is_file()


def test_sizes_on_disk_follow_from_shapes():
    """bfloat16: clips of 21 latents of 16 channels, 5 states per pair, prompts of 100 tokens; puppets are 192 wide."""
    rows = re.findall(
        r"^\| (?:clip|an hour|1,000).*?\| ([\d.]+) (MB|GB) \| ([\d.]+) (MB|GB) \|$", DATA_TEXT, re.MULTILINE
    )
    said = [[float(n) * {"MB": 1e6, "GB": 1e9}[unit] for n, unit in (row[:2], row[2:])] for row in rows]
    for place, (cells, width) in enumerate([(60 * 104, 4096), (16 * 16, 192)]):
        clip = 2 * 21 * 16 * cells
        expected = [clip, clip * (3600 * 16 // 81), 1000 * 5 * clip, 1000 * 100 * width * 2]
        assert [row[place] for row in said] == pytest.approx(expected, rel=0.005)


def test_every_kind_of_data_is_told():
    assert set(re.findall(r"^\| `(\w+)` \|", DATA_TEXT, re.MULTILINE)) == KINDS_OF_DATA
