"""Which attention kernel a pipeline runs on: measured at warm-up in its own shapes, refused where it is too coarse.

An error is that of the output against exact attention in float32, relative, of normally distributed numbers and of the
model's own queries, keys and values in its first, middle and last layer. Time is that of a late block's self-attention.
"""

import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wan.modules.attention import EXACT, ROUNDINGS, attention, available_backends, check_device
from wan.modules.attention_8bit import MIN_KEYS
from wan.modules.model import WanModel
from wan.modules.rope import rope_frequencies

logger = logging.getLogger(__name__)

QueriesKeysValues = tuple[Tensor, Tensor, Tensor]  # [B, Lq, N, D] and twice [B, Lk, N, D]
NUM_QUERIES = 1024  # that an error is measured on
SECONDS = 0.1  # that a backend's measurement takes at least


class Measured(NamedTuple):
    """What one backend gave here."""

    seconds: float
    errors: dict[str, float]  # of what -> relative error

    @property
    def error(self) -> float:
        return max(self.errors.values())


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of up to NUM_QUERIES of the queries, spread over all of them, in float32."""
    return attention(*(x.float() for x in (spread(q), k, v)), "sdpa")


def spread(x: Tensor) -> Tensor:
    """Up to NUM_QUERIES of the tokens of x [B, L, N, D], evenly."""
    return x[:, :: -(-x.shape[1] // NUM_QUERIES)]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """How far `found` is from `expected`, of that one's length; NaN becomes infinite."""
    error = float((found.float() - expected).norm() / expected.norm())
    return error if error == error else float("inf")


def seconds_of(backend: str, tensors: QueriesKeysValues) -> float:
    """Mean time of a call, after a call that compiles; the clock waits for the device."""
    device = tensors[0].device

    def run(times: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(times):
            attention(*tensors, backend)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    run(1)
    return run(times := max(1, min(50, round(SECONDS / max(run(1), 1e-6))))) / times


def measure(backend: str, samples: dict[str, QueriesKeysValues], references: dict[str, Tensor]) -> Measured:
    """Error of every sample, time of the first."""
    errors = {
        name: relative_error(spread(attention(*sample, backend)), references[name]) for name, sample in samples.items()
    }
    return Measured(seconds_of(backend, next(iter(samples.values()))), errors)


def random_sample(shape: Sequence[int], num_keys: int, device: torch.device, dtype: torch.dtype) -> QueriesKeysValues:
    """Normally distributed; shape: [B, Lq, N, D] of the queries."""
    generator = torch.Generator(device).manual_seed(0)
    batch_size, num_queries, *heads = shape
    q, k, v = (
        torch.randn(batch_size, length, *heads, generator=generator, device=device, dtype=dtype)
        for length in (num_queries, num_keys, num_keys)
    )
    return q, k, v


@torch.no_grad()
def own_samples(
    model: WanModel, *, num_frames: int, num_block_frames: int, height: int, width: int
) -> dict[str, QueriesKeysValues]:
    """Queries of the last block, keys and values of all frames, of a clip of noise that the model denoises as a whole.

    No prompt, no image, half of the way: it is the weights that give these numbers their outliers. height, width: of
    latents.
    """
    config, device = model.config, model.device
    layers = sorted({0, config.num_layers // 2, config.num_layers - 1})
    samples: dict[str, QueriesKeysValues] = {}
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(1, config.in_dim, num_frames, height, width, generator=generator, device=device)
    tokens, grid = model.embed(x, None, None)
    rope = rope_frequencies(config.head_dim, range(grid[0]), *grid[1:], device=device)
    num_queries = num_block_frames * grid[1] * grid[2]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = model.rotate(q, rope), model.rotate(k, rope)
        if layer in layers:
            samples[f"layer {layer}"] = q[:, -num_queries:], k, v
        return attention(q, k, v)

    prompt = torch.zeros(1, 1, config.text_dim, device=device)
    clip_fea = torch.zeros(1, 257, config.clip_dim, device=device) if config.model_type == "i2v" else None
    model.run(tokens, torch.full((1, num_frames), 500.0, device=device), prompt, clip_fea, attend, grid)
    return samples


def choose(candidates: Sequence[str], samples: dict[str, QueriesKeysValues], gate: float, *, insisted: bool) -> str:
    """The fastest candidate whose errors are all within the gate; what was measured is logged in one line.

    insisted: there is one candidate, and it is not left out but refused, by ValueError.
    """
    references = {name: exact(*sample) for name, sample in samples.items()}
    measured: dict[str, Measured] = {}
    notes = []
    for backend in candidates:
        try:
            measured[backend] = found = measure(backend, samples, references)
        except Exception as error:  # kernels have errors of their own for shapes and devices: here it is not for us
            if insisted:
                raise
            notes.append(
                f"{backend} does not run here ({type(error).__name__}: {str(error).partition(chr(10))[0]:.100})"
            )
            continue
        where = max(found.errors, key=found.errors.get)
        note = f"{backend} {found.seconds * 1e3:.3g} ms, {found.error:.2%} off ({where})"
        notes.append(note + f", over the gate of {gate:.2%}" * (found.error > gate))
        if insisted and found.error > gate:
            raise ValueError(
                f"attention_backend {backend!r} is {found.error:.2%} off exact attention ({where}), attention_gate "
                f"allows {gate:.2%}; set attention_backend=auto, or a larger attention_gate"
            )
    within = [backend for backend, found in measured.items() if found.error <= gate]
    if not within:
        raise ValueError(
            f"attention_gate is {gate:.2%}, and no attention backend is within it: {'; '.join(notes)}; set a larger "
            "attention_gate, or attention_backend=auto, which asks for none"
        )
    best = min(within, key=lambda backend: measured[backend].seconds)
    shapes = next(iter(samples.values()))
    logger.info(
        "attention, %d queries and %d keys: %s -> %s", shapes[0].shape[1], shapes[1].shape[1], "; ".join(notes), best
    )
    return best


@torch.no_grad()
def choose_attention(
    model: WanModel, gate: float, *, num_frames: int, num_block_frames: int, height: int, width: int
) -> None:
    """Let a loaded model's "fastest" become the one that is, and hold a backend of 8 bits against the gate.

    num_frames: latents that the last block sees, itself included; num_block_frames: its own; height, width: of latents.
    Raises ValueError where what was asked for is too coarse or cannot run here. Comes before anything is compiled.
    """
    backend = model.attention_backend
    check_device(backend, model.device)
    insisted = backend in ROUNDINGS
    if not insisted and backend != "fastest":
        return
    samples = own_samples(model, num_frames=num_frames, num_block_frames=num_block_frames, height=height, width=width)
    q, k, _ = next(iter(samples.values()))
    samples = {"random numbers": random_sample(q.shape, k.shape[1], q.device, q.dtype), **samples}
    candidates = [backend] if insisted else available_backends(model.device)
    if k.shape[1] < MIN_KEYS:  # where all are exact
        candidates = [backend for backend in candidates if backend in EXACT or insisted]
    model.attention_backend = choose(candidates, samples, gate, insisted=insisted)
