"""Judges: what they answer has the promised shape, they fit the budget, learn, resume, and load what was saved."""

import logging

import pytest
import torch

from world.evaluate import contact_sheet, features_of, measure, quarters, table, to_bytes
from world.judges import FEATURES, Judges, expected_joints, load_judges, save_judges
from world.puppet import CANVAS, joints, sample_scenes
from world.render import render
from world.train_judges import degrade, heatmap_loss, train


@pytest.fixture(scope="module")
def judges():
    torch.manual_seed(0)
    return Judges().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def videos():
    scenes = sample_scenes(2, 0)
    return scenes, render(scenes, 44) * 0.5 + 0.5


def test_answers_have_their_shapes(judges, videos):
    _, pixels = videos
    read = judges.read_joints(pixels)
    assert read.shape == (2, 44, 18, 2)
    assert read.min() >= 0 and read.max() <= CANVAS
    assert judges.read_action(read).shape == (2, 10)
    assert {name: tuple(v.shape) for name, v in judges.read_look(pixels).items()} == {
        "body": (2, 8), "background": (2, 8), "prop": (2, 4), "prop_colour": (2, 8),
    }  # fmt: skip
    assert judges.read_features(pixels).shape == (2, 1, FEATURES)


def test_other_sizes_are_read_in_canvas_pixels(judges, videos):
    _, pixels = videos
    small = torch.nn.functional.interpolate(pixels[0, :2], size=(64, 64), mode="area")[None]
    assert judges.read_joints(small).shape == (1, 2, 18, 2)


def test_too_short_a_video_has_no_features(judges):
    with pytest.raises(ValueError, match="at least 39"):
        judges.read_features(torch.zeros(1, 20, 3, 128, 128))


def test_saved_judges_answer_the_same_and_are_small(judges, videos, tmp_path):
    path = save_judges(judges, tmp_path)
    assert path.stat().st_size <= 2.5e6
    again = load_judges(tmp_path)
    _, pixels = videos
    few = pixels[:, :2]
    assert (again.read_joints(few) - judges.read_joints(few)).abs().max() < 0.2


def test_missing_judges_say_how_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="scripts/train_judges.py --out"):
        load_judges(tmp_path)


def test_the_heatmap_target_is_where_the_joint_is():
    wanted = 4 + 120 * torch.rand(2, 18, 2, generator=torch.Generator().manual_seed(0))
    logits = torch.zeros(2, 18, 32, 32, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        heatmap_loss(logits, wanted).backward()
        optimizer.step()
    assert (expected_joints(logits) - wanted).abs().max() < 0.5


def test_degrading_keeps_range_and_tells_what_it_did():
    torch.manual_seed(0)
    video = render(sample_scenes(6, 1), 2)
    worse, amounts = degrade(video)
    assert worse.shape == video.shape
    assert worse.min() >= -1 and worse.max() <= 1
    change = (worse - video).abs().mean((1, 2, 3, 4))
    assert change[amounts.sum(1) == 0].sum() < change[amounts.sum(1) > 0.2].sum()


def test_training_takes_steps_saves_and_resumes(tmp_path, caplog):
    options = {"device": "cpu", "clips": 1, "stills": 2}
    train(tmp_path, seconds=0.1, round_trip=lambda video: video, **options)
    first = load_judges(tmp_path)
    with caplog.at_level(logging.INFO):
        train(tmp_path, seconds=0.0, **options)  # the time is spent: nothing more happens
    assert "resumed at step 1" in caplog.text
    again = load_judges(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_measure_of_ground_truth_and_its_quarters(judges, videos):
    scenes, pixels = videos
    features = features_of(pixels, judges)
    as_bytes = to_bytes(pixels)
    figures = measure(as_bytes, scenes, judges, features, references=as_bytes, same_motion=True)
    assert figures["psnr"] == pytest.approx(100)
    assert figures["fwd"] < 0.5  # only the rounding to bytes
    assert 0 <= figures["pck05"] <= 1
    rows = quarters(as_bytes, scenes, judges, same_motion=True)
    assert len(rows) == 4
    assert "| psnr | 100.000 |" in table({"ground truth": figures})


def test_perfect_joints_score_one():
    scenes = sample_scenes(2, 3)

    class Oracle(Judges):
        def read_joints(self, videos, **_):
            return joints(scenes, torch.arange(10, 10 + videos.shape[1]))[..., :2]

    figures = measure(torch.zeros(2, 4, 3, 128, 128), scenes, Oracle().eval(), start_frame=10, same_motion=True)
    assert figures["pck05"] == 1
    assert figures["joint_error_px"] < 1e-3


def test_a_contact_sheet_is_written(videos, tmp_path):
    _, pixels = videos
    path = contact_sheet(pixels, ["one", "zwei – 猫"], tmp_path / "a" / "sheet.png", frames=4)
    from PIL import Image

    assert Image.open(path).size == (4 * 128, 2 * 144)
