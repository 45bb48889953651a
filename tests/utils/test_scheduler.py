"""The clock and the solvers against the reference's tables and trajectories."""

import math

import pytest
import torch

from tests.golden_data import below, load_golden
from utils.scheduler import FlowMatchScheduler
from utils.solvers import make_solver

TENSORS, CONFIG = load_golden("g_schedulers")


def on_the_grid(shift: float, t: torch.Tensor) -> torch.Tensor:
    """The reference snaps every time to its table of 1000; ours does not. Comparing needs the snapped time."""
    grid = TENSORS[f"fm_shift{shift}_1000.timesteps"]
    return grid[(grid[None] - t[:, None].float()).abs().argmin(1)]


@pytest.mark.parametrize("shift", CONFIG["shifts"])
def test_the_clock_reproduces_the_reference(shift):
    clock, ops = FlowMatchScheduler(shift), below(TENSORS, f"ops_shift{shift}")
    close = {"atol": 1e-6, "rtol": 1e-5}
    t = on_the_grid(shift, ops["t"])
    torch.testing.assert_close(clock.add_noise(ops["x0"], ops["noise"], t), ops["add_noise"], **close)
    t_int = on_the_grid(shift, ops["t_int"])
    torch.testing.assert_close(clock.add_noise(ops["x0"], ops["noise"], t_int), ops["add_noise_int"], **close)
    torch.testing.assert_close(clock.flow_to_x0(ops["v"], ops["x0"], t), ops["flow_to_x0"], **close)
    torch.testing.assert_close(clock.training_target(ops["x0"], ops["noise"]), ops["training_target"], **close)
    torch.testing.assert_close(clock.training_weight(t), ops["training_weight"], **close)
    nonzero = on_the_grid(shift, ops["t_nonzero"])
    flow = clock.x0_to_flow(ops["v"], ops["x0"], nonzero)
    torch.testing.assert_close(flow, ops["x0_to_flow"], atol=1e-4, rtol=1e-5)  # divides by sigma down to 0.005


@pytest.mark.parametrize("shift", CONFIG["shifts"])
def test_warping_and_weights_reproduce_the_tables(shift):
    clock, tables = FlowMatchScheduler(shift), below(TENSORS, f"fm_shift{shift}_1000")
    for case in ("warp_3step", "warp_4step", "warp_5step_with0"):
        torch.testing.assert_close(clock.warp(tables[f"{case}.in"]), tables[f"{case}.out"], atol=1e-4, rtol=0)
    torch.testing.assert_close(tables["timesteps"] / 1000, tables["sigmas"], atol=1e-6, rtol=0)
    torch.testing.assert_close(clock.training_weight(tables["timesteps"]), tables["train_weights"], atol=1e-5, rtol=0)


def test_known_numbers():
    assert FlowMatchScheduler(5.0).warp([1000, 750, 500, 250]).tolist() == pytest.approx([1000, 937.5, 833.3333, 625])
    x = torch.randn(2, 3, 4, 5, 5)
    clock = FlowMatchScheduler()
    assert torch.equal(clock.add_noise(x, torch.randn_like(x), torch.zeros(2, 3)), x)
    noise, t = torch.randn_like(x), torch.rand(2, 3) * 999 + 1
    x_t = clock.add_noise(x, noise, t)
    torch.testing.assert_close(clock.flow_to_x0(noise - x, x_t, t), x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(clock.x0_to_flow(x, x_t, t), noise - x, atol=1e-2, rtol=1e-2)


def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The field of the stored trajectories (golden config, `velocity`)."""
    s = float(t) / 1000
    channel = torch.arange(x.shape[1]).view(1, -1, 1, 1, 1).float()
    return x * (0.6 + 0.4 * math.sin(2 * s)) - 0.7 * x.tanh() * math.cos(3 * s) + 0.5 * torch.sin(5 * s + 0.3 * channel)


@pytest.mark.parametrize("steps", CONFIG["steps"])
@pytest.mark.parametrize("shift", CONFIG["shifts"])
@pytest.mark.parametrize("solver, stored", [("unipc", "unipc"), ("dpm++", "dpmpp"), ("euler", "euler")])
def test_solvers_reproduce_the_reference_trajectories(solver, stored, shift, steps):
    trajectory = below(TENSORS, f"traj.{stored}_shift{shift}_{steps}")
    scheduler = make_solver(solver, steps, shift, "cpu")
    torch.testing.assert_close(scheduler.timesteps.float(), trajectory["timesteps"].float(), atol=2e-4, rtol=0)
    x = trajectory["x"][0]
    for t, expected in zip(scheduler.timesteps, trajectory["x"][1:], strict=True):
        x = scheduler.step(velocity(x, t), t, x).prev_sample
        torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)


def test_mistakes():
    with pytest.raises(ValueError, match="'heun' is unknown; use one of unipc"):
        make_solver("heun", 4, 5.0, "cpu")
    with pytest.raises(ValueError, match="at least 1"):
        make_solver("unipc", 0, 5.0, "cpu")
