"""A tiny decoder for latents that exist, on puppets: the frozen full VAE encodes, the small network learns to show."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model.base import Player
from trainer.base import Trainer
from trainer.vae import picture_losses, psnr
from utils.config import ConfigError
from utils.distributed import SampleRngs, mix_seed
from utils.wan_wrapper import latents_of
from wan.configs import TINY_VAE_FILES, VAE_FILES, find_model_file, find_model_folder
from wan.modules.tiny_vae import TinyVAE, memory_blocks
from wan.modules.vae import channels_last_weights_, load_vae
from wan.modules.weights import save_safetensors
from world.puppet import sample_scenes
from world.render import render

logger = logging.getLogger(__name__)


class Clips(NamedTuple):
    """Latents [B, C, F, h, w], pictures to learn [B, 3, T, H, W] in [-1, 1], where the puppet is [B, 1, T, H, W]."""

    latents: Tensor
    target: Tensor
    mask: Tensor


class TinyVAETrainer(Trainer):
    """L1 + MSE + L1 of pixel differences between the tiny decoder's picture and the target, puppets counting more.

    Batches are rendered and encoded while the run goes on and stay in a pool for a while: at step s the newest batch is
    number pool_batches - 1 + s // steps_per_batch, so a resumed run finds the pool of the interrupted one.
    """

    name = "tiny_vae"

    def build(self) -> list[Player]:
        config = self.config
        folder = config.data.vae_folder or find_model_folder(config.model_name)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.vae = load_vae(find_model_file(folder, VAE_FILES), device=self.device, dtype=dtype)
        self.tiny = TinyVAE(**self.sizes()).to(self.device)
        if latents_of(self.tiny) != latents_of(self.vae):
            raise ConfigError(
                f"tiny_vae decodes latents of (channels, pixels per side, frames) {latents_of(self.tiny)}, those of "
                f"{folder} are {latents_of(self.vae)}; change tiny_vae.patch_size or its steps of upscaling"
            )
        start_simple_(self.tiny)
        channels_last_weights_(self.tiny)
        self.pool: dict[int, Clips] = {}
        self.decode = torch.compile(self.tiny.decode, dynamic=False) if config.compiles else self.tiny.decode
        return [Player("tiny_vae", self.tiny, self.loss)]

    def sizes(self) -> dict:
        """TinyVAE's arguments."""
        names = ("decoder_channels", "decoder_space_upscale", "decoder_time_upscale", "patch_size")
        sizes = {name: value for name, value in asdict(self.config.tiny_vae).items() if name in names}
        return {"latent_channels": self.vae.latent_channels, "encoder_channels": None, **sizes}

    # --- data ---

    def start(self) -> None:
        self.fill_pool()

    def after_step(self) -> None:
        self.fill_pool()

    def fill_pool(self) -> None:
        """Make the batches that are due, forget those that are over."""
        settings = self.config.tiny_vae
        oldest = self.step // settings.steps_per_batch
        due = range(oldest, oldest + settings.pool_batches)
        self.pool = {number: self.pool.get(number) or self.make_batch(number) for number in due}

    def make_batch(self, number: int) -> Clips:
        size = self.config.batch_size
        first = (number * self.ranks.size + self.ranks.rank) * size
        return self.make_clips(size, self.config.data.num_frames, first)

    @torch.no_grad()
    def make_clips(self, num_clips: int, num_frames: int, first: int, *, split: str = "train") -> Clips:
        """Scenes first, first + 1, ... of this run's seed, rendered and encoded."""
        scenes = sample_scenes(num_clips, self.config.seed, split, start=first, device=self.device)
        video, mask = render(scenes, num_frames, size=self.config.height, return_mask=True)
        video, mask, share = video.transpose(1, 2), mask.transpose(1, 2), self.config.tiny_vae.teacher_share
        latents = self.vae.encode(video.to(self.vae.latents_mean.dtype))
        if share:
            video = torch.lerp(video, self.vae.decode(latents).float().clamp(-1, 1), share)
        return Clips(latents.float(), video, mask)

    def prepare(self, rngs: SampleRngs) -> Clips:
        numbers = list(self.pool)
        return self.pool[numbers[mix_seed(self.config.seed, rngs.step, rngs.samples.start) % len(numbers)]]

    # --- a step ---

    def loss(self, clips: Clips, rngs: SampleRngs) -> tuple[Tensor, dict[str, Tensor]]:
        weights = self.config.vae
        terms = picture_losses(self.decode(clips.latents).float(), clips.target, clips.mask, weights.puppet_weight)
        total = (
            weights.l1_weight * terms["l1"]
            + weights.mse_weight * terms["mse"]
            + weights.gradient_weight * terms["gradient"]
        )
        return total, {name: term.detach() for name, term in terms.items()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, Tensor]:
        """PSNR on whole held-out videos: against the truth, beside the full decoder's; and of one against the other."""
        errors: dict[str, list[Tensor]] = {"": [], "full_": [], "to_full_": []}
        num_frames = 1 + self.vae.temporal_stride * (self.config.num_training_frames - 1)
        masks = []
        for number in range(self.config.data.num_eval_clips):
            scenes = sample_scenes(1, self.config.seed, "heldout", start=number, device=self.device)
            video, mask = render(scenes, num_frames, size=self.config.height, return_mask=True)
            video = video.transpose(1, 2)
            latents = self.vae.encode(video.to(self.vae.latents_mean.dtype))
            full = self.vae.decode(latents).float().clamp(-1, 1)
            with self.autocast():
                tiny = self.tiny.decode(latents.float()).float().clamp(-1, 1)
            for name, difference in (("", tiny - video), ("full_", full - video), ("to_full_", tiny - full)):
                errors[name].append(difference.square())
            masks.append(mask.transpose(1, 2))
        mask, metrics = torch.cat(masks), {}
        for name, parts in errors.items():
            error = torch.cat(parts)
            metrics[f"{name}psnr"] = psnr(error.mean())
            metrics[f"{name}psnr_puppet"] = psnr((error * mask).sum() / (mask.sum() * error.shape[1]))
        quarter = max(1, num_frames // 4)
        error = torch.cat(errors[""])
        return metrics | {
            "psnr_first_quarter": psnr(error[:, :, :quarter].mean()),
            "psnr_last_quarter": psnr(error[:, :, -quarter:].mean()),
        }

    def export(self, folder: Path) -> None:
        """`taew2_1.safetensors` in bfloat16 and its sizes as json: both go beside the VAE whose latents these are."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / TINY_VAE_FILES[-1]
        path.with_suffix(".json").write_text(json.dumps(self.sizes(), indent=2) + "\n")
        save_safetensors(self.tiny.state_dict(), path, torch.bfloat16)


@torch.no_grad()
def start_simple_(vae: TinyVAE) -> None:
    """Start as a plain upscaler that shows grey: residual blocks without norms would start with noise instead."""
    for block in memory_blocks(vae.decoder):
        block.conv[-1].weight.zero_()
        block.conv[-1].bias.zero_()
    vae.decoder[-1].weight.mul_(0.1)
    vae.decoder[-1].bias.fill_(0.5)
