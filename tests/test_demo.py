"""The demo's studio: frames while they are made, Stop then Start, empty and repeated prompts, two tabs."""

import hashlib
import json
import re
import threading
import time
from itertools import islice

import pytest
import torch

import demo
import inference
from demo import Studio, build_page
from tests.test_inference import MANY_STEPS
from utils.config import load_config
from utils.prompts import video_seed


class FakePipeline:
    """Makes a block of grey pictures every 20 ms and notices when two streams run at once."""

    def __init__(self):
        self.sampling_steps = 0
        self.running = 0
        self.calls = []

    def stream(self, *, text_prompts, seeds, num_frames, height, width, first_frame_alone):
        assert first_frame_alone
        self.calls.append((text_prompts[0], seeds[0], self.sampling_steps, num_frames))
        self.running += 1
        try:
            block = 0
            while num_frames is None or block < num_frames // 3:
                assert self.running == 1
                time.sleep(0.02)
                yield torch.full((1, 9 if block == 0 else 12, 3, height, width), 0.5)
                block += 1
        finally:
            self.running -= 1


@pytest.fixture
def studio() -> Studio:
    return Studio(FakePipeline(), load_config("configs/puppet_many_steps.yaml", ["fps=1000"]))


def statuses(watching) -> list[str]:
    return [status for _, status in watching]


def wait_until_idle(studio: Studio) -> None:
    deadline = time.monotonic() + 5
    while studio._busy.locked():
        assert time.monotonic() < deadline, "the maker did not stop"
        time.sleep(0.01)


def test_frames_arrive_one_by_one_as_pictures(studio):
    shown = list(studio.watch("a puppet waves", seed=3, steps=5, seconds=0.02))
    pictures = [picture for picture, status in shown if status.startswith("Frame")]
    assert len(pictures) == 21
    assert all(
        re.fullmatch(r'<img [^>]*src="data:image/jpeg;base64,[A-Za-z0-9+/=]+">', picture) for picture in pictures
    )
    assert shown[-1][1] == "Done: 21 frames."
    assert studio.pipeline.calls == [("a puppet waves", video_seed(3, "a puppet waves"), 5, 6)]


@pytest.mark.parametrize("prompt", ["", "  \n", None])
def test_an_empty_prompt_asks_for_words_and_locks_nothing(studio, prompt):
    assert statuses(studio.watch(prompt, 0, 4, 1)) == ["Type a prompt first."]
    assert statuses(studio.watch("words", 0, 4, 0.001))[-1] == "Done: 9 frames."


def test_the_same_prompt_again(studio):
    assert statuses(studio.watch("words", 0, 4, 0.001))[-1] == statuses(studio.watch("words", 0, 4, 0.001))[-1]


def test_stop_ends_an_endless_video_and_start_works_again(studio):
    watching = studio.watch("words", 0, 4, seconds=0, tab="one")
    assert len(list(islice(watching, 30))) == 30
    studio.stop("one")
    assert re.fullmatch(r"Stopped after \d+ frames\.", statuses(watching)[-1])
    wait_until_idle(studio)
    assert statuses(studio.watch("words", 0, 4, 0.001, tab="one"))[-1] == "Done: 9 frames."


def test_stop_without_a_video_does_nothing(studio):
    studio.stop("one")


def test_starting_again_in_the_same_tab_ends_the_earlier_video(studio):
    first = studio.watch("first", 0, 4, seconds=0, tab="one")
    next(first)
    assert statuses(studio.watch("second", 0, 4, 0.001, tab="one"))[-1] == "Done: 9 frames."
    assert statuses(first)[-1].startswith("Stopped")


def test_a_second_tab_waits_its_turn_and_says_so(studio):
    first = studio.watch("first", 0, 4, seconds=0, tab="one")
    list(islice(first, 5))
    second = studio.watch("second", 0, 4, 0.001, tab="two")
    assert list(islice(second, 2))[-1][1] == "Another video is being made; yours starts when it is finished or stopped."
    threading.Timer(0.1, studio.stop, ["one"]).start()
    assert statuses(second)[-1] == "Done: 9 frames."
    assert statuses(first)[-1].startswith("Stopped")


def test_a_closed_tab_frees_the_pipeline(studio):
    watching = studio.watch("first", 0, 4, seconds=0, tab="one")
    list(islice(watching, 5))
    watching.close()
    wait_until_idle(studio)
    assert not studio._stops


def test_an_error_is_told_and_the_next_video_works(studio):
    working = studio.pipeline
    studio.pipeline = type("Broken", (), {"stream": lambda self, **_: (_ for _ in ()).throw(ValueError("bad size"))})()
    assert "Error: bad size" in statuses(studio.watch("words", 0, 4, 1))
    studio.pipeline = working
    assert statuses(studio.watch("words", 0, 4, 0.001))[-1] == "Done: 9 frames."


@pytest.mark.parametrize(("seconds", "latents"), [(0, None), (0.01, 3), (9 / 16, 3), (10 / 16, 6), (81 / 16, 21)])
def test_lengths_are_whole_blocks(seconds, latents):
    studio = Studio(FakePipeline(), load_config("configs/puppet_many_steps.yaml"))
    assert studio.latent_frames(seconds) == latents


def test_the_page_serves_frames_to_a_client_on_this_machine_only(studio):
    pytest.importorskip("gradio")
    from gradio_client import Client

    page = build_page(studio)
    _, url, shared = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, share=False)
    try:
        assert url.startswith("http://127.0.0.1") and not shared
        job = Client(url, verbose=False).submit("a puppet waves", 1, 4, 1, api_name="/watch")
        picture, status = job.result(timeout=60)
        assert "base64" in picture["value"] if isinstance(picture, dict) else "base64" in picture
        assert status.startswith("Done")
        assert len(job.outputs()) > 10
    finally:
        page.close()


def test_a_real_model_shows_what_inference_writes(tiny_model_folder, tmp_path, monkeypatch):
    from pipeline.build import build_pipeline

    frames = []
    monkeypatch.setattr(demo, "jpeg_html", lambda frame: frames.append(frame) or "")
    settings = [f"model_name={tiny_model_folder}", "height=32", "width=32", "num_output_frames=6", *MANY_STEPS]
    config = load_config("configs/puppet_tiny.yaml", settings)
    studio = Studio(build_pipeline(config, "cpu"), config)
    shown = list(studio.watch(" a red puppet waves", seed=3, steps=2, seconds=1))
    assert shown[-1][1] == "Done: 21 frames."
    command = ["--prompt", "a red puppet waves", "--seed", "3", "--output_folder", str(tmp_path)]
    assert inference.main([*command, *settings]) == 0
    written = json.loads((tmp_path / "metadata.jsonl").read_text())["fingerprint"]
    assert hashlib.sha256(torch.stack(frames).numpy()).hexdigest().startswith(written)


def test_what_compiles_does_it_before_the_page_opens(caplog):
    pipeline = FakePipeline()
    with caplog.at_level("INFO", logger="demo"):
        demo.warm_up(pipeline, load_config(overrides=["compile=max", "num_output_frames=6"]))
    assert pipeline.calls == [("warming up", 0, 0, 6)]
    assert [record.message.split(",")[0] for record in caplog.records] == [
        "compile=max: 9 frames of a first video",
        "compile=max: 21 frames of a first video",
    ]
