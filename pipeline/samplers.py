"""One block from noise to clean latents. A sampler sees a function `denoise(x, t) -> (flow, x0)` and nothing else.

Latents [B, f, C, H, W] float32; t a number or scalar tensor in [0, 1000].
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from utils.scheduler import FlowMatchScheduler
from utils.solvers import make_solver

Denoise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Draw = Callable[[torch.Size], Tensor]  # fresh unit noise of a shape


def few_step(
    denoise: Denoise,
    noise: Tensor,
    timesteps: Sequence[float],
    scheduler: FlowMatchScheduler,
    draw: Draw,
    *,
    start: Tensor | None = None,
    skip: int = 0,
) -> Tensor:
    """Predict x0, noise it again to the next time, and so on (Self-Forcing, arXiv 2506.08009, algorithm 2).

    skip: leave out so many first steps, and begin with the latents `start` at the noise of the next one (SDEdit, arXiv
    2108.01073).
    """
    timesteps = timesteps[skip:]
    x = scheduler.add_noise(start, noise, timesteps[0]) if skip else noise
    for i, t in enumerate(timesteps):
        _, x0 = denoise(x, t)
        if i + 1 < len(timesteps):
            x = scheduler.add_noise(x0, draw(x0.shape), timesteps[i + 1])
    return x0


def few_step_times(denoising_step_list: Sequence[float], scheduler: FlowMatchScheduler, *, warp: bool) -> list[float]:
    """Times in [0, 1000] of a step list; a trailing 0 only marks the end. warp: the list is on the unshifted grid."""
    steps = [float(t) for t in denoising_step_list if t > 0]
    return scheduler.warp(steps).tolist() if warp else steps


def multi_step(
    denoise: Denoise,
    noise: Tensor,
    solver: str,
    steps: int,
    shift: float,
    *,
    see: Callable[[int, Tensor], None] | None = None,
    start: Tensor | None = None,
    skip: int = 0,
) -> Tensor:
    """Follow the probability-flow ODE with a fresh solver on Wan's grid. see(i, x) is shown the state before step i.

    start and skip are `few_step`'s.
    """
    scheduler = make_solver(solver, steps, shift, noise.device)
    x = noise
    if skip:
        scheduler.set_begin_index(skip)
        sigma = scheduler.sigmas[skip]
        x = (1 - sigma) * start + sigma * noise
    for i, t in enumerate(scheduler.timesteps[skip:], start=skip):
        if see is not None:
            see(i, x)
        flow, _ = denoise(x, t)
        x = scheduler.step(flow, t, x).prev_sample
    return x


def guide(positive: Tensor, negative: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): negative + w (positive - negative); w = 1 is no guidance."""
    return negative + guidance_scale * (positive - negative)


def guide_in_turn(flows: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """Guidance with a scale for each thing that was added (arXiv 2511.22940): flows from all of it down to nothing.

    v = v_0 + w_1 (v_1 - v_0) + w_2 (v_2 - v_1) + ...; of two flows it is `guide`.
    """
    guided = flows[-1]
    for (more, less), scale in zip(pairwise(flows), scales, strict=True):
        guided = guided + scale * (more - less)
    return guided


class SampleNoise:
    """Unit noise from one seed per sample: a sample's noise depends on its own seed and on nothing beside it.

    Drawn on the CPU in float32, so that every device sees the same numbers.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu"):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device = torch.device(device)

    def __call__(self, shape: torch.Size | Sequence[int]) -> Tensor:
        """[B, ...] float32, row i from seed i."""
        if shape[0] != len(self.generators):
            raise ValueError(f"{shape[0]} samples but {len(self.generators)} seeds; give one seed per prompt")
        rows = [torch.randn(tuple(shape[1:]), generator=generator) for generator in self.generators]
        noise = torch.stack(rows)
        if self.device.type == "cuda":  # a copy from pageable memory would wait for all that was launched before
            noise = noise.pin_memory()
        return noise.to(self.device, non_blocking=True)
