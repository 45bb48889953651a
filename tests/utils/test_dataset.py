"""utils/dataset.py: who computes a sample, when, and beside whom, does not change it."""

import pytest
import torch

from utils.dataset import EpochSampler, ShuffledEpochs
from utils.distributed import Rngs, SampleRngs


def draws(step: int, samples: range, stream: int = 0) -> SampleRngs:
    return SampleRngs(Rngs(3, step, torch.device("cpu"), stream), samples)


def test_each_epoch_holds_every_item_once_in_its_own_order():
    stream = ShuffledEpochs(7, seed=1)
    epochs = [tuple(stream[n] for n in range(7 * e, 7 * e + 7)) for e in range(20)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) == 20
    assert epochs[0] != tuple(ShuffledEpochs(7, seed=2)[n] for n in range(7))


def test_a_number_of_the_stream_needs_none_of_those_before_it():
    walked = ShuffledEpochs(5, seed=1)
    expected = [walked[n] for n in range(40)]
    assert [ShuffledEpochs(5, seed=1)[n] for n in range(40)] == expected
    backwards = ShuffledEpochs(5, seed=1)
    assert [backwards[n] for n in reversed(range(40))] == expected[::-1]


def test_orders_are_fair():
    """Every item comes first about equally often."""
    stream = ShuffledEpochs(4, seed=0)
    firsts = torch.bincount(torch.tensor([stream[4 * epoch] for epoch in range(2000)]), minlength=4)
    assert firsts.min() > 420 and firsts.max() < 580  # 500 +- 4 deviations


def test_ranks_passes_and_resumes_share_one_walk():
    sampler = EpochSampler(5, seed=1, samples_per_step=6)
    whole = [item for step in range(5) for item in sampler(draws(step, range(6)))]
    assert sorted(whole) == sorted([*range(5)] * 6)  # six epochs, cut into batches anywhere
    again = EpochSampler(5, seed=1, samples_per_step=6)
    parts = [again(draws(3, range(4, 6))), again(draws(3, range(2))), again(draws(3, range(2, 4)))]
    assert parts[1] + parts[2] + parts[0] == whole[18:24]


def test_players_walk_on_their_own():
    sampler = EpochSampler(50, seed=1, samples_per_step=20)
    generator, critic = (sampler(draws(0, range(20), stream)) for stream in (0, 1))
    assert generator != critic
    assert len(set(generator)) == len(set(critic)) == 20


def test_nothing_to_draw_from():
    with pytest.raises(ValueError, match="at least one"):
        ShuffledEpochs(0, seed=1)
