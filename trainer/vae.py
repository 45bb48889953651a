"""The puppet VAE, trained from nothing on puppets rendered while training."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.base import Player
from trainer.base import Trainer
from utils.config import VaeConfig
from utils.distributed import SampleRngs
from wan.modules.vae import WanVAE
from wan.modules.weights import save_safetensors
from world.puppet import sample_scenes
from world.render import render

logger = logging.getLogger(__name__)

STATISTICS_CLIPS = 128  # clips that the latents' mean and deviation are measured on
CLIPS_AT_ONCE = 4  # whole videos encoded at a time when measuring


@dataclass(frozen=True)
class Clips:
    """Rendered videos [B, 3, T, H, W] in [-1, 1] and where the puppet and its prop are, [B, 1, T, H, W] in [0, 1]."""

    video: Tensor
    mask: Tensor


class VAETrainer(Trainer):
    """Reconstruction and a weak prior: L1 + MSE + L1 of pixel differences + KL, puppet pixels counting more.

    The last data.tail_share of the run sees clips of data.tail_num_frames, so that colours do not drift late.
    """

    name = "vae"

    def build(self) -> list[Player]:
        settings = self.config.vae
        self.vae = WanVAE(**_sizes(settings), **_unit_statistics(settings.z_dim)).to(self.device)
        for parameter in self.vae.parameters():
            if parameter.dim() == 5:  # the layout that the VAE gives its activations
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
        self.compiled_losses = torch.compile(self._losses, dynamic=False) if self.config.compiles else self._losses
        self.eval_clips: Clips | None = None
        self.num_video_frames = 1 + self.vae.temporal_stride * (self.config.num_training_frames - 1)
        return [Player("vae", self.vae, self.loss)]

    def prepare(self, rngs: SampleRngs) -> Clips:
        data = self.config.data
        in_tail = self.progress() >= 1 - data.tail_share
        num_frames = data.tail_num_frames if in_tail else data.num_frames
        first = rngs.step * self.config.batch_size * self.num_passes * self.ranks.size + rngs.samples.start
        return self.render(len(rngs.samples), num_frames, first)

    @torch.no_grad()
    def render(self, num_clips: int, num_frames: int, first: int, *, split: str = "train") -> Clips:
        """Clips of scenes first, first + 1, ... of this run's seed."""
        with torch.autocast(self.device.type, enabled=False):
            scenes = sample_scenes(num_clips, self.config.seed, split, start=first, device=self.device)
            video, mask = render(scenes, num_frames, size=self.config.height, return_mask=True)
        return Clips(video.transpose(1, 2), mask.transpose(1, 2))

    def loss(self, clips: Clips, rngs: SampleRngs) -> tuple[Tensor, dict[str, Tensor]]:
        stride = self.vae.spatial_stride
        latent_frames = (clips.video.shape[2] - 1) // self.vae.temporal_stride + 1
        height, width = clips.video.shape[3] // stride, clips.video.shape[4] // stride
        noise = rngs.randn(self.config.vae.z_dim, latent_frames, height, width)
        # The tail runs eagerly: compiling its shape too would take longer than it saves.
        losses = self.compiled_losses if clips.video.shape[2] == self.config.data.num_frames else self._losses
        terms = losses(clips.video, clips.mask, noise)
        weights = self.config.vae
        total = (
            weights.l1_weight * terms["l1"]
            + weights.mse_weight * terms["mse"]
            + weights.gradient_weight * terms["gradient"]
            + weights.kl_weight * terms["kl"]
        )
        return total, {name: term.detach() for name, term in terms.items()}

    def _losses(self, video: Tensor, mask: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """The four terms: of the posterior N(mean, exp(logvar)) sampled at mean + std * noise, and of its decoding."""
        mean, logvar = (moment.float() for moment in self.vae.encode_moments(video))
        logvar = logvar.clamp(-30, 20)
        decoded = self.vae.decode(mean + (0.5 * logvar).exp() * noise).float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return {**picture_losses(decoded, video, mask, self.config.vae.puppet_weight), "kl": kl}

    @torch.no_grad()
    def evaluate(self) -> dict[str, Tensor]:
        """PSNR of the round trip on whole held-out videos: all pixels, puppet and prop only, first and last quarter."""
        if self.eval_clips is None:
            clips = self.config.data.num_eval_clips
            self.eval_clips = self.render(clips, self.num_video_frames, 0, split="heldout")
        errors = []
        for video in self.eval_clips.video.split(CLIPS_AT_ONCE):
            with self.autocast():
                decoded = self.vae.decode(self.vae.encode(video)).float().clamp(-1, 1)
            errors.append((decoded - video).square())
        error, mask = torch.cat(errors), self.eval_clips.mask
        quarter = max(1, error.shape[2] // 4)
        return {
            "psnr": psnr(error.mean()),
            "psnr_puppet": psnr((error * mask).sum() / (mask.sum() * error.shape[1])),
            "psnr_first_quarter": psnr(error[:, :, :quarter].mean()),
            "psnr_last_quarter": psnr(error[:, :, -quarter:].mean()),
        }

    def export(self, folder: Path) -> None:
        """`Wan2.1_VAE.safetensors` in bfloat16 and its sizes, latent statistics included, as json."""
        mean, std = self.latent_statistics()
        folder.mkdir(parents=True, exist_ok=True)
        sizes = _sizes(self.config.vae) | {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
        (folder / "Wan2.1_VAE.json").write_text(json.dumps(sizes, indent=2) + "\n")
        save_safetensors(self.vae.state_dict(), folder / "Wan2.1_VAE.safetensors", torch.bfloat16)

    @torch.no_grad()
    def latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the posterior's mean, per latent channel, over whole videos."""
        count, first, second = 0, 0, 0
        for start in range(0, STATISTICS_CLIPS, CLIPS_AT_ONCE):
            clips = self.render(CLIPS_AT_ONCE, self.num_video_frames, start)
            with self.autocast():
                latents = self.vae.encode(clips.video).double()
            count += latents.numel() // latents.shape[1]
            first = first + latents.sum(dim=(0, 2, 3, 4))
            second = second + latents.square().sum(dim=(0, 2, 3, 4))
        mean = first / count
        return mean, (second / count - mean.square()).clamp(min=1e-12).sqrt()


def picture_losses(decoded: Tensor, video: Tensor, mask: Tensor, mask_weight: float) -> dict[str, Tensor]:
    """L1, MSE and L1 of pixel differences of [B, 3, T, H, W]; pixels under the mask [B, 1, T, H, W] count more."""
    weight = 1 + (mask_weight - 1) * mask
    weight = weight / weight.mean()
    error = decoded - video
    rows = (weight[..., 1:] * error.diff(dim=-1).abs()).mean()
    columns = (weight[..., 1:, :] * error.diff(dim=-2).abs()).mean()
    return {
        "l1": (weight * error.abs()).mean(),
        "mse": (weight * error.square()).mean(),
        "gradient": 0.5 * (rows + columns),
    }


def psnr(mean_square_error: Tensor) -> Tensor:
    """Decibels for pixels in [-1, 1]: a range of 2."""
    return 10 * torch.log10(4 / mean_square_error.clamp(min=1e-10))


def _sizes(settings: VaeConfig) -> dict:
    names = ("dim", "z_dim", "dim_mult", "num_res_blocks", "temporal_downsample", "patch_size")
    return {name: value for name, value in asdict(settings).items() if name in names}


def _unit_statistics(z_dim: int) -> dict[str, list[float]]:
    """Latents are normalised by what is measured at the end; while training they are left as they are."""
    return {"latents_mean": [0.0] * z_dim, "latents_std": [1.0] * z_dim}
