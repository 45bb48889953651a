"""utils/video_folder.py and LatentFolder: a folder of videos becomes clips that are what the videos show."""

import json
import wave
from pathlib import Path

import pytest
import torch
from torch import Tensor

from utils.dataset import Samples
from utils.distributed import Ranks, Rngs, SampleRngs
from utils.latent_folder import LatentFolder
from utils.shards import Shards
from utils.video import write_video
from utils.video_folder import ClipShape, about, encode_videos, scan_videos

CPU = torch.device("cpu")
SHAPE = ClipShape(height=32, width=48, fps=16, num_frames=3)  # 9 pixel frames


def grey(num_frames: int, first: int = 0, height: int = 32, width: int = 48) -> Tensor:
    """Frame n is a grey of (first + n) / 64."""
    return ((first + torch.arange(num_frames)) / 64)[:, None, None, None].expand(-1, 3, height, width)


def mean_encode(pixels: Tensor) -> Tensor:
    """An encoder: mean of the first frame, then of every four; [1, F, 4, 4, 6]."""
    values = pixels.mean(dim=(2, 3, 4))
    frames = torch.cat([values[:, :1], values[:, 1:].unflatten(1, (-1, 4)).mean(2)], dim=1)
    return frames[:, :, None, None, None].expand(-1, -1, 4, 4, 6)


def words(prompts: list[str]) -> Samples:
    ids = torch.tensor([[ord(letter) for letter in prompt.ljust(20, "\0")] for prompt in prompts])
    return Samples(ids, (ids > 0).long())


def read(ids: Tensor) -> str:
    return "".join(map(chr, ids.tolist())).rstrip("\0")


def encode(folder: Path, output: Path, **options) -> None:
    options = {"vae": "abc", "ranks": Ranks(CPU), **options}
    encode_videos(folder, output, mean_encode, options.pop("shape", SHAPE), **options)


def dataset(folder: Path, **options) -> LatentFolder:
    settings = {"expected": about(SHAPE, "abc"), "num_latent_frames": 3, "seed": 1, "samples_per_step": 4}
    return LatentFolder(folder, words, **(settings | {"device": CPU, "dtype": torch.float32} | options))


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "a.mp4", grey(20), fps=16)
    write_video(folder / "deeper" / "b.mp4", grey(18, first=30, height=64, width=96), fps=32)  # 9 frames at 16
    (folder / "a.txt").write_text("a getting\n  lighter\n")
    (folder / "deeper" / "b.txt").write_text("b")
    return folder


def test_clips_follow_the_clock(videos, tmp_path):
    encode(videos, tmp_path)
    shards = Shards(tmp_path, "latents")
    assert [item.row["key"] for item in shards.items] == ["a.mp4", "deeper/b.mp4"]
    a, b = shards.items
    assert a.row["prompt"] == "a getting lighter" and a.row["num_clips"] == 2  # 18 of 20 frames
    for item, name, frames in [
        (a, "clip0", [0, 2.5, 6.5]),
        (a, "clip1", [9, 11.5, 15.5]),
        (b, "clip0", [30, 35, 43]),  # every second frame: 30, then 32 34 36 38, then 40 42 44 46
    ]:
        expected = torch.tensor(frames) / 64 * 2 - 1
        torch.testing.assert_close(shards.read(item, name)[:, 0, 0, 0].float(), expected, atol=0.02, rtol=0)


