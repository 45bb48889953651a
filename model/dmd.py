"""Distribution matching distillation (DMD2, arXiv 2405.14867; gradient: equations 7 and 8 of arXiv 2311.18828)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.base import Batch
from model.scores import Generate, ScorePair, ScoreTimes
from utils.distributed import SampleRngs


class DMD:
    """Moves generated clips the way from what the critic sees in them to what the teacher sees in them.

    x generated, x_t = x noised to one time, f and r the fake and the real score's x0 of x_t:

        g = (f - r) / mean |x - r|        per clip, so that its size knows neither noise level nor resolution
        loss = |x - stopgrad(x - g)|^2 / 2,  whose gradient is g per element; only frames that can learn count

    No gradient flows through the scores, and both take part in float32.
    """

    def __init__(self, generate: Generate, scores: ScorePair, times: ScoreTimes):
        self.generate = generate
        self.scores = scores
        self.times = times

    def loss(self, batch: Batch, rngs: SampleRngs) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss, and how large the gradient is."""
        made = self.generate(batch, rngs)
        x = made.latents
        with torch.no_grad():
            t = self.times.draw(made, rngs)
            x_t = self.times.scheduler.add_noise(x, rngs.randn(*x.shape[1:]), t)
            real, fake = self.scores(x_t, t, batch)
            gradient = (fake - real) / mean_error(x, real)
        x, gradient = x[:, made.first_grad_frame :], gradient[:, made.first_grad_frame :]
        loss = 0.5 * F.mse_loss(x, (x - gradient).detach())
        return loss, {"gradient": gradient.abs().mean(), "timestep": t.mean()}


def mean_error(x: Tensor, x0: Tensor) -> Tensor:
    """mean |x - x0| over everything but the batch: [B, 1, 1, 1, 1], never 0."""
    return (x - x0).abs().mean(dim=(1, 2, 3, 4), keepdim=True).clamp(min=1e-6)
