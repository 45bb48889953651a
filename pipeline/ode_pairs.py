"""How a many-step teacher goes from noise to a clip: the states a few-step student learns to leap from."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.rollout import FrameBlock, Path, guided, plan_blocks, rollout
from pipeline.samplers import Denoise, Draw, multi_step
from utils.conditioning import Conditioning
from utils.solvers import wan_sigmas
from utils.wan_wrapper import WanDiffusionWrapper

SOLVER = "euler"  # its states are the ODE's, without the memory of a multistep solver


@torch.no_grad()
def ode_trajectory(
    teacher: WanDiffusionWrapper,
    noise: Tensor,
    conditioning: Conditioning,
    unconditional: Conditioning | None = None,
    *,
    timesteps: Sequence[float],
    steps: int = 48,
    guidance_scale: float = 1.0,
    num_frame_per_block: int = 3,
    independent_first_frame: bool = False,
    context_noise: float = 0.0,
    draw: Draw | None = None,
) -> Tensor:
    """States of the teacher's guided probability-flow ODE at `timesteps`, and its end: float32 [B, states, F, C, H, W].

    noise: [B, F, C, H, W], the state at the first time. timesteps: the student's, after the shift, descending from
    1000; they must lie on the grid of `steps` Euler steps at the teacher's shift, which the trajectory then holds
    exactly (CausVid, arXiv 2412.07772, 4.3: 48 steps and 1000, 750, 500, 250 before the shift).
    A bidirectional teacher sees the clip at once. A causal one goes block by block, each given the clean ends of those
    before it (block sizes and context_noise as in its training, `draw` for the latter's noise).
    """
    places = grid_places(timesteps, steps, teacher.scheduler.shift)
    batch, num_frames, _, height, width = noise.shape
    conditions = [conditioning] if unconditional is None else [conditioning, unconditional]
    blocks = [FrameBlock(0, num_frames)]
    if teacher.is_causal:
        blocks = list(plan_blocks(num_frames, num_frame_per_block, independent_first_frame))
    paths = [
        Path(c, teacher.model.make_kv_cache(batch, height, width, num_frames) if teacher.is_causal else None)
        for c in conditions
    ]
    states: list[Tensor] = []

    def sample(block: FrameBlock, paths: list[Path]) -> Tensor:
        denoise = guided(teacher, paths, block, guidance_scale)
        states.append(_states(denoise, noise[:, block.start : block.stop].float(), places, steps, teacher))
        return states[-1][:, -1]

    for _ in rollout(teacher, paths, blocks, sample, context_noise=context_noise, draw=draw):
        pass
    return torch.cat(states, dim=2)


def _states(denoise: Denoise, noise: Tensor, places: list[int], steps: int, teacher: WanDiffusionWrapper) -> Tensor:
    """One block's states before the steps `places`, and its end: [B, states, f, C, H, W]."""
    kept: list[Tensor] = []
    end = multi_step(
        denoise,
        noise,
        SOLVER,
        steps,
        teacher.scheduler.shift,
        see=lambda i, x: kept.append(x) if i in places else None,
    )
    return torch.stack([*kept, end], dim=1)


def grid_places(timesteps: Sequence[float], steps: int, shift: float) -> list[int]:
    """Which of `steps` Euler steps at `shift` start at these times (in [0, 1000], after the shift).

    48 steps at shift 5: 1000, 937.5, 833.3, 625 -> 0, 12, 24, 36. Raises ValueError for a time between two steps.
    """
    grid = torch.from_numpy(wan_sigmas(SOLVER, steps, shift)) * 1000
    wanted = torch.tensor(list(timesteps), dtype=torch.float64)
    distance, places = (grid[None] - wanted[:, None]).abs().min(dim=1)
    if distance.max() > 1e-3:
        off = float(wanted[distance.argmax()])
        raise ValueError(
            f"{steps} solver steps at shift {shift} do not pass through t = {off:.1f}; use a number of steps of which "
            "every few-step time is a whole part: 48 holds 1000, 750, 500, 250 before the shift"
        )
    return places.tolist()
