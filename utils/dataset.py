"""What a trainer asks of its data: samples that are a function of (seed, step, sample) and of nothing else."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.distributed import SampleRngs, mix_seed
from world.hashing import hash_tensor


@dataclass(frozen=True)
class Controls:
    """What steers some of B samples beside their words. Places in the batch are int64, on the device.

    drawings: uint8 [P, F_px, 3, H, W], the moving skeletons of the samples at the places `posed` [P]. plain, imaged:
    the places without and with an image, together all. references [R, 1, C, h, w]: the image of those at `imaged` [R],
    reference_drawings uint8 [R, 1, 3, H, W] its skeleton, which is told where reference_posed [R]. first_frame [R]: the
    clip's own first frame is the image instead.
    """

    drawings: Tensor
    posed: Tensor
    plain: Tensor
    imaged: Tensor
    references: Tensor
    reference_drawings: Tensor
    reference_posed: Tensor
    first_frame: Tensor


@dataclass(frozen=True)
class Samples:
    """B samples on the device. Words are tokens where a text encoder waits for them, embeddings where a cache has them.

    ids, mask: int64 [B, T]; prompt_embeds: [B, T, text_dim], zero beyond each text's length; one of the two is there.
    latents: [B, F, C, H, W]; an ODE trajectory has its states in front, [B, states, F, C, H, W]; None for words alone.
    """

    ids: Tensor | None = None
    mask: Tensor | None = None
    prompt_embeds: Tensor | None = None
    latents: Tensor | None = None
    controls: Controls | None = None


# Prompts to the words of Samples: a tokenizer on the device, or a cache of embeddings.
Words = Callable[[list[str]], Samples]


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device, without waiting for what the device is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def upload_stacked(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Equal CPU tensors as one on the device: copied once, into pinned memory that torch keeps for the next batch."""
    batch = torch.empty(len(tensors), *tensors[0].shape, dtype=tensors[0].dtype, pin_memory=device.type == "cuda")
    return torch.stack(list(tensors), out=batch).to(device, non_blocking=True)


class TrainingData(ABC):
    """Where samples come from.

    `draw` must not remember: a resumed run, or one whose batch is split over other ranks and passes, sees the same
    samples. What has to be made beforehand is made in `fill` and `advance`.
    """

    def fill(self, step: int, *, whole: bool = True) -> None:  # noqa: B027 (optional)
        """Called once before the first step of a process, which is `step`. whole=False: as little as will do."""

    def advance(self, step: int) -> None:  # noqa: B027 (optional)
        """Called after every step, with the number of the next."""

    @abstractmethod
    def draw(self, rngs: SampleRngs) -> Samples:
        """Samples rngs.samples of step rngs.step, for the player rngs.stream."""


class ShuffledEpochs:
    """An endless stream over `size` items: each epoch holds every item once, in an order of its own.

    Number n of the stream is a function of (seed, n): item n % size of the order of epoch n // size.
    """

    def __init__(self, size: int, seed: int):
        if size < 1:
            raise ValueError("no items to draw from; give at least one")
        self.size, self.seed = size, seed
        self._orders: dict[int, list[int]] = {}  # of the epochs last asked for: made again whenever they are missing

    def __getitem__(self, n: int) -> int:
        epoch, place = divmod(n, self.size)
        if epoch not in self._orders:
            self._orders = dict(list(self._orders.items())[-1:])  # a batch may hold the end of one epoch and the next
            keys = torch.arange(self.size) + mix_seed(self.seed, epoch)
            self._orders[epoch] = hash_tensor(keys).argsort(stable=True).tolist()
        return self._orders[epoch][place]


class EpochSampler:
    """Which items a batch holds: every player walks epochs of its own, samples_per_step items in each of its steps."""

    def __init__(self, size: int, seed: int, samples_per_step: int):
        """samples_per_step: over all ranks and passes, the run's total batch."""
        self.size, self.seed, self.samples_per_step = size, seed, samples_per_step
        self._streams: dict[int, ShuffledEpochs] = {}

    def __call__(self, rngs: SampleRngs) -> list[int]:
        """Item of each of rngs.samples."""
        if rngs.stream not in self._streams:
            self._streams[rngs.stream] = ShuffledEpochs(self.size, mix_seed(self.seed, rngs.stream))
        epochs, first = self._streams[rngs.stream], rngs.step * self.samples_per_step
        return [epochs[first + sample] for sample in rngs.samples]
