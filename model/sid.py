"""Score identity distillation (SiD, arXiv 2404.04057): the generator's loss flows through both scores."""

from torch import Tensor

from model.base import Batch
from model.dmd import mean_error
from model.scores import Generate, ScorePair, ScoreTimes
from utils.distributed import SampleRngs


class SiD:
    """mean of (r - f) ((r - x) - alpha (r - f)) / stopgrad(mean |x - r|), with r and f the scores' x0 of x noised.

    alpha 1 is the setting of Self-Forcing. Gradients reach x directly and through r and f, so it costs the backward
    pass of both networks; their parameters must not learn from it (the trainer lets only the player on turn learn).
    """

    def __init__(self, generate: Generate, scores: ScorePair, times: ScoreTimes, *, sid_alpha: float = 1.0):
        self.generate = generate
        self.scores = scores
        self.times = times
        self.sid_alpha = sid_alpha

    def loss(self, batch: Batch, rngs: SampleRngs) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss, and how far the scores differ."""
        made = self.generate(batch, rngs)
        x = made.latents
        t = self.times.draw(made, rngs)
        x_t = self.times.scheduler.add_noise(x, rngs.randn(*x.shape[1:]), t)
        real, fake = self.scores(x_t, t, batch)
        normalizer = mean_error(x.detach(), real.detach())
        difference = real - fake
        loss = (difference * ((real - x) - self.sid_alpha * difference) / normalizer).mean()
        return loss, {"score_difference": difference.detach().abs().mean(), "timestep": t.mean()}
