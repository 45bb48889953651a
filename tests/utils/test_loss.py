"""utils/loss.py: three names for one error, weighted differently."""

import torch

from utils.loss import DENOISING_LOSSES
from utils.scheduler import FlowMatchScheduler


def test_the_true_flow_costs_nothing_and_the_others_follow_from_the_flow():
    x0, noise, error = torch.randn(3, 2, 4, 5, 6, 6).unbind()
    t = torch.rand(2, 4) * 1000
    x_t = FlowMatchScheduler().add_noise(x0, noise, t)
    flow, sigma = noise - x0, t / 1000
    for loss in DENOISING_LOSSES.values():
        torch.testing.assert_close(loss(flow, x0, noise, x_t, t), torch.zeros(2, 4), atol=1e-10, rtol=0)
    per_frame = error.square().mean(dim=(2, 3, 4))
    expected = {"flow": per_frame, "x0": sigma**2 * per_frame, "noise": (1 - sigma) ** 2 * per_frame}
    for name, loss in DENOISING_LOSSES.items():
        torch.testing.assert_close(loss(flow + error, x0, noise, x_t, t), expected[name], atol=1e-5, rtol=1e-4)
