"""Adversarial distillation: the critic's features decide whether a generated clip could be a real one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.base import Batch
from model.scores import Generate, ScoreTimes
from utils.conditioning import Conditioning
from utils.distributed import SampleRngs
from utils.loss import DENOISING_LOSSES
from utils.wan_wrapper import WanDiffusionWrapper
from wan.modules.discriminator import DiscriminatorHead, tap_layers


class Discriminator(nn.Module):
    """A bidirectional score network and the head that judges by its features."""

    def __init__(self, score: WanDiffusionWrapper, head: DiscriminatorHead):
        super().__init__()
        self.score = score
        self.head = head
        self.taps = tap_layers(len(score.model.blocks))

    def forward(self, x_t: Tensor, conditioning: Conditioning, t: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, num_class], high where the noisy clip x_t [B, F, C, H, W] looks real; and the score's flow."""
        flow, _, features = self.score(x_t, conditioning, t, taps=self.taps)
        return self.head(features), flow


class GAN:
    """Generator and discriminator on noisy clips (arXiv 1406.2661 non-saturating; noise as in DMD2, arXiv 2405.14867).

    A clip made from words and a real clip of the same words get the same noise at the same time t; D judges both, told
    the words and t.

                         generator                     discriminator
        plain            softplus(-D(fake))            softplus(D(fake)) + softplus(-D(real))
        relativistic     softplus(D(real) - D(fake))   softplus(D(fake) - D(real))          (R3GAN, arXiv 2501.05441)

    The discriminator's slope is held down on real clips (r1_weight) and on made ones (r2_weight): half of |dD/dx|^2,
    measured without second derivatives as ((D(x + sigma z) - D(x)) / sigma)^2 (arXiv 2501.08316). In bfloat16 sigma
    must stay well above the rounding of the logits: 0.1 rather than 0.01.
    denoising_weight: the critic's network also goes on as a score of what the generator makes, by the same pass; how
    well it does so is told in any case.
    """

    def __init__(
        self,
        generate: Generate,
        discriminator: nn.Module,
        times: ScoreTimes,
        *,
        relativistic: bool = True,
        g_weight: float = 1e-2,
        d_weight: float = 1e-2,
        r1_weight: float = 0.0,
        r2_weight: float = 0.0,
        r1_sigma: float = 0.01,
        r2_sigma: float = 0.01,
        denoising_weight: float = 0.0,
        denoising_loss_type: str = "flow",
    ):
        self.generate = generate
        self.discriminator = discriminator
        self.times = times
        self.relativistic = relativistic
        self.g_weight, self.d_weight = g_weight, d_weight
        self.r1_weight, self.r2_weight = r1_weight, r2_weight
        self.r1_sigma, self.r2_sigma = r1_sigma, r2_sigma
        self.denoising_weight = denoising_weight
        self.denoising_loss = DENOISING_LOSSES[denoising_loss_type]

    def generator_loss(self, batch: Batch, rngs: SampleRngs) -> tuple[Tensor, dict[str, Tensor]]:
        """g_weight times how easily the discriminator tells made from real; gradients flow through its input only."""
        made = self.generate(batch, rngs)
        t = self.times.draw(made, rngs)
        noise = rngs.randn(*made.latents.shape[1:])
        fake, _ = self.discriminator(self.times.scheduler.add_noise(made.latents, noise, t), batch.conditioning, t)
        margin = fake
        if self.relativistic:
            with torch.no_grad():
                real_t = self.times.scheduler.add_noise(real_clips(batch, made.latents), noise, t)
                real, _ = self.discriminator(real_t, batch.conditioning, t)
            margin = fake - real
        return self.g_weight * F.softplus(-margin).mean(), {"logits_fake": fake.detach().mean(), "timestep": t.mean()}

    def critic_loss(self, batch: Batch, rngs: SampleRngs) -> tuple[Tensor, dict[str, Tensor]]:
        """d_weight times the discriminator's loss, the penalties on its slope, and its score's loss if that counts."""
        with torch.no_grad():
            made = self.generate(batch, rngs)
        t = self.times.draw(made, rngs)
        noise = rngs.randn(*made.latents.shape[1:])
        fake_t = self.times.scheduler.add_noise(made.latents, noise, t)
        real_t = self.times.scheduler.add_noise(real_clips(batch, made.latents), noise, t)
        fake, flow = self.discriminator(fake_t, batch.conditioning, t)
        real, _ = self.discriminator(real_t, batch.conditioning, t)
        loss = F.softplus(fake - real) if self.relativistic else F.softplus(fake) + F.softplus(-real)
        loss = self.d_weight * loss.mean()
        details = {"logits_fake": fake.detach().mean(), "logits_real": real.detach().mean(), "timestep": t.mean()}
        for name, weight, sigma, x_t, logits in (
            ("r1", self.r1_weight, self.r1_sigma, real_t, real),
            ("r2", self.r2_weight, self.r2_sigma, fake_t, fake),
        ):
            if weight:
                nudged, _ = self.discriminator(x_t + sigma * rngs.randn(*x_t.shape[1:]), batch.conditioning, t)
                slope = ((nudged - logits) / sigma).square().mean()
                loss = loss + 0.5 * weight * slope
                details[name] = slope.detach()
        denoising = self.denoising_loss(flow, made.latents, noise, fake_t, t).mean()
        details["denoising"] = denoising.detach()
        return loss + self.denoising_weight * denoising, details


def published_critic_name(name: str) -> str:
    """A parameter of Discriminator under its name in published critics: model.*, _cls_pred_branch.*, ..."""
    return name.removeprefix("score.").removeprefix("head.")


def real_clips(batch: Batch, made: Tensor) -> Tensor:
    """Real clips as long as the made ones [B, F, C, H, W]; refused where the batch has none, or shorter ones."""
    real = batch.clean_latent
    if real is None:
        raise ValueError("a GAN compares with real clips and this run's data is words alone; give data with latents")
    if real.shape[1] < made.shape[1] or real.shape[2:] != made.shape[2:]:
        raise ValueError(
            f"real clips are {list(real.shape[1:])} and made ones {list(made.shape[1:])} (frames, channels, height, "
            "width); make latents of this size, or set num_training_frames, height and width to theirs"
        )
    return real[:, : made.shape[1]].float()
