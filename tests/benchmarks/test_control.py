"""benchmarks/control.py on the CPU: the whole road at toy size, and figures that tell right from wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks import control
from wan.configs import POSE_FILES
from wan.modules.model import WanModel
from wan.modules.pose import DWPoseEmbedding
from wan.modules.weights import save_safetensors
from world.judges import Judges, load_judges, save_judges
from world.puppet import joints


@pytest.fixture
def posed_folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """The tiny model with random pose networks."""
    folder = tmp_path / "posed"
    shutil.copytree(tiny_model_folder, folder)
    torch.manual_seed(0)
    model = WanModel.from_pretrained(folder)
    model.add_pose_proj(8)
    torch.nn.init.normal_(model.pose_proj.weight)
    model.save_pretrained(folder)
    embedding = DWPoseEmbedding(8).init_weights().state_dict()
    save_safetensors({f"dwpose_embedding.{name}": t for name, t in embedding.items()}, folder / POSE_FILES[0])
    return folder


def test_the_whole_road(posed_folder: Path, tmp_path: Path):
    torch.manual_seed(0)
    save_judges(Judges(), tmp_path / "judges")
    arguments = ["--toy", "--device", "cpu", "--judges", str(tmp_path / "judges"), "--out", str(tmp_path / "out.json")]
    arguments += ["--set", f"model_name={posed_folder}"]
    assert control.main([*arguments, "sampling_steps=1", "guidance_scale=1"]) == 0
    content = json.loads((tmp_path / "out.json").read_text())
    names = "pck_unseen_motion pck_many_step pck_without_pose identity_accuracy pck_real_person"
    assert all(0 <= content[name] <= 1 for name in names.split())
    assert content["headline_of"] == "many_step" and "pck_streaming_4step" not in content
    columns = content["many_step_poses"]["columns"]
    assert list(columns) == ["ground truth", "VAE round trip", "with pose", "without pose"]
    assert columns["with pose"]["seen"]["joint_error_px"] != columns["without pose"]["seen"]["joint_error_px"]
    assert {"seen", "unseen", "all"} == set(columns["with pose"])
    assert len(content["many_step_streams"]["quarters"]) == 4
    person = content["many_step_person"]["columns"]
    assert person["with pose"]["joint_error_px"] != person["without pose"]["joint_error_px"]


def test_the_few_step_model_makes_the_headlines():
    def poses(score: float) -> dict:
        groups = {name: {"pck05": score} for name in ("seen", "unseen", "all")}
        return {"columns": {"with pose": groups, "without pose": {"all": {"pck05": score / 2}}}}

    content = {"few_step_poses": poses(0.9), "many_step_poses": poses(0.8)}
    assert control.headline(content) == {
        "pck_many_step": 0.8,
        "pck_streaming_4step": 0.9,
        "pck_unseen_motion": 0.9,
        "pck_without_pose": 0.45,
        "headline_of": "few_step",
    }


def test_sequences_are_what_they_say():
    args = control.parse_args(["--toy"])
    args.num_retargeted = 1
    sequences = control.make_sequences(args)
    assert len(sequences) == 3 and sequences.asked.shape == (3, 49, 18, 3)
    improvised = sequences.scenes.action == control.IMPROVISE
    assert improvised.tolist() == [False, True, False]
    own = joints(sequences.scenes, torch.arange(49))
    assert torch.equal(sequences.asked[:2], own[:2])
    fitted = control.body_error(sequences.asked[2, :, :, :2], own[2])
    assert fitted < 0.03  # the driver's motion on the other's limbs


def test_the_committed_judges_know_a_body_and_a_motion():
    args = control.parse_args(["--toy", "--device", "cpu"])
    args.size = 128
    sequences, judges = control.make_sequences(args), load_judges()
    truth = control.true_pictures(sequences.scenes, 39, args)
    read, own = control.read_joints(truth, judges, args), joints(sequences.scenes, torch.arange(39))
    assert control.followed(read, own, sequences.groups)["all"]["pck05"] > 0.99
    assert control.followed(read, own.flip(0), sequences.groups)["all"]["pck05"] < 0.6
    right = control.identity(truth, read, sequences.scenes, judges, args)
    wrong = control.identity(truth, read.flip(0), sequences.scenes.select(torch.tensor([1, 0])), judges, args)
    assert right["accuracy"] == 1 and wrong["accuracy"] < 1 and wrong["body"] == 0
