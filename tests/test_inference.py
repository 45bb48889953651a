"""inference.py on a tiny random model: what it writes, what it keeps, and that a video depends on its prompt alone."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import inference
from tests.pipeline.test_pose import synthetic_checkpoint
from utils.config import config_hash, load_config
from utils.pose.keypoints import save_keypoints
from utils.video import read_video, write_video

FRAMES = 9  # 3 latent frames, one block
MANY_STEPS = ["lora_ckpt=null", "denoising_step_list=null", "guidance_scale=1.5", "sampling_steps=2"]


@pytest.fixture
def run(tiny_model_folder, tmp_path, monkeypatch):
    """inference.main on the tiny model, 32x32, one block, two steps; files land in tmp_path/out."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: str, out: str = "out", code: int = 0) -> Path:
        settings = [f"model_name={tiny_model_folder}", "height=32", "width=32", *MANY_STEPS]
        flags = [] if "--num_output_frames" in argv else ["--num_output_frames", "3"]
        assert inference.main(["--output_folder", out, *flags, *argv, *settings]) == code
        return tmp_path / out

    return call


def videos(folder: Path) -> dict[str, str]:
    """Fingerprint of the pixels of every file; each file has its line in metadata.jsonl and the other way round."""
    known = {record["file"]: record["fingerprint"] for record in metadata(folder)}
    assert sorted(known) == sorted(path.name for path in folder.glob("*.mp4"))
    return dict(sorted(known.items()))


def metadata(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red puppet waves\na blue puppet jumps\n日本語の人形\na red puppet waves\n", encoding="utf-8")
    return path


def test_a_prompt_file_becomes_videos_and_their_records(run, prompts, capsys):
    folder = run("--data_path", str(prompts))
    assert len(videos(folder)) == 3  # the line that stands twice is made once
    for path in folder.glob("*.mp4"):
        frames, fps = read_video(path)
        assert frames.shape == (FRAMES, 3, 32, 32) and fps == 16
    records = metadata(folder)
    assert [record["prompt"] for record in records] == ["a red puppet waves", "a blue puppet jumps", "日本語の人形"]
    assert {record["file"] for record in records} == set(videos(folder))
    saved = list(folder.glob("config-*.yaml"))
    assert len(saved) == 1 and records[0]["config_hash"] in saved[0].name
    assert config_hash(load_config(saved[0])) == records[0]["config_hash"]
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert sheet.height > 3 * 128
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert "3 videos made, 0 kept" in capsys.readouterr().out


def test_a_second_run_keeps_and_overwrite_repeats_every_pixel(run, prompts, capsys):
    folder = run("--data_path", str(prompts))
    before, times = videos(folder), [path.stat().st_mtime_ns for path in sorted(folder.glob("*.mp4"))]
    run("--data_path", str(prompts))
    assert [path.stat().st_mtime_ns for path in sorted(folder.glob("*.mp4"))] == times
    assert "0 videos made, 3 kept" in capsys.readouterr().out
    run("--data_path", str(prompts), "--overwrite")
    assert videos(folder) == before
    assert [path.stat().st_mtime_ns for path in sorted(folder.glob("*.mp4"))] != times


def test_kept_videos_of_other_settings_are_pointed_out(run, caplog):
    run("--prompt", "words", "--save_with_index")
    run("--prompt", "words", "--save_with_index", "--seed", "5")
    assert "1 of 1 videos that exist already were made with other settings" in caplog.text


def test_a_video_depends_on_neither_order_nor_number_of_processes(run, prompts, tmp_path, monkeypatch):
    alone = videos(run("--data_path", str(prompts)))
    lines = prompts.read_text(encoding="utf-8").splitlines()
    (tmp_path / "reversed.txt").write_text("\n".join(lines[::-1]), encoding="utf-8")
    assert videos(run("--data_path", "reversed.txt", out="reversed")) == alone
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        folder = run("--data_path", str(prompts), out="shared")
    assert videos(folder) == alone
    assert len(metadata(folder)) == 3


def test_samples_and_seeds_differ(run):
    folder = run("--prompt", "words", "--num_samples", "2")
    run("--prompt", "words", "--seed", "1")
    made = videos(folder)
    assert len(made) == len(set(made.values())) == 3
    assert {record["sample"] for record in metadata(folder)} == {0, 1}


def test_names_by_index_and_extended_prompts(run, tmp_path):
    (tmp_path / "short.txt").write_text("a cat\na dog\n")
    (tmp_path / "long.txt").write_text("a red puppet waves\na blue puppet waves\n")
    folder = run("--data_path", "short.txt", "--extended_prompt_path", "long.txt", "--save_with_index")
    assert list(videos(folder)) == ["0-0_regular.mp4", "1-0_regular.mp4"]
    assert [(record["prompt"], record["extended_prompt"]) for record in metadata(folder)] == [
        ("a cat", "a red puppet waves"),
        ("a dog", "a blue puppet waves"),
    ]


def test_first_takes_the_head_of_the_list(run, prompts):
    assert len(videos(run("--data_path", str(prompts), "--first", "1"))) == 1


def test_dry_run_prints_settings_and_makes_nothing(run, prompts, tmp_path, capsys):
    assert not run("--data_path", str(prompts), "--dry_run").exists()
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_config(tmp_path / "printed.yaml").num_output_frames == 3


def test_ema_weights_of_a_checkpoint(run, tiny_model_folder, tmp_path):
    from safetensors.torch import load_file

    weights = load_file(tiny_model_folder / "diffusion_pytorch_model.safetensors")
    doubled = {f"model._fsdp_wrapped_module.{name}": tensor * 2 for name, tensor in weights.items()}
    torch.save(
        {"generator": {f"model.{k}": v for k, v in weights.items()}, "generator_ema": doubled}, tmp_path / "c.pt"
    )
    plain = videos(run("--prompt", "words", out="plain"))
    regular = videos(run("--prompt", "words", "--checkpoint_path", "c.pt", out="regular"))
    ema = videos(run("--prompt", "words", "--checkpoint_path", "c.pt", "--use_ema", out="ema"))
    assert list(plain.values()) == list(regular.values()) != list(ema.values())


def test_few_step_models_run_through_the_same_door(run):
    folder = run("--prompt", "words", "denoising_step_list=[1000,500]")
    assert len(videos(folder)) == 1


def test_an_image_is_the_first_frame(run, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "images" / "red.png")
    (tmp_path / "images" / "red.txt").write_text("a red puppet waves")
    folder = run("--i2v", "--data_path", "images", "--num_samples", "2")
    one, two = (read_video(path)[0] for path in sorted(folder.glob("*.mp4")))
    assert one.shape[0] == 1 + 12  # the image, then the block asked for
    assert (one[0] - two[0]).abs().mean() < 0.02 < (one[6:] - two[6:]).abs().mean()
    assert metadata(folder)[0]["image"].endswith("red.png")


def test_a_video_goes_on(run, tmp_path):
    write_video(tmp_path / "start.mp4", torch.rand(11, 3, 40, 40))
    folder = run("--extend", "start.mp4", "--prompt", "words")
    frames, _ = read_video(next(folder.glob("*.mp4")))
    assert len(frames) == 9 + 12  # the last 1 + 4 n frames that were given, and one block


def test_one_image_for_every_prompt(run, prompts, tmp_path):
    Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "red.png")
    folder = run("--data_path", str(prompts), "--first", "2", "--input_image", "red.png")
    assert [read_video(path)[0].shape[0] for path in folder.glob("*.mp4")] == [13, 13]
    windowed = ["model_kwargs.local_attn_size=6", "model_kwargs.sink_size=1"]
    folder = run("--prompt", "words", "--input_image", "red.png", "--image_mode", "ref_sink", *windowed, out="sink")
    assert [len(read_video(path)[0]) for path in folder.glob("*.mp4")] == [FRAMES]


