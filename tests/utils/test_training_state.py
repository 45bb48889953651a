"""utils/training_state.py and utils/checkpointer.py: states whole, split, kept and refused."""

import resource
import shutil
from pathlib import Path

import pytest
import torch

from utils.checkpointer import Checkpointer
from utils.distributed import Ranks
from utils.training_state import TrainingState, load_training_state, save_compact_state

ALONE = Ranks(torch.device("cpu"))


def make_state(step: int) -> TrainingState:
    torch.manual_seed(step)
    tensors = {f"net/weights/{i}": torch.randn(100, 100) for i in range(60)}
    tensors["net/optimizer/step/0"] = torch.tensor(float(step))
    return TrainingState(tensors, {"step": step, "note": "kept"})


def test_a_state_comes_back_to_the_bit_from_small_files(tmp_path: Path):
    state = make_state(3)
    folder = save_compact_state(tmp_path, state, max_file_mb=1)
    files = sorted(folder.iterdir())
    assert len(files) == 3
    assert all(file.stat().st_size < 1.01e6 for file in files)
    loaded = load_training_state(tmp_path)
    assert loaded.facts == state.facts
    assert loaded.tensors.keys() == state.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], state.tensors[name]) for name in state.tensors)


def test_the_last_states_are_kept_and_broken_writes_ignored(tmp_path: Path):
    assert load_training_state(tmp_path) is None
    for step in (1, 2, 3):
        save_compact_state(tmp_path, make_state(step), keep_last=2)
    home = tmp_path / "training_state"
    assert sorted(path.name for path in home.iterdir()) == ["step_00000002", "step_00000003"]
    (home / "step_00000009.partial").mkdir()  # killed while writing
    assert load_training_state(tmp_path).facts["step"] == 3


def test_incomplete_and_damaged_states_are_refused(tmp_path: Path):
    folder = save_compact_state(tmp_path, make_state(1), max_file_mb=1)
    first, second, _ = sorted(folder.iterdir())
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(ValueError, match="lacks some of its parts"):
        load_training_state(tmp_path)
    second.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=r"part-2-of-3\.safetensors is damaged"):
        load_training_state(tmp_path)
    assert first.is_file()


def save_whole(folder: Path, state: TrainingState, keep_last: int = 2) -> None:
    checkpointer = Checkpointer(folder, ALONE, keep_last)
    checkpointer.save(state.tensors, state.facts)
    checkpointer.wait()


def test_a_whole_state_comes_back_to_the_bit(tmp_path: Path):
    state = make_state(3)
    state.tensors["net/weights/odd"] = torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d)
    save_whole(tmp_path, state)
    loaded = load_training_state(tmp_path)
    assert {name: loaded.facts[name] for name in state.facts} == state.facts
    assert loaded.tensors.keys() == state.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], state.tensors[name]) for name in state.tensors)


def test_the_last_whole_states_are_kept_and_leftovers_go(tmp_path: Path):
    home = tmp_path / "training_state"
    for step in (1, 2, 3, 3):
        (home / "step_00000009.partial").mkdir(parents=True)  # killed while writing
        save_whole(tmp_path, make_state(step))
        assert load_training_state(tmp_path).facts["step"] == step
    assert sorted(path.name for path in home.iterdir()) == ["step_00000002", "step_00000003"]


def test_a_save_goes_on_while_its_owner_does(tmp_path: Path):
    checkpointer = Checkpointer(tmp_path, ALONE)
    state = make_state(1)
    checkpointer.save(state.tensors, state.facts)
    checkpointer.save(state.tensors, state.facts | {"step": 2})  # waits for the first
    assert load_training_state(tmp_path).facts["step"] == 1
    checkpointer.wait()
    assert load_training_state(tmp_path).facts["step"] == 2


@pytest.mark.parametrize("harm", ["cut", "missing", "no metadata"])
def test_damaged_whole_states_are_refused(harm: str, tmp_path: Path):
    save_whole(tmp_path, make_state(1))
    folder = tmp_path / "training_state" / "step_00000001"
    data = folder / (".metadata" if harm == "no metadata" else "__0_0.distcp")
    if harm == "cut":
        data.write_bytes(data.read_bytes()[:-7])
    else:
        data.unlink()
    with pytest.raises(ValueError, match="is damaged .*; delete .*step_00000001 to resume from the state before it"):
        load_training_state(tmp_path)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "facts.json"])
def test_rotten_bytes_of_the_right_number_are_refused(name: str, tmp_path: Path):
    save_whole(tmp_path, make_state(1))
    data = tmp_path / "training_state" / "step_00000001" / name
    data.write_bytes(bytes(data.stat().st_size))
    with pytest.raises(ValueError, match="is damaged .*; delete .*step_00000001 to resume"):
        load_training_state(tmp_path)


@pytest.fixture
def small_disk():
    """No file may grow beyond 0.3 MB: the write fails as on a full disk, in the middle of the file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("save", [save_whole, save_compact_state])
def test_a_disk_that_fills_up_costs_no_older_state(save, tmp_path: Path, request):
    state = make_state(1)
    save(tmp_path, state)
    request.getfixturevalue("small_disk")
    with pytest.raises(OSError, match=r"of step 2 \(0\.00 GB\) could not be saved .*00000001 stays: make room"):
        save(tmp_path, TrainingState(state.tensors, {"step": 2}))
    assert load_training_state(tmp_path).facts["step"] == 1
    assert [path.name for path in (tmp_path / "training_state").iterdir()] == ["step_00000001"]


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="the disk is full .*there is none before it: make room"):
        save_whole(tmp_path, make_state(2))
    assert not list((tmp_path / "training_state").glob("*"))
