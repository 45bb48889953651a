"""docs/training.md speaks of what is there: recipes, settings, files."""

import dataclasses
import re
from pathlib import Path

import pytest

from trainer import TRAINERS
from utils.config import Config

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
CODE = re.findall(r"`([^`\n]+)`", TEXT)
SECTIONS = {f.name: f.type for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)}
NOT_TRAINED = {"default_config", "puppet_tiny", "wan_1.3b"}


def test_every_recipe_and_every_trainer_is_named():
    recipes = {path.stem for path in (ROOT / "configs").glob("*.yaml")} - NOT_TRAINED - {"puppet_first_blocks"}
    assert not {name for name in recipes if f"`{name}`" not in TEXT}
    assert not {name for name in TRAINERS if f"`{name}`" not in TEXT}


def test_every_recipe_that_is_named_is_there():
    named = {word for word in CODE if re.fullmatch(r"(puppet|self_forcing|causal|ode)_[a-z]+", word)}
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


FILES = sorted(set(re.findall(r"(?:scripts|benchmarks|tests|pipeline|utils)/[\w/]+\.py", TEXT)))


@pytest.mark.parametrize("path", FILES)
def test_every_file_that_is_named_is_there(path: str):
    assert (ROOT / path).is_file()
