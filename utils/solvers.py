"""ODE solvers by name: diffusers' multistep solvers on Wan's own sigma grids."""

import numpy as np
import torch

SOLVERS = ("unipc", "dpm++", "euler")


def wan_sigmas(solver: str, steps: int, shift: float) -> np.ndarray:
    """Noise levels visited, float64 [steps], before the final 0.

    Wan's UniPC starts at 0.999 of the unshifted grid, its DPM++ and Euler at 1; diffusers' default grids differ from
    both.
    """
    first = 0.999 if solver == "unipc" else 1.0
    sigmas = np.linspace(first, 0.0, steps + 1)[:-1]
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def make_solver(solver: str, steps: int, shift: float, device: torch.device | str):
    """A fresh diffusers scheduler with its timesteps set: iterate `.timesteps`, call `.step(flow, t, x).prev_sample`.

    solver: "unipc" (arXiv 2302.04867, order 2, bh2), "dpm++" (arXiv 2211.01095, 2M) or "euler". A solver has memory:
    use one per block.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is unknown; use one of {', '.join(SOLVERS)}")
    if steps < 1:
        raise ValueError(f"sampling_steps is {steps}; use at least 1")
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    sigmas = wan_sigmas(solver, steps, shift)
    if solver == "euler":  # the sigmas given are final: no shift on top
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        scheduler.set_timesteps(sigmas=sigmas.tolist(), device=device)
        scheduler.set_begin_index(0)
        return scheduler
    if solver == "unipc":
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2, solver_type="bh2"
        )
    else:
        scheduler = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=shift,
            algorithm_type="dpmsolver++",
            solver_order=2,
        )
    scheduler.set_timesteps(steps, device=device)
    # Wan's grid in place of diffusers' own: sigmas with the final 0, timesteps truncated to integers as Wan does.
    scheduler.sigmas = torch.from_numpy(np.append(sigmas, 0.0)).float()
    scheduler.timesteps = torch.from_numpy((sigmas * 1000).astype(np.int64)).to(device)
    scheduler.set_begin_index(0)  # steps are counted, not searched for: a search would wait for the device
    return scheduler
