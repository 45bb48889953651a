"""Does a run survive kill -9? A toy run is killed at random moments, also while it saves, and resumed each time.

python benchmarks/kill_resume.py --kills 50

One process trains a small causal transformer by flow matching (CPU), saving in the background every few steps. After
every kill the newest state must be there, whole, no older than what was there before, and equal to the bit to the
state of that step in a run that was never touched; so must be the state at the end.
"""

import argparse
import contextlib
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.base import Batch, Player  # noqa: E402 (run as a script, the repository is not on the path yet)
from model.diffusion import CausalDiffusion  # noqa: E402
from trainer.base import Trainer  # noqa: E402
from utils.conditioning import Conditioning  # noqa: E402
from utils.config import load_config  # noqa: E402
from utils.distributed import Ranks, SampleRngs  # noqa: E402
from utils.errors import plain_errors  # noqa: E402
from utils.training_state import load_training_state, state_folders  # noqa: E402
from utils.wan_wrapper import WanDiffusionWrapper  # noqa: E402
from wan.configs import WanConfig  # noqa: E402

SIZES = WanConfig(
    dim=64, ffn_dim=128, num_heads=2, num_layers=4, in_dim=4, out_dim=4, freq_dim=32, text_dim=32, text_len=16
)
SAVE_EVERY = 4  # steps


class ToyRun(Trainer):
    """Flow matching on latents that are drawn, like all randomness, from (seed, step, sample)."""

    name = "toy"
    steps: Synchronized | None = None  # where a watching process reads how far the run is

    def build(self) -> list[Player]:
        self.generator = WanDiffusionWrapper("toy", True, from_scratch=True, model_config=SIZES, num_frame_per_block=2)
        objective = CausalDiffusion(self.generator, self.generator.scheduler, num_frame_per_block=2)
        return [Player("student", nn.ModuleDict({"generator": self.generator}), objective.loss)]

    def prepare(self, rngs: SampleRngs) -> Batch:
        return Batch(rngs.randn(4, 4, 4, 4), Conditioning(rngs.randn(6, SIZES.text_dim)))

    def after_step(self) -> None:
        if self.steps is not None:
            self.steps.value = self.step

    def export(self, folder: Path) -> None:
        self.generator.model.save_pretrained(folder)


def train(folder: Path, num_steps: int, keep_last: int, steps: Synchronized | None) -> None:
    """The run, from where its folder stands to its end."""
    torch.set_num_threads(1)
    settings = [f"max_steps={num_steps}", f"checkpoint.every_steps={SAVE_EVERY}", f"checkpoint.keep_last={keep_last}"]
    settings += ["optimizer.schedule=constant", "batch_size=2", "ema.weight=0.9"]
    trainer = ToyRun(load_config(overrides=settings), Ranks(torch.device("cpu")), folder)
    trainer.steps = steps
    trainer.train()


def kill_at_random(folder: Path, num_steps: int, chance: random.Random, wait_for_save: bool) -> tuple[int, bool]:
    """Start or resume the run in a process of its own and kill it. Returns steps done, and whether it was saving.

    wait_for_save: kill at a random moment of the next save instead of a random moment at all.
    """
    fork = multiprocessing.get_context("fork")
    steps = fork.Value("i", 0)
    process = fork.Process(target=train, args=(folder, num_steps, 2, steps))
    started = time.time()
    process.start()
    if wait_for_save:
        while process.is_alive() and not is_saving(folder, started):
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.02))
    else:
        process.join(chance.uniform(0, 1.2))
    saving = is_saving(folder, started)
    if process.is_alive():
        process.kill()  # SIGKILL
    process.join()
    return steps.value, saving


def is_saving(folder: Path, since: float) -> bool:
    """Whether a state is half written, by the process that started at `since`; older leftovers do not count."""
    halves = []
    for path in (folder / "training_state").glob("*.partial"):
        with contextlib.suppress(FileNotFoundError):  # it has just been finished
            halves.append(path.stat().st_mtime)
    return max(halves, default=0) > since


def newest_step(folder: Path) -> int:
    """Of the states that have their final name; 0 before the first."""
    folders = state_folders(folder)
    return int(folders[-1].name[5:]) if folders else 0


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def measure(kills: int, num_steps: int, seed: int, home: Path) -> dict[str, float]:
    chance = random.Random(seed)
    reference = home / "reference"
    train(reference, num_steps, num_steps, None)
    states = {path.name: path for path in state_folders(reference)}
    result = {"kills": 0, "kills_while_saving": 0, "lost": 0, "runs_finished": 0, "most_steps_redone": 0}
    run, folder = 0, home / "run_0"
    while result["kills"] < kills:
        before = newest_step(folder)
        steps, saving = kill_at_random(folder, num_steps, chance, wait_for_save=result["kills"] % 2 == 1)
        after = newest_step(folder)
        if after < num_steps:
            result["kills"] += 1
            result["kills_while_saving"] += saving
            result["most_steps_redone"] = max(result["most_steps_redone"], steps - after)
        if after < before or (after and not is_state(folder, states[f"step_{after:08d}"])):
            result["lost"] += 1
        if after == num_steps:
            result["runs_finished"] += 1
            run += 1
            folder = home / f"run_{run}"
    train(folder, num_steps, 2, None)  # the last one may finish
    result["lost"] += not is_state(folder, states[f"step_{num_steps:08d}"])
    return {**result, "runs_finished": result["runs_finished"] + 1, "save_every_steps": SAVE_EVERY}


def is_state(folder: Path, reference: Path) -> bool:
    """Whether the newest state of a run loads and is a state of the untouched run, to the bit."""
    expected = load_training_state(reference.parent.parent, reference.name)
    try:
        found = load_training_state(folder)
    except ValueError as error:
        print(error, file=sys.stderr)
        return False
    return found.facts["step"] == expected.facts["step"] and same(found.tensors, expected.tensors)


@plain_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=60, help="of a run that nobody kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "kill_resume.json")
    args = parser.parse_args(argv)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as home:
        result = measure(args.kills, args.steps, args.seed, Path(home))
    result["seconds"] = round(time.monotonic() - started, 1)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0 if result["lost"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
