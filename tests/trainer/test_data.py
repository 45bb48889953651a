"""trainer/data.py: a run learns from whatever data.kind names; resumed = uninterrupted, cached = computed."""

import json
from pathlib import Path

import pytest
import torch

import train
from tests.trainer.toy import TOY, make, make_student, state
from trainer.data import latent_cache, vae_fingerprint
from trainer.diffusion import DiffusionTrainer
from trainer.distillation import ScoreDistillationTrainer
from utils.config import ConfigError, load_config
from utils.distributed import Rngs, SampleRngs
from utils.shards import Shards, ShardWriter
from utils.video import read_video, write_video
from utils.wan_wrapper import WanVAEWrapper
from world.puppet import sample_scenes
from world.render import render

pytestmark = pytest.mark.usefixtures("toy_sizes")
CAPTIONS = ["a red puppet waves", "a blue puppet", "a green puppet jumps", "a ball", "a puppet bows"]


class WordsTrainer(DiffusionTrainer):
    """An objective that makes its own clips."""

    name = "diffusion"
    learns_from = "words"


@pytest.fixture(scope="session")
def video_folder(tmp_path_factory) -> Path:
    """Five puppet videos of 21 + a few frames, each with its caption."""
    folder = tmp_path_factory.mktemp("videos")
    clips = render(sample_scenes(5, 0), 25, size=32)
    for n, (clip, caption) in enumerate(zip(clips, CAPTIONS, strict=True)):
        write_video(folder / f"{n}.mp4", clip.add(1).div(2)[: 21 + n], fps=16)
        (folder / f"{n}.txt").write_text(caption)
    return folder


def train_on(logdir: Path, vae_folder: Path, *settings: str) -> None:
    """Through the door, as a person would."""
    config = logdir.parent / "toy.yaml"
    config.write_text("trainer: diffusion\n")
    overrides = [*TOY, f"data.vae_folder={vae_folder}", *settings]
    arguments = ["--config_path", str(config), "--logdir", str(logdir), "--no_visualize", *overrides]
    assert train.main(arguments) == 0


def equal(one: Path, other: Path) -> bool:
    a, b = state(one), state(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_folder_of_videos_then_its_latents_alone(tmp_path, vae_folder, video_folder):
    cache = tmp_path / "latents"
    videos = ["data.kind=videos", f"data.path={video_folder}", f"data.latent_cache={cache}"]
    train_on(tmp_path / "whole", vae_folder, *videos, "max_steps=4")
    train_on(tmp_path / "parts", vae_folder, *videos, "max_steps=2")
    train_on(tmp_path / "parts", vae_folder, *videos, "max_steps=4")
    assert equal(tmp_path / "whole", tmp_path / "parts")
    train_on(tmp_path / "alone", vae_folder, "data.kind=latents", f"data.path={cache}", "max_steps=4")
    assert equal(tmp_path / "whole", tmp_path / "alone")

    shards = Shards(cache, "latents")
    assert [item.row["prompt"] for item in shards.items] == CAPTIONS
    vae = WanVAEWrapper(str(tmp_path / "whole" / "export"))
    for n, item in enumerate(shards.items):
        pixels, _ = read_video(video_folder / f"{n}.mp4")
        expected = vae.encode_to_latent(pixels[None, :21] * 2 - 1)[0].bfloat16()
        assert torch.equal(shards.read(item, "clip0"), expected)
    assert shards.about["vae"] == vae_fingerprint(tmp_path / "whole" / "export")


def test_split_over_passes_it_is_the_same_batch(tmp_path, vae_folder, video_folder):
    settings = ["data.kind=videos", f"data.path={video_folder}", f"data.latent_cache={tmp_path / 'latents'}"]
    trainer = make(DiffusionTrainer, tmp_path / "a", vae_folder, "max_steps=1", *settings, "total_batch_size=4")
    other = make(DiffusionTrainer, tmp_path / "b", vae_folder, "max_steps=1", *settings, "batch_size=4")
    for one in (trainer, other):
        one.start()
    rngs = Rngs(0, 3, torch.device("cpu"))
    parts = [trainer.prepare(SampleRngs(rngs, range(i, i + 2))).clean_latent for i in (0, 2)]
    assert torch.equal(torch.cat(parts), other.prepare(SampleRngs(rngs, range(4))).clean_latent)


@pytest.fixture
def frozen(tmp_path, vae_folder) -> list[str]:
    """Settings of a run whose text encoder does not learn."""
    make(DiffusionTrainer, tmp_path / "first", vae_folder, "max_steps=1").train(visualize=False)
    return ["train_text_encoder=false", f"data.text_encoder_folder={tmp_path / 'first' / 'export'}"]


def test_a_text_cache_replaces_the_encoder(tmp_path, vae_folder, video_folder, frozen, caplog):
    caplog.set_level("INFO")
    settings = ["data.kind=videos", f"data.path={video_folder}", f"data.latent_cache={tmp_path / 'latents'}", *frozen]
    settings += ["data.text_dropout=0.5", "negative_prompt=nothing", "max_steps=2"]
    cached = [*settings, f"data.text_cache={tmp_path / 'words'}"]
    resident = make(DiffusionTrainer, tmp_path / "a", vae_folder, *settings)
    resident.start()
    trainer = make(DiffusionTrainer, tmp_path / "b", vae_folder, *cached)
    assert trainer.text_encoder is None
    trainer.start()
    for step in range(3):
        rngs = [SampleRngs(Rngs(0, step, torch.device("cpu")), range(4)) for _ in range(2)]
        one, other = resident.prepare(rngs[0]), trainer.prepare(rngs[1])
        assert torch.equal(one.clean_latent, other.clean_latent)
        mine, theirs = (batch.conditioning.prompt_embeds.float() for batch in (one, other))
        torch.testing.assert_close(mine, theirs, atol=0.02, rtol=0.02)  # bfloat16, in other shapes

    caplog.clear()
    again = make(DiffusionTrainer, tmp_path / "b", vae_folder, *cached)
    again.train()  # with contact sheet and export
    assert not any("text encoder" in message for message in caplog.messages)
    assert (tmp_path / "b" / "samples" / "step_000002.png").is_file()
    assert make(DiffusionTrainer, tmp_path / "c", vae_folder, *frozen, f"model_name={tmp_path / 'b' / 'export'}")


def test_contact_sheets_show_the_prompts_that_were_asked_for(tmp_path, vae_folder, video_folder):
    (tmp_path / "shown.txt").write_text("one\ntwo\nthree\n")
    settings = ["data.kind=videos", f"data.path={video_folder}", f"data.latent_cache={tmp_path / 'latents'}"]
    trainer = make(DiffusionTrainer, tmp_path / "a", vae_folder, "max_steps=1", *settings)
    trainer.start()
    assert trainer.source.sample_prompts(2) == CAPTIONS[:2]
    settings += [f"data.sample_prompts={tmp_path / 'shown.txt'}"]
    assert make(DiffusionTrainer, tmp_path / "b", vae_folder, *settings, "max_steps=1").source.sample_prompts(2) == [
        "one",
        "two",
    ]
    puppets = make(DiffusionTrainer, tmp_path / "c", vae_folder, "max_steps=1").source.sample_prompts(3)
    assert len(puppets) == 3
    assert puppets == make(DiffusionTrainer, tmp_path / "d", vae_folder, "max_steps=1").source.sample_prompts(3)


def test_words_alone(tmp_path, vae_folder):
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS))
    trainer = make(WordsTrainer, tmp_path / "a", vae_folder, "max_steps=1")  # puppet captions on the fly
    trainer.start()
    batch = trainer.prepare(SampleRngs(Rngs(0, 0, torch.device("cpu")), range(2)))
    assert batch.clean_latent is None and batch.conditioning.prompt_embeds.shape == (2, 24, 16)
    settings = ["data.kind=prompts", f"data.path={tmp_path / 'prompts.txt'}", "max_steps=1"]
    trainer = make(WordsTrainer, tmp_path / "b", vae_folder, *settings)
    trainer.start()
    assert trainer.data.prompts == CAPTIONS
    assert trainer.held_out(trainer.objective.loss) == {}
    with pytest.raises(ConfigError, match="learns from clips; set data.kind to puppet or videos"):
        make(DiffusionTrainer, tmp_path / "c", vae_folder, *settings)