def test_an_i2v_model_reads_an_image(tiny_i2v_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "red.png")
    settings = [f"model_name={tiny_i2v_folder}", "height=32", "width=32", *MANY_STEPS, "num_output_frames=3"]
    for causal in ("true", "false"):
        arguments = ["--prompt", "words", "--input_image", "red.png", f"causal={causal}", *settings]
        assert inference.main(["--output_folder", causal, *arguments]) == 0
        assert len(read_video(next((tmp_path / causal).glob("*.mp4")))[0]) == FRAMES
    assert inference.main(["--prompt", "words", *settings]) == 1
    assert "an i2v model makes a video of an image; give input_image" in capsys.readouterr().err


def test_a_video_is_made_after_another(run, tiny_model_folder, tmp_path):
    write_video(tmp_path / "drive.mp4", torch.rand(30, 3, 40, 50), fps=16)
    folder = run("--prompt", "words", "--video", "drive.mp4", "--strength", "0.5")
    assert [len(read_video(path)[0]) for path in folder.glob("*.mp4")] == [FRAMES]  # as many as were asked for
    assert metadata(folder)[0]["video"] == "drive.mp4" and metadata(folder)[0]["strength"] == 0.5
    settings = [f"model_name={tiny_model_folder}", "height=32", "width=32", *MANY_STEPS]
    assert inference.main(["--prompt", "words", "--video", "drive.mp4", *settings]) == 0
    assert [len(read_video(path)[0]) for path in (tmp_path / "videos").glob("*.mp4")] == [30]  # as many as it has


