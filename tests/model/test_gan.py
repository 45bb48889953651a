"""model/gan.py: losses that are the formulas, penalties that are slopes, the same noise for both clips."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.base import Batch
from model.gan import GAN, Discriminator
from model.scores import ScoreTimes
from pipeline.self_forcing_training import Trajectory
from utils.conditioning import Conditioning
from utils.distributed import Rngs, SampleRngs
from utils.scheduler import FlowMatchScheduler
from utils.wan_wrapper import WanDiffusionWrapper
from wan.configs import WanConfig
from wan.modules.discriminator import DiscriminatorHead

SHAPE = (2, 3, 2, 4, 4)  # clips, frames, channels, height, width
REAL, FAKE = 1.0, -0.5  # what every number of a clip is
TIMES = ScoreTimes(FlowMatchScheduler(5.0))


class Linear(nn.Module):
    """Judges by a weighted sum, plus a bias per call; remembers what it was shown. Its flow is 0."""

    def __init__(self, slope: float = 0.3):
        super().__init__()
        self.weight = nn.Parameter(torch.full(SHAPE[1:], slope / 96**0.5))  # |dD/dx| = slope
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x_t: Tensor, conditioning: Conditioning, t: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append((x_t, t))
        return (x_t * self.weight).sum(dim=(1, 2, 3, 4))[:, None], torch.zeros_like(x_t)


class Painter(nn.Module):
    """Makes clips of one number, which it can learn."""

    def __init__(self):
        super().__init__()
        self.colour = nn.Parameter(torch.tensor(FAKE))

    def __call__(self, batch: Batch, rngs: SampleRngs) -> Trajectory:
        return Trajectory(self.colour.expand(SHAPE))


def rngs(count: int = SHAPE[0]) -> SampleRngs:
    return SampleRngs(Rngs(0, 0, torch.device("cpu")), range(count))


def real_batch(value: float = REAL) -> Batch:
    return Batch(torch.full(SHAPE, value), Conditioning(torch.zeros(SHAPE[0], 1, 1)))


def make(**options) -> GAN:
    return GAN(Painter(), Linear(), TIMES, **{"g_weight": 1.0, "d_weight": 1.0} | options)


@pytest.mark.parametrize("relativistic", [True, False])
def test_the_losses_are_their_formulas(relativistic: bool):
    gan = make(relativistic=relativistic)
    loss, details = gan.critic_loss(real_batch(), rngs())
    (fake_t, _), (real_t, _) = gan.discriminator.seen
    fake, real = ((x * gan.discriminator.weight).sum(dim=(1, 2, 3, 4)) for x in (fake_t, real_t))
    apart = F.softplus(fake - real) if relativistic else F.softplus(fake) + F.softplus(-real)
    torch.testing.assert_close(loss, apart.mean())
    torch.testing.assert_close(details["logits_real"], real.mean())
    own, _ = gan.generator_loss(real_batch(), rngs())
    torch.testing.assert_close(own, F.softplus(real - fake if relativistic else -fake).mean())


def test_the_clips_get_the_same_noise_at_the_same_time():
    gan = make()
    gan.critic_loss(real_batch(), rngs())
    (fake_t, t), (real_t, its_t) = gan.discriminator.seen
    assert torch.equal(t, its_t) and torch.equal(t, t[:, :1].expand(-1, 3))
    sigma = (t / 1000)[..., None, None, None]
    noise = (fake_t - (1 - sigma) * FAKE) / sigma
    torch.testing.assert_close(noise, (real_t - (1 - sigma) * REAL) / sigma, atol=1e-4, rtol=1e-4)
    assert 0.8 < noise.std() < 1.2


@pytest.mark.parametrize("relativistic", [True, False])
def test_the_generator_goes_where_clips_look_real_and_the_discriminator_apart(relativistic: bool):
    gan = make(relativistic=relativistic)
    gan.critic_loss(real_batch(), rngs())[0].backward()
    assert gan.generate.colour.grad is None
    assert gan.discriminator.weight.grad.mean() < 0  # a larger weight tells 1 from -0.5 better
    gan.generator_loss(real_batch(), rngs())[0].backward()
    assert gan.generate.colour.grad < 0  # brighter


def test_weights_scale_their_loss():
    for name, call in (("g_weight", "generator_loss"), ("d_weight", "critic_loss")):
        whole, tenth = (getattr(make(**{name: weight}), call)(real_batch(), rngs())[0] for weight in (1.0, 0.1))
        torch.testing.assert_close(tenth, 0.1 * whole)


@pytest.mark.parametrize("side", ["r1", "r2"])
def test_a_penalty_is_half_the_squared_slope(side: str):
    plain, _ = make(d_weight=0.0).critic_loss(real_batch(), rngs())
    slopes = []
    for step in range(400):
        draws = SampleRngs(Rngs(0, step, torch.device("cpu")), range(2))
        loss, details = make(d_weight=0.0, **{f"{side}_weight": 4.0}).critic_loss(real_batch(), draws)
        torch.testing.assert_close(loss - plain, 0.5 * 4.0 * details[side])
        slopes.append(details[side].item())
    assert abs(sum(slopes) / len(slopes) - 0.3**2) < 0.01


def test_the_penalty_nudges_the_clip_it_is_named_after():
    for side, index in (("r1", 1), ("r2", 0)):
        gan = make(**{f"{side}_weight": 1.0, f"{side}_sigma": 0.1})
        gan.critic_loss(real_batch(), rngs())
        nudge = gan.discriminator.seen[2][0] - gan.discriminator.seen[index][0]
        assert 0.05 < nudge.std() < 0.15 and abs(nudge.mean()) < 0.05


def test_the_critic_may_stay_a_score_of_what_is_made():
    gan = make(d_weight=0.0, denoising_weight=0.5)
    loss, details = gan.critic_loss(real_batch(), rngs())
    fake_t, t = gan.discriminator.seen[0]
    sigma = (t / 1000)[..., None, None, None]
    target = (fake_t - (1 - sigma) * FAKE) / sigma - FAKE  # eps - x0; the predicted flow is 0
    torch.testing.assert_close(details["denoising"], target.square().mean(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss, 0.5 * details["denoising"])
    assert len(gan.discriminator.seen) == 2  # no pass of its own


def test_longer_real_clips_are_cut_and_unfit_ones_refused():
    gan = make()
    longer = torch.full((2, 6, 2, 4, 4), REAL)
    loss, _ = gan.critic_loss(Batch(longer, Conditioning(torch.zeros(2, 1, 1))), rngs())
    torch.testing.assert_close(loss, make().critic_loss(real_batch(), rngs())[0])
    with pytest.raises(ValueError, match=r"real clips are \[2, 2, 4, 4\] and made ones \[3, 2, 4, 4\]"):
        gan.critic_loss(Batch(longer[:, :2], Conditioning(torch.zeros(2, 1, 1))), rngs())
    with pytest.raises(ValueError, match="words alone; give data with latents"):
        gan.critic_loss(Batch(None, Conditioning(torch.zeros(2, 1, 1))), rngs())


def test_a_real_discriminator_learns_to_tell_two_colours():
    torch.manual_seed(0)
    sizes = WanConfig(dim=16, ffn_dim=32, num_heads=2, num_layers=2, in_dim=2, out_dim=2, text_dim=4, text_len=2)
    score = WanDiffusionWrapper("", False, from_scratch=True, model_config=sizes)
    gan = GAN(Painter(), Discriminator(score, DiscriminatorHead(sizes)), TIMES, d_weight=1.0, r1_weight=0.01)
    optimizer = torch.optim.Adam(gan.discriminator.parameters(), 2e-3)
    batch = Batch(torch.full(SHAPE, REAL), Conditioning(torch.randn(2, 2, 4)))
    losses = []
    for step in range(40):
        loss, _ = gan.critic_loss(batch, SampleRngs(Rngs(0, step, torch.device("cpu")), range(2)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(0.693, abs=0.01)  # undecided: softplus(0)
    assert sum(losses[-10:]) / 10 < 0.5