def test_score_distillation_from_prompts_without_an_encoder(tmp_path, folders, caplog):
    caplog.set_level("INFO")
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS))
    settings = ["data.kind=prompts", f"data.path={tmp_path / 'prompts.txt'}", "negative_prompt=bad", "max_steps=2"]
    cached = [*settings, f"data.text_cache={tmp_path / 'words'}"]
    resident = make_student(ScoreDistillationTrainer, tmp_path / "a", folders, *settings)
    filling = make_student(ScoreDistillationTrainer, tmp_path / "b", folders, *cached)
    for trainer in (resident, filling):
        trainer.start()
    caplog.clear()
    trainer = make_student(ScoreDistillationTrainer, tmp_path / "b", folders, *cached)
    trainer.start()
    assert not any("text encoder" in message for message in caplog.messages)
    rngs = [SampleRngs(Rngs(0, 0, torch.device("cpu"), stream=1), range(4)) for _ in range(2)]
    one, other = resident.prepare(rngs[0]), trainer.prepare(rngs[1])
    for name in ("conditioning", "negative"):
        mine, theirs = (getattr(batch, name).prompt_embeds.float() for batch in (one, other))
        torch.testing.assert_close(mine, theirs, atol=0.02, rtol=0.02)
    assert one.clean_latent is None and other.clean_latent is None
    trainer.train(visualize=False)
    assert state(tmp_path / "b")


def test_a_held_out_loss_where_videos_are_many(tmp_path, vae_folder):
    def clips(keys):
        for key in keys:
            yield {"prompt": key, "num_clips": 1}, {"clip0": torch.randn(6, 4, 4, 4)}

    about = {"kind": "latents", "height": 32, "width": 32, "fps": 16, "num_frames": 6}
    trainer = make(DiffusionTrainer, tmp_path / "a", vae_folder, "max_steps=1")
    about["vae"] = vae_fingerprint(trainer.folder)
    ShardWriter(tmp_path / "latents", about, trainer.ranks, 16).fill([f"{n:02d}" for n in range(20)], clips)
    settings = ["data.kind=latents", f"data.path={tmp_path / 'latents'}", "max_steps=1"]
    make(DiffusionTrainer, tmp_path / "b", vae_folder, *settings).train(save=False)
    lines = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["eval/loss"] > 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data.kind=videos"], "data.kind is videos, but data.path does not say where they are; set data.path"),
        (["data.kind=vidoes", "data.path=x"], "data.kind"),
        (["trainer=vae", "data.kind=videos", "data.path=x"], "trainer vae learns from puppets; leave it out"),
        (["data.path=x"], "data.path is x, but data.kind is puppet, which reads no files"),
        (["data.text_cache=x"], "whose captions are new in every step"),
        (["data.kind=prompts", "data.path=x", "data.text_cache=x", "train_text_encoder=true"], "set one of them"),
        (["data.pth=x"], "did you mean 'data.path'?"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=settings)
    assert words in str(caught.value)


def test_where_latents_go(tmp_path):
    assert latent_cache(load_config(overrides=["data.kind=videos", "data.path=v"])) == Path("v/latents")