def test_every_line_of_a_list_brings_its_own(run, tmp_path):
    Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "red.png")
    write_video(tmp_path / "drive.mp4", torch.rand(7, 3, 40, 50), fps=16)
    lines = [
        {"prompt": "plain", "seed": 3},
        {"prompt": "image", "image": "red.png"},
        {"prompt": "video", "video": "drive.mp4"},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    folder = run("--data_path", "list.jsonl")
    frames = {record["prompt"]: record["num_frames"] for record in metadata(folder)}
    assert frames == {"plain": FRAMES, "image": FRAMES + 4, "video": 7}
    assert metadata(folder)[0]["seed"] == 3 and any("plain" in name and "seed3" in name for name in videos(folder))
    plain = next(path for path in folder.glob("plain*.mp4"))
    alone = run("--prompt", "plain", "--seed", "3", out="alone") / plain.name
    assert videos(folder)[plain.name] == videos(alone.parent)[plain.name]


def test_a_video_follows_a_pose(run, tiny_model_folder, tmp_path, capsys):
    torch.save(synthetic_checkpoint(), tmp_path / "unianimate.ckpt")
    (tmp_path / "dance").mkdir()
    for index in range(10):
        Image.new("RGB", (40, 30), (20 * index, 0, 200)).save(tmp_path / "dance" / f"{index:04d}.png")
    arguments = ["--prompt", "words", "--pose", "dance", "--pose_ckpt", "unianimate.ckpt", "--pose_strength", "0.5"]
    arguments += ["--pose_guidance_scale", "2"]
    folder = run(*arguments)
    assert metadata(folder)[0]["pose"] == "dance" and metadata(folder)[0]["pose_strength"] == 0.5
    assert metadata(folder)[0]["pose_guidance_scale"] == 2
    settings = [f"model_name={tiny_model_folder}", "height=32", "width=32", *MANY_STEPS]
    assert inference.main([*arguments, *settings]) == 0
    assert [len(read_video(path)[0]) for path in (tmp_path / "videos").glob("*.mp4")] == [21]  # whole blocks above 10
    run(*arguments[:4], out="without", code=1)
    assert "no pose weights are loaded" in capsys.readouterr().err
    save_keypoints(tmp_path / "dance.npz", torch.rand(5, 18, 3) * 30 + 1, 32, 32, 16)
    Image.new("RGB", (32, 32)).save(tmp_path / "man.png")
    reference = ["--ref_pose", "dance.npz"]
    for index, image in enumerate(([], ["--input_image", "man.png"])):  # without an image it only lends its proportions
        folder = run(
            "--prompt", "words", "--pose", "dance.npz", *arguments[4:6], *reference, *image, out=f"keys{index}"
        )
        assert metadata(folder)[0]["ref_pose"] == "dance.npz" and len(list(folder.glob("*.mp4"))) == 1
    (tmp_path / "list.csv").write_text("prompt,pose,seed\nwords,dance,4\nother,,\n")
    assert [record.get("pose") for record in metadata(run("--data_path", "list.csv", *arguments[4:], out="list"))] == [
        "dance",
        None,
    ]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--prompt", "a", "--pose", "absent"], "no file at absent, which --pose names"),
        (["--prompt", "a", "--pose_strength", "3"], "pose_strength is 3.0; it lies in [0, 2]"),
        (["--prompt", "a", "--pose_guidance_scale", "-1"], "pose_guidance_scale is -1.0; 0 ignores the pose"),
        (["--prompt", "a", "--input_image", "absent.png"], "no file at absent.png, which --input_image names"),
        (["--prompt", "a", "--video", "absent.mp4"], "no file at absent.mp4, which --video names"),
        (["--prompt", "a", "--strength", "0"], "strength is 0.0; it lies in (0, 1]"),
        (
            ["--prompt", "a", "--video", "drive.mp4", "causal=false"],
            "a bidirectional model follows no driving video and no pose",
        ),
    ],
)
def test_mistakes_in_control_are_sentences(run, tmp_path, capsys, argv, message):
    (tmp_path / "drive.mp4").write_bytes(b"x")
    run(*argv, code=1)
    assert message in capsys.readouterr().err


def test_a_damaged_image_does_not_lose_the_others(run, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for name in ("a", "b", "c"):
        Image.new("RGB", (32, 32)).save(tmp_path / "images" / f"{name}.png")
        (tmp_path / "images" / f"{name}.txt").write_text(f"picture {name}")
    (tmp_path / "images" / "b.png").write_bytes(b"not a png")
    folder = run("--i2v", "--data_path", "images", code=1)
    assert [record["prompt"] for record in metadata(folder)] == ["picture a", "picture c"]
    assert "no video of 'picture b'" in capsys.readouterr().err


def test_ctrl_c_keeps_what_is_finished(run, prompts, monkeypatch):
    whole = inference.make_video

    def interrupted(pipeline, request, *rest):
        if request.prompt.text == "a blue puppet jumps":
            yield torch.rand(4, 3, 32, 32)
            raise KeyboardInterrupt
        yield from whole(pipeline, request, *rest)

    monkeypatch.setattr(inference, "make_video", interrupted)
    folder = run("--data_path", str(prompts), code=130)
    assert len(list(folder.iterdir())) == 3  # one video, its line of metadata, the settings
    assert [record["prompt"] for record in metadata(folder)] == ["a red puppet waves"]


def test_the_embedded_model_is_the_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert inference.main(["--first", "1", "--num_output_frames", "3"]) == 0
    frames, _ = read_video(next((tmp_path / "videos").glob("*.mp4")))
    assert frames.shape == (FRAMES, 3, 128, 128)
    assert frames.std() > 0.05  # a picture, not a flat field
