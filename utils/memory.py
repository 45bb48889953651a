"""What inference will take, before it takes it."""

import os
from dataclasses import dataclass

import torch
from torch import nn

from wan.configs import WanConfig
from wan.modules.causal_model import CausalWanModel


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one inference run: parts that stay, and what each phase needs on top while it runs."""

    resident: dict[str, int]
    phases: dict[str, int]

    @property
    def peak(self) -> int:
        return sum(self.resident.values()) + max(self.phases.values(), default=0)

    def __str__(self) -> str:
        """transformer 2.8 GB, KV cache 6.0 GB, VAE 0.3 GB; while decoding 5.9 GB: peak 15.0 GB"""
        parts = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in self.resident.items())
        phase = max(self.phases, key=self.phases.get)
        return f"{parts}; while {phase} {self.phases[phase] / 1e9:.2f} GB: peak {self.peak / 1e9:.2f} GB"

    def check(self, device: torch.device) -> None:
        """Raise MemoryError with the way out when the peak is more than a GPU has free, or more than a machine has."""
        free = available(device)
        if free is not None and device.type == "cuda":
            free += torch.cuda.memory_allocated(device)  # what the plan counts, too
        if free is not None and self.peak > free:
            there = "free on" if device.type == "cuda" else "in all on"
            raise MemoryError(
                f"about {self.peak / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are {there} {device} ({self}); "
                "use a smaller height and width, or a window (model_kwargs.local_attn_size)"
            )


def plan_inference(
    config: WanConfig,
    *,
    height: int,
    width: int,
    num_frames: int | None,
    dtype: torch.dtype = torch.bfloat16,
    batch_size: int = 1,
    num_paths: int = 1,
    local_attn_size: int = -1,
    num_frame_per_block: int = 3,
    num_ranks: int = 1,
    text_encoder: nn.Module | None = None,
    offload_text_encoder: bool = False,
    clip: nn.Module | None = None,
    vae: nn.Module | None = None,
    vae_dim: int = 96,
    vae_patch_size: int = 1,
    latents_per_chunk: int = 4,
) -> MemoryPlan:
    """Memory of block-wise generation; exact for weights and caches, within about a third for what a pass holds.

    height, width: pixels. num_frames: latents of the whole video, None without end (needs a window). num_paths: 2 with
    guidance. num_ranks: those that share its tokens and heads. text_encoder, clip, vae: the modules, on any device,
    meta included.

    Decoding a chunk holds about six feature maps of `vae_dim` channels at full size.
    """
    frames = num_frames if local_attn_size == -1 else min(local_attn_size, num_frames or local_attn_size)
    if frames is None:
        raise ValueError("a video without end needs a window; set model_kwargs.local_attn_size, e.g. to 15")
    tokens_per_frame = config.tokens_per_frame(height // 8, width // 8)
    number, width = dtype.itemsize, config.dim // num_ranks
    with torch.device("meta"):
        transformer = CausalWanModel(config)
    resident = {
        "transformer": module_bytes(transformer, dtype),
        "KV cache": num_paths * 2 * config.num_layers * batch_size * frames * tokens_per_frame * width * number,
    }
    if clip is not None:
        resident["CLIP"] = module_bytes(clip, dtype)
    if vae is not None:
        resident["VAE"] = module_bytes(vae, dtype)
    tokens = batch_size * min(num_frame_per_block, frames) * tokens_per_frame
    chunk_pixels = batch_size * 4 * min(latents_per_chunk, num_frame_per_block) * height * width
    phases = {
        "denoising": pass_bytes(config, -(-tokens // num_ranks), dtype),
        "decoding": 6 * chunk_pixels * vae_dim * number // vae_patch_size**2,
    }
    if text_encoder is not None and offload_text_encoder:
        phases["reading the prompt"] = module_bytes(text_encoder, dtype)
    elif text_encoder is not None:
        resident["text encoder"] = module_bytes(text_encoder, dtype)
    return MemoryPlan(resident, phases)


def pass_bytes(config: WanConfig, num_tokens: int, dtype: torch.dtype) -> int:
    """What a pass without gradient holds for so many tokens, weights and cache apart.

    Per token two float32 and six rows of the model's width in dtype, and the feed-forward's hidden row twice.
    """
    return num_tokens * (config.dim * (2 * 4 + 6 * dtype.itemsize) + 2 * config.ffn_dim * dtype.itemsize)


def available(device: torch.device) -> int | None:
    """Bytes that can still be had on a GPU, torch's own reserve included; all that a CPU's machine has; else None."""
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def module_bytes(module: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Bytes of a module's parameters and buffers, as they are or as they would be in `dtype`."""
    tensors = (*module.parameters(), *module.buffers())
    return sum(t.numel() * (t.element_size() if dtype is None else dtype.itemsize) for t in tensors)