def test_samples_are_clips_with_their_captions(videos, tmp_path):
    encode(videos, tmp_path)
    data = dataset(tmp_path, samples_per_step=3)
    drawn = data.draw(SampleRngs(Rngs(0, 0, CPU), range(3)))
    assert drawn.latents.shape == (3, 3, 4, 4, 6) and drawn.latents.dtype == torch.float32
    first = {0: "a getting lighter", 9: "a getting lighter", 30: "b"}
    found = {round(float((x[0, 0, 0, 0] + 1) * 32)): read(ids) for x, ids in zip(drawn.latents, drawn.ids, strict=True)}
    assert found == first
    again = dataset(tmp_path, samples_per_step=3).draw(SampleRngs(Rngs(0, 0, CPU), range(1, 3)))
    assert torch.equal(again.latents, drawn.latents[1:]) and torch.equal(again.ids, drawn.ids[1:])
    assert dataset(tmp_path, num_latent_frames=2).draw(SampleRngs(Rngs(0, 0, CPU), range(1))).latents.shape[1] == 2
    assert sorted(data.prompts) == ["a getting lighter", "b"]


def test_a_second_run_encodes_only_what_is_new(videos, tmp_path):
    encoded = []

    def counting(pixels):
        encoded.append(len(pixels))
        return mean_encode(pixels)

    def add(name: str) -> None:
        (tmp_path / f"{name}.mp4").write_bytes((videos / "a.mp4").read_bytes())
        (tmp_path / f"{name}.txt").write_text(name)

    for new, clips in (("a", 2), (None, 2), ("c", 4)):
        if new:
            add(new)
        encode_videos(tmp_path, tmp_path / "latents", counting, SHAPE, vae="abc", ranks=Ranks(CPU))
        assert len(encoded) == clips
    assert len(dataset(tmp_path / "latents").clips) == 4


def test_videos_that_change_their_words_their_pictures_or_leave(videos, tmp_path):
    def now() -> dict[int, str]:
        """First grey of every clip -> its caption, as a run finds them."""
        captions = encode_videos(tmp_path, tmp_path / "latents", mean_encode, SHAPE, vae="abc", ranks=Ranks(CPU))
        data = dataset(tmp_path / "latents", captions=captions)
        drawn = data.draw(SampleRngs(Rngs(0, 0, CPU), range(len(data.clips))))
        assert sorted(set(data.prompts)) == sorted({read(ids) for ids in drawn.ids})
        return {round(float((x[0, 0, 0, 0] + 1) * 32)): read(i) for x, i in zip(drawn.latents, drawn.ids, strict=True)}

    for name, first in (("a", 0), ("b", 40)):
        write_video(tmp_path / f"{name}.mp4", grey(9, first), fps=16)
        (tmp_path / f"{name}.txt").write_text(name)
    assert now() == {0: "a", 40: "b"}
    (tmp_path / "a.txt").write_text("told anew")
    assert now() == {0: "told anew", 40: "b"}
    write_video(tmp_path / "a.mp4", grey(11, 20), fps=16)
    assert now() == {20: "told anew", 40: "b"}
    (tmp_path / "b.mp4").unlink()
    assert now() == {20: "told anew"}


