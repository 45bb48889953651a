"""trainer/streams.py: rollouts go on where they stopped, in the words they began with, over restarts and any batch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.base import Batch
from tests.trainer.test_distillation import distil
from tests.trainer.toy import state
from trainer.streams import Streams
from utils.conditioning import Conditioning
from utils.config import ConfigError
from utils.distributed import Rngs, SampleRngs

pytestmark = pytest.mark.usefixtures("toy_sizes")

STREAMS = [
    "distillation.num_streams=2", "num_training_frames=60", "distillation.num_grad_frames=6",
    "distillation.last_step_only=true", "seed=4",
]  # fmt: skip


def walks_of(trainer) -> list[tuple[Tensor | None, Tensor, Tensor]]:
    """(what a rollout went on from, its words, all it knows in the end), as they come."""
    pipeline, walks = trainer.objective.generate.pipeline, []
    rollout = pipeline.rollout

    def told(noise: Tensor, conditioning: Conditioning, **options):
        made = rollout(noise, conditioning, **options)
        walks.append((options["initial_latent"], conditioning.prompt_embeds, made.latents.detach()))
        return made

    pipeline.rollout = told
    return walks


def test_a_rollout_goes_on_where_the_last_one_stopped(tmp_path: Path, folders):
    """The critic's does, the student's of the same step from the same place; two streams take turns."""
    trainer = distil(tmp_path, folders, *STREAMS, "distillation.dfake_gen_update_ratio=1", "max_steps=6")
    walks = walks_of(trainer)
    trainer.train(save=False, visualize=False)
    student, critic = walks[0::2], walks[1::2]
    assert [past is None for past, _, _ in critic] == [True, True, False, False, False, False]
    for step in range(2, 6):
        _, words, before = critic[step - 2]
        for past, same_words, made in (critic[step], student[step]):
            assert torch.equal(past, before[:, -6:]) and torch.equal(words, same_words)
            assert made.shape[1] == 12 and torch.equal(made[:, :6], past)
    assert not torch.equal(critic[0][1], critic[1][1])


def test_a_window_begins_with_the_sink(tmp_path: Path, folders):
    settings = ["model_kwargs.local_attn_size=6", "model_kwargs.sink_size=3", "max_steps=5"]
    trainer = distil(tmp_path, folders, *STREAMS, *settings)
    walks = walks_of(trainer)
    trainer.train(save=False, visualize=False)
    (_, _, first), (_, _, second), (given, _, _) = walks[1], walks[4], walks[-1]  # the critic's, steps 0, 2 and 4
    assert torch.equal(given, torch.cat([first[:, :3], second[:, -3:]], dim=1))


def test_resumed_is_uninterrupted(tmp_path: Path, folders):
    settings = [*STREAMS, "distillation.last_step_only=false"]
    distil(tmp_path / "whole", folders, *settings, "max_steps=7").train(visualize=False)
    distil(tmp_path / "parts", folders, *settings, "max_steps=4").train(visualize=False)
    distil(tmp_path / "parts", folders, *settings, "max_steps=7").train(visualize=False)
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert whole.keys() == parts.keys() and any("streams" in name for name in whole)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_streams_belong_to_samples_however_the_batch_is_cut(tmp_path: Path, folders):
    """Four samples at once; or two and two, and after a restart all at once."""
    small, large = "total_batch_size=4", "batch_size=4"
    for folder, stages in (("one", [(large, 4)]), ("two", [(small, 3), (large, 4)])):
        for cut, steps in stages:
            trainer = distil(tmp_path / folder, folders, *STREAMS, cut, f"max_steps={steps}", "optimizer.lr=0")
            trainer.train(visualize=False)
    one = {name: tensor for name, tensor in state(tmp_path / "one").items() if "streams" in name}
    two = state(tmp_path / "two")
    assert len(one) == 2 * (1 + 2 * 4)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_of_another_batch_size_streams_begin_anew(tmp_path: Path, folders):
    distil(tmp_path, folders, *STREAMS, "max_steps=3").train(visualize=False)
    trainer = distil(tmp_path, folders, *STREAMS, "batch_size=4", "max_steps=4")
    walks = walks_of(trainer)
    trainer.train(visualize=False)
    assert walks[-1][0] is None


def test_lengths_are_spread_evenly_and_all_sets_take_their_turn():
    rngs = [SampleRngs(Rngs(0, step, torch.device("cpu")), range(1)) for step in range(4000)]
    streams = Streams(4, 5, [range(1)], 1, seed=0)
    batch = Batch(None, Conditioning(torch.zeros(1, 1, 1)))
    lengths: list[int] = []
    for step in range(4000):
        given = streams.go_on(batch, rngs[step])
        made = 1 if given.past is None else 1 + int(given.past)
        if step % 3:  # the others left early
            streams.keep(given, torch.full((1, 1), made), rngs[step])
        before = streams.due(step)
        streams.advance(step)
        if streams.due(step) is not before:
            lengths.append(made)
    shares = torch.bincount(torch.tensor(lengths), minlength=6).float() / len(lengths)
    assert shares[0] == 0 and (shares[1:] - 0.2).abs().max() < 0.05


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (["distribution_loss=causvid"], "rollouts of the distribution_loss causvid do not go on"),
        (["num_training_frames=6"], "end with their first clip of 6"),
        (["distillation.num_input_frames=3", "num_training_frames=63"], "begin from words alone"),
        (["distillation.same_step_across_blocks=false", "distillation.last_step_only=false"], "left at the last step"),
        (["distillation.num_streams=-1"], "it is 0"),
    ],
)
def test_settings_that_cannot_work(settings: list[str], error: str, tmp_path: Path, folders):
    with pytest.raises(ConfigError, match=error):
        distil(tmp_path, folders, *STREAMS, *settings)
