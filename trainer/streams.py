"""Streams that training goes on with: rollouts begin where earlier ones stopped, so the student learns in late states.

A judge of 21 latents sees no drift that takes a hundred: every one of its clips is a little off its beginning, and that
is all. Rollouts as long as a stream would show it, at the price of making them from the start in every step. Here each
step makes one judged clip more of a stream that waits (streaming long tuning, LongLive, arXiv 2509.22622):

    step        0     1     2     3     4     5          two streams that take turns, to 1 to 3 clips
    stream 0    0-20        21-41       42-62            then a new one
    stream 1          0-20        21-41       0-20

Streams go on from latents, as many as a block can see, and not from the keys and values that LongLive carries along:
these would be of weights that are gone, and of the 1.3B model a hundred times as large. What lies before the window is
lost with that; in a stream, keys and values in the window still know of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from model.base import Batch
from utils.distributed import SampleRngs, mix_seed
from utils.training_state import StoredState


@dataclass
class Stream:
    """One stream per sample of a step's batch. ends: by a pass's first sample, [B, window, C, H, W]; words likewise."""

    num_clips: int = 0  # made so far
    length: int = 0  # clips it will have
    has_grown: bool = False  # in this step
    ends: dict[int, Tensor] = field(default_factory=dict)
    words: dict[int, Tensor] = field(default_factory=dict)


class Streams:
    """num_streams sets of streams in turn, one per step.

    max_clips: a set ends after a number of clips drawn evenly from 1 .. max_clips, and another begins. passes: this
    rank's samples of a step, pass by pass. Which set is due, and how long it gets, is a function of the step: all ranks
    agree. What they hold belongs to samples, so it may be cut over ranks and passes in another way after a restart.
    """

    def __init__(self, num_streams: int, max_clips: int, passes: list[range], batch_size: int, seed: int):
        """batch_size: samples of a step, on all ranks."""
        self.max_clips, self.passes, self.batch_size, self.seed = max_clips, passes, batch_size, seed
        self.streams = [Stream() for _ in range(num_streams)]

    def due(self, step: int) -> Stream:
        return self.streams[step % len(self.streams)]

    def go_on(self, batch: Batch, rngs: SampleRngs) -> Batch:
        """The batch of a pass; where a stream waits, its words and its end instead of what was drawn."""
        stream, first = self.due(rngs.step), rngs.samples.start
        if not stream.num_clips:
            return batch
        conditioning = replace(batch.conditioning, prompt_embeds=stream.words[first])
        return replace(batch, conditioning=conditioning, past=stream.ends[first])

    def keep(self, batch: Batch, end: Tensor, rngs: SampleRngs) -> None:
        """Of a pass whose clip belongs to the stream: the words it was made of, and its end."""
        stream, first = self.due(rngs.step), rngs.samples.start
        stream.words[first], stream.ends[first] = batch.conditioning.prompt_embeds, end.clone()
        stream.has_grown = True

    def advance(self, step: int) -> None:
        """After a step: a clip was kept of all passes, or of none."""
        stream = self.due(step)
        if not stream.has_grown:
            return
        if not stream.num_clips:
            stream.length = 1 + mix_seed(self.seed, step, 2) % self.max_clips
        stream.num_clips, stream.has_grown = stream.num_clips + 1, False
        if stream.num_clips >= stream.length:
            self.streams[step % len(self.streams)] = Stream()

    # --- over a restart ---

    def state(self, is_main: bool) -> dict[str, Tensor]:
        """By name, sample by sample; numbers that all ranks know are rank 0's to save."""
        state: dict[str, Tensor] = {}
        for index, stream in self._under_way():
            if is_main:
                state[f"streams/{index}/clips"] = torch.tensor([stream.num_clips, stream.length])
            for first, kind, sample, place in self._places():
                state[f"streams/{index}/{kind}/{sample}"] = getattr(stream, kind)[first][place]
        return state

    def restore(self, stored: StoredState, prefix: str, device: torch.device) -> None:
        """Streams of a saved state; those that it does not hold for every sample of today's batch begin anew."""
        for index in range(len(self.streams)):
            name = f"{prefix}streams/{index}/"
            every = {f"{name}{kind}/{sample}" for kind in ("ends", "words") for sample in range(self.batch_size)}
            if {f"{name}clips", *every} <= stored.shapes.keys():
                self.streams[index] = self._read(stored, name, device)

    def _read(self, stored: StoredState, name: str, device: torch.device) -> Stream:
        clips = torch.zeros(2, dtype=torch.long)
        parts = {
            f"{name}{kind}/{sample}": torch.empty_like(stored.shapes[f"{name}{kind}/{sample}"], device="cpu")
            for _, kind, sample, _ in self._places()
        }
        stored.read({f"{name}clips": clips, **parts})
        stream = Stream(*clips.tolist())
        for samples in self.passes:
            for kind in ("ends", "words"):
                rows = torch.stack([parts[f"{name}{kind}/{sample}"] for sample in samples])
                getattr(stream, kind)[samples.start] = rows.to(device)
        return stream

    def _under_way(self) -> Iterator[tuple[int, Stream]]:
        return ((index, stream) for index, stream in enumerate(self.streams) if stream.num_clips)

    def _places(self) -> Iterator[tuple[int, str, int, int]]:
        """(first sample of the pass, kind, sample, its place in the pass) of all that this rank holds."""
        for samples in self.passes:
            for place, sample in enumerate(samples):
                for kind in ("ends", "words"):
                    yield samples.start, kind, sample, place
