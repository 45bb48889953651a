"""When latents become pictures: the first frame before the rest of its block; beside denoising, on one GPU or two."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

Driver = TypeVar("Driver")


def with_first_frame_alone(walk: Iterator[tuple[Tensor, Driver]]) -> Iterator[tuple[Tensor, Driver]]:
    """The pieces [B, f, ...] of a walk, the first of them in two if it is of more than one frame."""
    for latents, driver in islice(walk, 1):
        yield from ((part, driver) for part in latents.tensor_split((1,), dim=1) if part.shape[1])
    yield from walk


def decoded_meanwhile(
    walk: Iterator[tuple[Tensor, Driver]], decode: Callable[[Tensor, Driver], Tensor], stream: torch.cuda.Stream
) -> Iterator[tuple[Tensor, Tensor]]:
    """Latents and pixels of every block of a walk; when they are handed out, the next block is being denoised.

        stream      | denoise 0 | denoise 1 | denoise 2 |
        caller's                | decode 0  | decode 1  | decode 2 |

    The walk has the stream for itself; pixels are made on the caller's, as without: whoever copies them waits for
    their decoding alone.
    """

    def launch() -> tuple[tuple[Tensor, Driver] | None, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            return next(walk, None), stream.record_event()

    stream.wait_stream(torch.cuda.current_stream(stream.device))  # weights and inputs are there
    following, ready = launch()
    while following is not None:
        latents, driver = following
        caller = torch.cuda.current_stream(stream.device)
        arrived = caller.record_event()  # what the caller made until now, not this block's pictures
        caller.wait_event(ready)
        latents.record_stream(caller)  # its memory serves another block when the caller is done, too
        pixels = decode(latents, driver)
        stream.wait_event(arrived)
        following, ready = launch()
        yield latents, pixels
