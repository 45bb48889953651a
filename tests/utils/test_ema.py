"""utils/ema.py: the average follows its formula, starts as a copy, and steps aside again."""

import torch
from torch import nn

from utils.ema import EMA


def test_the_average_follows_its_formula():
    net = nn.Linear(1, 1, bias=False)
    ema = EMA(dict(net.named_parameters()), weight=0.5, start_step=2)
    expected = None
    for step, value in enumerate([1.0, 2.0, 3.0, 4.0, 5.0]):
        nn.init.constant_(net.weight, value)
        ema.update(step)
        if step < 2:
            expected = value
        else:
            weight = min(0.5, (1 + step - 2) / (10 + step - 2))
            expected = weight * expected + (1 - weight) * value
        torch.testing.assert_close(ema.state_dict()["weight"].item(), expected)


def test_swapped_in_and_out():
    net = nn.Linear(2, 2).bfloat16()
    ema = EMA({"weight": net.weight}, weight=0.9)
    assert ema.state_dict()["weight"].dtype == torch.float32
    old = net.weight.detach().clone()
    nn.init.zeros_(net.weight)
    with ema.swapped_in():
        assert torch.equal(net.weight, old)
    assert not net.weight.any()


def test_it_comes_back():
    first, second = (EMA(dict(nn.Linear(2, 2).named_parameters()), 0.9) for _ in range(2))
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(second.average[name], first.average[name]) for name in first.average)
