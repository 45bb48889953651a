"""Exponential moving average of learning parameters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """Float32 average of parameters:  average <- w average + (1 - w) parameter,  w = min(weight, (1 + n) / (10 + n)).

    n counts updates since start_step; the smaller early w forgets the random start (the warm-up of TensorFlow's
    ExponentialMovingAverage, `num_updates`). Before start_step the average is a copy.
    """

    def __init__(self, parameters: Mapping[str, Tensor], weight: float, start_step: int = 0):
        """parameters: by name; of a sharded network this rank's parts, whose average then is cut the same way."""
        self.parameters = parameters
        self.weight = weight
        self.start_step = start_step
        self.average = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters as they are after optimizer step number `step`, counted from 0."""
        averages = list(self.average.values())
        values = [p.detach() for p in self.parameters.values()]
        if step < self.start_step:
            torch._foreach_copy_(averages, values)
            return
        updates = step - self.start_step
        weight = min(self.weight, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(averages, [v.float() for v in values], 1 - weight)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.average)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, average in self.average.items():
            average.copy_(state[name])

    @contextmanager
    @torch.no_grad()
    def swapped_in(self) -> Iterator[None]:
        """The module speaks with the averaged weights inside, with its own again outside."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            p.copy_(self.average[name])
        try:
            yield
        finally:
            for name, p in self.parameters.items():
                p.copy_(kept[name])
