"""scripts/generate_ode_pairs.py: killed and gone on with = made in one go; students find them or hear why not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pipeline.build import build_pipeline
from tests import ranks
from tests.scripts.loading import load_script
from utils.config import load_config
from utils.dataset import Samples
from utils.distributed import Rngs, SampleRngs
from utils.latent_folder import ODEPairs
from utils.prompts import video_seed
from utils.shards import Shards

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "generate_ode_pairs.py"
PROMPTS = ["a red puppet", "a wall", "a puppet jumps", "a ball", "nothing at all"]
SETTINGS = ["height=32", "width=32", "num_training_frames=3", "denoising_step_list=[1000,500]", "timestep_shift=5"]
SETTINGS += ["device=cpu", "negative_prompt=bad"]


@pytest.fixture
def arguments(tmp_path, tiny_model_folder) -> list[str]:
    (tmp_path / "student.yaml").write_text(f"model_name: {tiny_model_folder}\n")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    config, prompts = str(tmp_path / "student.yaml"), str(tmp_path / "prompts.txt")
    return ["--config_path", config, "--prompts", prompts, "--steps", "4", "--pairs_per_shard", "2", *SETTINGS]


def content(folder: Path) -> list[tuple]:
    shards = Shards(folder, "ode pairs")
    return [(item.row["prompt"], item.row["seed"], shards.read(item, "clip0")) for item in shards.items]


def same(one: Path, other: Path) -> bool:
    pairs = zip(content(one), content(other), strict=True)
    return all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in pairs)


def test_states_are_the_teachers(tmp_path, arguments, tiny_model_folder, capsys):
    options = ["--float32", "--guidance_scale", "2", "--batch_size", "2"]
    assert load_script(SCRIPT).main([*arguments, *options, "--output", str(tmp_path / "pairs")]) == 0
    assert "5 pairs in" in capsys.readouterr().out
    teacher = [f"model_name={tiny_model_folder}", "causal=false", "solver=euler", "sampling_steps=4"]
    pipeline = build_pipeline(load_config(overrides=[*teacher, "guidance_scale=2", "timestep_shift=5"]), "cpu")
    pipeline.negative_prompt = "bad"
    found = content(tmp_path / "pairs")
    assert {prompt for prompt, _, _ in found} == set(PROMPTS)
    for prompt, seed, states in found:
        assert seed == video_seed(0, prompt)
        _, latents = pipeline.inference(
            text_prompts=[prompt], seeds=[seed], num_frames=3, height=32, width=32, return_latents=True
        )
        assert states.shape == (3, 3, 16, 4, 4)
        torch.testing.assert_close(states[-1], latents[0], rtol=1e-3, atol=1e-3)  # two at a time were made


def test_killed_at_any_moment_it_goes_on(tmp_path, arguments):
    command = [sys.executable, str(SCRIPT), *arguments, "--samples_per_prompt", "6", "--output"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    parts = tmp_path / "parts"
    process = subprocess.Popen([*command, str(parts)], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(parts.glob("shard-*.jsonl"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(content(parts))
    assert 6 <= kept < 30
    main = load_script(SCRIPT).main
    for folder in (parts, tmp_path / "whole"):
        assert main([*arguments, "--samples_per_prompt", "6", "--output", str(folder)]) == 0
    assert len(content(parts)) == 30
    assert same(parts, tmp_path / "whole")


def test_two_processes_make_what_one_makes(tmp_path, arguments):
    done = ranks.run(__file__, 2, *arguments, "--output", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert load_script(SCRIPT).main([*arguments, "--output", str(tmp_path / "one")]) == 0
    assert same(tmp_path / "two", tmp_path / "one")


def test_a_causal_teacher_of_puppet_captions_and_a_text_cache(tmp_path, arguments):
    causal = [*arguments[:2], "--puppet_captions", "3", *arguments[4:], "--causal_teacher", "num_frame_per_block=1"]
    main = load_script(SCRIPT).main
    assert main([*causal, "--output", str(tmp_path / "a")]) == 0
    stage = ["data.kind=ode_pairs", f"data.path={tmp_path / 'b'}", f"data.text_cache={tmp_path / 'words'}"]
    assert main([*causal, *stage]) == 0
    assert same(tmp_path / "a", tmp_path / "b")
    about = Shards(tmp_path / "a", "ode pairs").about
    assert about["causal_teacher"] and about["num_frame_per_block"] == 1 and about["timesteps"][0] == 1000


def words(prompts: list[str]) -> Samples:
    return Samples(torch.tensor([[len(prompt)] for prompt in prompts]), torch.ones(len(prompts), 1).long())


def test_as_training_data(tmp_path, arguments):
    assert load_script(SCRIPT).main([*arguments, "--output", str(tmp_path / "pairs")]) == 0
    options = {"seed": 1, "samples_per_step": 5, "device": torch.device("cpu"), "dtype": torch.float32}
    data = ODEPairs(tmp_path / "pairs", words, expected={"shift": 5.0}, num_latent_frames=3, **options)
    drawn = data.draw(SampleRngs(Rngs(0, 0, torch.device("cpu")), range(5)))
    assert drawn.latents.shape == (5, 3, 3, 16, 4, 4)
    assert sorted(drawn.ids[:, 0].tolist()) == sorted(map(len, PROMPTS))
    with pytest.raises(ValueError, match=r"was made with shift 5.0, this run has 8.0"):
        ODEPairs(tmp_path / "pairs", words, expected={"shift": 8.0}, num_latent_frames=3, **options)
    with pytest.raises(ValueError, match="trajectories of 3 latent frames, training asks for 2; set num_training_fra"):
        ODEPairs(tmp_path / "pairs", words, expected={}, num_latent_frames=2, **options)


def test_mistakes_are_one_sentence(tmp_path, arguments, capsys):
    main, output = load_script(SCRIPT).main, ["--output", str(tmp_path / "pairs")]
    assert main([*arguments, *output]) == 0
    for change, said in [
        ([*arguments, *output, "seed=1"], "was made with seed 0, this run has 1; give another folder"),
        ([*arguments, *output, "--steps", "5"], "5 solver steps at shift 5.0 do not pass through t = 833.3"),
        ([*arguments, *output, "denoising_step_list=null"], "denoising_step_list is not set"),
        (arguments, "where to? give --output"),
        ([*arguments[:3], str(tmp_path / "none.txt"), *arguments[4:], *output], "no such file with one prompt per"),
    ]:
        capsys.readouterr()
        assert main(change) == 1
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


if __name__ == "__main__":  # what the two-rank test forks

    def work(arguments: list[str]) -> None:
        sys.exit(load_script(SCRIPT).main(arguments))

    ranks.main(work, [ranks.TEXT_ENCODER])


def test_a_batch_lies_in_one_shard(arguments, capsys):
    module = load_script(SCRIPT)
    with pytest.raises(SystemExit):
        module.main([*arguments, "--batch_size", "3"])
    assert "--batch_size 3 is more than --pairs_per_shard 2" in capsys.readouterr().err
    without = [word for word in arguments if word not in ("--pairs_per_shard", "2")]
    sizes = (("8", 16), ("256", 256))
    assert all(module.parse_args([*without, "--batch_size", n]).pairs_per_shard == shard for n, shard in sizes)