@pytest.fixture
def troubled(videos, tmp_path) -> Path:
    folder = tmp_path / "troubled"
    folder.mkdir()
    for name in ("good", "torn", "mute", "empty", "short"):
        (folder / f"{name}.mp4").write_bytes((videos / "a.mp4").read_bytes())
        (folder / f"{name}.txt").write_text(name)
    (folder / "torn.mp4").write_bytes((videos / "a.mp4").read_bytes()[:400])
    (folder / "mute.txt").unlink()
    (folder / "empty.txt").write_text(" \n")
    write_video(folder / "short.mp4", grey(8), fps=16)
    with wave.open(str(folder / "sound.avi"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", "NONE"))
        sound.writeframes(bytes(800))
    (folder / "sound.txt").write_text("sound")
    return folder


def test_what_cannot_be_used_is_named_and_left_out(troubled, tmp_path, caplog):
    encode(troubled, tmp_path / "out")
    assert [read(dataset(tmp_path / "out").draw(SampleRngs(Rngs(0, 0, CPU), range(1))).ids[0])] == ["good"]
    said = "\n".join(caplog.messages)
    assert f"5 videos of {troubled} left out" in said
    assert f"left out: {troubled / 'mute.mp4'} has no caption in mute.txt" in said
    assert f"left out: {troubled / 'empty.mp4'} has no caption in empty.txt" in said
    assert f"left out: {troubled / 'torn.mp4'} cannot be read as a video" in said
    assert f"left out: {troubled / 'sound.avi'} holds no pictures" in said
    assert f"left out: {troubled / 'short.mp4'} has 8 frames at 16 per second, a clip needs 9" in said


def test_or_refused(troubled, tmp_path):
    with pytest.raises(ValueError, match=r"empty.mp4 has no caption in empty.txt; mend or remove it, or leave such"):
        encode(troubled, tmp_path / "out", skip=False)
    (troubled / "sound.avi").unlink()
    (troubled / "empty.txt").write_text("told")
    (troubled / "mute.txt").write_text("told")
    with pytest.raises(ValueError, match=r"short.mp4 has 8 frames"):
        encode(troubled, tmp_path / "out", skip=False)


def test_captions_in_a_list(videos, tmp_path):
    for name in ("a.mp4", "c.mp4"):
        (tmp_path / name).write_bytes((videos / "a.mp4").read_bytes())
    lines = [{"video": "a.mp4", "prompt": "of the list"}, {"video": "gone.mp4", "prompt": "x"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "a.txt").write_text("not asked")
    found, problems = scan_videos(tmp_path)
    assert [(video.name, video.prompt) for video in found] == [("a.mp4", "of the list")]
    assert problems == [
        f"{tmp_path / 'captions.jsonl'} lists gone.mp4, which is not there",
        f"{tmp_path / 'c.mp4'} has no caption in {tmp_path / 'captions.jsonl'}",
    ]
    (tmp_path / "captions.csv").write_text('video,prompt\nc.mp4,"one, two"\n')
    with pytest.raises(ValueError, match="keep one"):
        scan_videos(tmp_path)
    (tmp_path / "captions.jsonl").unlink()
    assert [video.prompt for video in scan_videos(tmp_path)[0]] == ["one, two"]
    (tmp_path / "captions.csv").write_text("file,text\nc.mp4,one\n")
    with pytest.raises(ValueError, match="expected the columns video and prompt, found"):
        scan_videos(tmp_path)
    (tmp_path / "captions.csv").unlink()
    (tmp_path / "captions.jsonl").write_text('{"video": "a.mp4"}\n')
    with pytest.raises(ValueError, match="captions.jsonl, line 1: expected"):
        scan_videos(tmp_path)


def test_folders_that_will_not_do(videos, tmp_path):
    with pytest.raises(FileNotFoundError, match="names a folder of videos"):
        scan_videos(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no videos"):
        scan_videos(tmp_path)
    encode(videos, tmp_path)
    with pytest.raises(ValueError, match="was made with vae 'abc', this run has 'xyz'"):
        encode(videos, tmp_path, vae="xyz")
    with pytest.raises(ValueError, match="was made with width 48, this run has 64"):
        dataset(tmp_path, expected={"width": 64})
    with pytest.raises(ValueError, match="clips of 3 latent frames, training needs 4"):
        dataset(tmp_path, num_latent_frames=4)


def test_some_are_held_out(tmp_path):
    from utils.shards import ShardWriter

    def make(keys):
        for key in keys:
            yield {"prompt": key, "num_clips": 2}, {f"clip{n}": torch.zeros(3, 1, 1, 1) for n in range(2)}

    ShardWriter(tmp_path, about(SHAPE, "abc"), Ranks(CPU), 16).fill([f"v{n:02d}" for n in range(40)], make)
    options = {"num_heldout": 3}
    parts = [dataset(tmp_path, split=split, **options).clips for split in ("train", "heldout")]
    names = [{item.row["key"] for item, _ in clips} for clips in parts]
    assert len(names[1]) == 3 and len(names[0]) == 37 and not names[0] & names[1]
    assert len(dataset(tmp_path, split="heldout", num_heldout=16).clips) == 8  # a tenth of 40 videos, two clips each
