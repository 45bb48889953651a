"""The Wan2.1 transformer. Attribute names are the published checkpoints' names: they are public API.

Shapes: B batch, F latent frames, C latent channels, H W latent size, S tokens per frame, L = F * S tokens, N heads,
D head size, T text tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType
from typing import NamedTuple, Self

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..configs import WanConfig, how_to_get
from . import fused
from .attention import Attend, attention, check_backend
from .cudnn_attention import HALF, HAS_TRITON, is_hopper
from .float8 import Float8Linear
from .fused import fuses
from .kv_cache import Keys, KVCache
from .rope import apply_rope, remember_rotated, rope_frequencies
from .sequence_parallel import Ulysses, check_heads
from .weights import load_weights, save_safetensors

MAX_GRAPHS = 64  # of one compiled function: networks and lengths of a clip, with and without gradient


def sinusoidal_embedding(t: Tensor, dim: int) -> Tensor:
    """[cos | sin] of t * 10000^(-k / (dim/2)), k = 0 .. dim/2 - 1: t [...] -> [..., dim] float32."""
    half = dim // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angles = t.double()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


class WanRMSNorm(nn.Module):
    """RMS norm over the full width, before the split into heads; statistics in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


class WanLayerNorm(nn.LayerNorm):
    """Layer norm computed in float32 whatever comes in; dtype kept."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift per frame: x [B, F*S, dim]; shift, scale [B, F, dim]. Float32 inside, dtype kept."""
    frames = x.unflatten(1, (shift.shape[1], -1)).float()
    return (frames * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)).flatten(1, 2).to(x.dtype)


def gated(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """x + update * gate per frame: x, update [B, F*S, dim]; gate [B, F, dim]. Float32 inside, dtype kept."""
    update = update.unflatten(1, (gate.shape[1], -1)).float() * gate.unsqueeze(2)
    return (x.float() + update.flatten(1, 2)).to(x.dtype)


class WanSelfAttention(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.qkv: tuple[Tensor, Tensor] | nn.Module | None = None  # q, k and v in one: see fuse_projections, and float8
        self.norm_q, self.norm_k = (WanRMSNorm(dim, config.eps) if config.qk_norm else nn.Identity() for _ in range(2))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, L, N, D]."""
        if self.qkv is None:
            q, k, v = self.q(x), self.k(x), self.v(x)
        else:
            return self.split(F.linear(x, *self.qkv) if isinstance(self.qkv, tuple) else self.qkv(x))
        return self.heads(self.norm_q(q)), self.heads(self.norm_k(k)), self.heads(v)

    def split(self, joined: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of a joined projection [B, L, 3 dim]."""
        q, k, v = joined.chunk(3, dim=-1)
        return self.heads(self.norm_q(q)), self.heads(self.norm_k(k)), self.heads(v)

    @torch.no_grad()
    def fuse_projections(self) -> None:
        """One product for q, k and v; their own weights become views of its matrix, so names and merging stay.

        What is written into them is seen (load_state_dict, a LoRA); what is assigned in their place is not.
        """
        if isinstance(self.qkv, nn.Module):  # in float8 they are one already
            return
        parts = (self.q, self.k, self.v)
        weight, bias = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
        for part, its_weight, its_bias in zip(parts, weight.chunk(3), bias.chunk(3), strict=True):
            part.weight = nn.Parameter(its_weight, requires_grad=part.weight.requires_grad)
            part.bias = nn.Parameter(its_bias, requires_grad=part.bias.requires_grad)
        self.qkv = weight, bias

    def _apply(self, fn, recurse: bool = True) -> Self:
        """Moved or cast, each weight has memory of its own again."""
        super()._apply(fn, recurse)
        if self.qkv is not None:
            self.fuse_projections()
        return self


class WanCrossAttention(WanSelfAttention):
    """Video looks at text, and at the image's CLIP tokens through keys and values of their own (model_type i2v)."""

    def __init__(self, config: WanConfig):
        super().__init__(config)
        if config.model_type == "i2v":
            self.k_img, self.v_img = nn.Linear(config.dim, config.dim), nn.Linear(config.dim, config.dim)
            self.norm_k_img = WanRMSNorm(config.dim, config.eps) if config.qk_norm else nn.Identity()

    def text_keys(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of text [B, T, dim] -> [B, T, N, D] each; padding rows are attended to, as in Wan."""
        return self.heads(self.norm_k(self.k(text))), self.heads(self.v(text))

    def image_keys(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.heads(self.norm_k_img(self.k_img(image))), self.heads(self.v_img(image))

    def prompt_keys(self, text: Tensor | None, image: Tensor | None) -> tuple[Keys | None, Keys | None]:
        """Keys and values of embedded text [B, T, dim] and CLIP tokens [B, 257, dim], of what is given."""
        return (
            None if text is None else self.text_keys(text),
            None if image is None else self.image_keys(image),
        )

    def forward(self, x: Tensor, text: Keys, image: Keys | None, backend: str) -> Tensor:
        return self.attend(self.q(x), text, image, backend)

    def attend(self, q: Tensor, text: Keys, image: Keys | None, backend: str) -> Tensor:
        """q [B, L, dim]: queries before their norm."""
        q = self.heads(self.norm_q(q))
        out = attention(q, *text, backend)
        if image is not None:
            out = out + attention(q, *image, backend)
        return self.o(out.flatten(2))


def linear_of(linear: nn.Module | tuple[Tensor, Tensor], normed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """A linear layer of what `fused.normalise` gave, [B, L, K] -> [B, L, N]."""
    if isinstance(linear, Float8Linear):
        return linear.multiply(normed.flatten(0, -2), scales).to(dtype).unflatten(0, normed.shape[:-1])
    return F.linear(normed, *linear) if isinstance(linear, tuple) else linear(normed)


class FeedForward(nn.Sequential):
    """Linear, GELU, linear."""

    def of_normed(self, normed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """`forward` of what `fused.normalise` gave."""
        first, _, last = self
        if not isinstance(last, Float8Linear):
            return last(fused.linear_gelu(normed, first.weight, first.bias))
        hidden, scales = fused.quantise(linear_of(first, normed, scales, dtype).flatten(0, -2), True)
        return linear_of(last, hidden.unflatten(0, normed.shape[:-1]), scales, dtype)


class WanAttentionBlock(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        self.norm1 = WanLayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.self_attn = WanSelfAttention(config)
        self.norm3 = WanLayerNorm(config.dim, config.eps) if config.cross_attn_norm else nn.Identity()
        self.cross_attn = WanCrossAttention(config)
        self.norm2 = WanLayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.ffn = FeedForward(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, config.dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)
        self.joins = False  # whether the first half ends with q, k and v in one: see finish_projection

    def prompt_keys(self, text: Tensor | None, image: Tensor | None) -> tuple[Keys | None, Keys | None]:
        """A door of its own, so that sharded weights are gathered for it as they are for `forward`."""
        return self.cross_attn.prompt_keys(text, image)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        layer: int,
        attend: Attend,
        text: Tensor | Keys,
        image: Tensor | Keys | None,
        backend: str,
        keys_only: bool = False,
    ) -> Tensor:
        """x [B, L, dim]; time [B, F, 6, dim] float32; text, image: embedded [B, T, dim], or this layer's keys of it.

        keys_only: leave keys and values in the cache that `attend` knows, and x as it is.
        """
        if hasattr(attend, "keep_joined") and self.joins_for(x):
            seen = attend.keep_joined(layer, self.joined_projection(x, time), self.self_attn)
            attended = None if keys_only else attention(*seen, backend)
        elif keys_only:
            attend.keep(layer, *self.before_attention(x, time))
        else:
            attended = attend(layer, *self.before_attention(x, time))
        if keys_only:
            return x
        return self.after_attention(x, time, attended, text, image, backend)

    def before_attention(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What every layer, pass and past has in common, and so one compiled graph; as `after_attention` is."""
        shift, scale = (self.modulation[:, :2].float() + time[:, :, :2]).unbind(2)
        return self.self_attn.project(modulate(self.norm1(x), shift, scale))

    def joins_for(self, x: Tensor) -> bool:
        """Whether a pass ends its first half with q, k and v in one."""
        return self.joins and x.is_cuda and x.dtype in HALF and not torch.is_grad_enabled()

    def joined_projection(self, x: Tensor, time: Tensor) -> Tensor:
        """`before_attention` without the norms of q and k, which `finish_projection` makes: [B, L, 3 dim]."""
        linear = self.self_attn.qkv
        _, normed, scales = self.normalise(x, None, self.norm1, time, -1, 0, linear)
        return linear_of(linear, normed, scales, x.dtype)

    def normalise(
        self,
        x: Tensor,
        update: Tensor | None,
        norm: WanLayerNorm,
        time: Tensor,
        gate: int,
        shift: int,
        linear: nn.Module | tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`fused.normalise` for a linear layer to come."""
        float8 = isinstance(linear, Float8Linear)
        return fused.normalise(x, update, norm.weight, norm.bias, time, self.modulation, gate, shift, norm.eps, float8)

    def fuses(self, x: Tensor) -> bool:
        """Whether `after_attention` is made of fused operations, which do not cast."""
        last = self.ffn[-1]
        casts = torch.is_autocast_enabled() or not (isinstance(last, Float8Linear) or last.weight.dtype == x.dtype)
        return fuses(x) and not casts and isinstance(self.norm3, WanLayerNorm)

    def after_attention(
        self,
        x: Tensor,
        time: Tensor,
        attended: Tensor,
        text: Tensor | Keys,
        image: Tensor | Keys | None,
        backend: str,
    ) -> Tensor:
        """attended [B, L, N, D]: what self-attention found."""
        if isinstance(text, Tensor):
            text, image = self.cross_attn.prompt_keys(text, image)
        if self.fuses(x):
            cross_q, ffn = self.cross_attn.q, self.ffn
            update = self.self_attn.o(attended.flatten(2))
            x, normed, scales = self.normalise(x, update, self.norm3, time, 2, -1, cross_q)
            update = self.cross_attn.attend(linear_of(cross_q, normed, scales, x.dtype), text, image, backend)
            x, normed, scales = self.normalise(x, update, self.norm2, time, -1, 3, ffn[0])
            return gated(x, ffn.of_normed(normed, scales, x.dtype), self.modulation[:, 5].float() + time[:, :, 5])
        gate1, shift2, scale2, gate2 = (self.modulation[:, 2:].float() + time[:, :, 2:]).unbind(2)
        x = gated(x, self.self_attn.o(attended.flatten(2)), gate1)
        x = x + self.cross_attn(self.norm3(x), text, image, backend)
        return gated(x, self.ffn(modulate(self.norm2(x), shift2, scale2)), gate2)


class Head(nn.Module):
    """Tokens -> patches of the flow."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.norm = WanLayerNorm(config.dim, config.eps, elementwise_affine=False)
        patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.head = nn.Linear(config.dim, patch * config.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.modulation.float() + time.unsqueeze(2)).unbind(2)
        return self.head(modulate(self.norm(x), shift, scale))


class ImageEmbedding(nn.Module):
    """CLIP tokens [B, 257, clip_dim] -> [B, 257, dim]."""

    def __init__(self, clip_dim: int, dim: int):
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(clip_dim),
            nn.Linear(clip_dim, clip_dim),
            nn.GELU(),
            nn.Linear(clip_dim, dim),
            nn.LayerNorm(dim),
        )

    def forward(self, clip_fea: Tensor) -> Tensor:
        return self.proj(clip_fea)


class Features(NamedTuple):
    """What a network thinks of a clip on the way to its flow, for a head that judges (wan.modules.discriminator)."""

    tokens: list[Tensor]  # [B, L, dim] after every tapped block
    time: Tensor  # [B, F, dim] time embedding, float32


@dataclass(eq=False)
class Shortcut:
    """What all blocks together added to the tokens of a pass; with `reuse` the next pass adds it, without blocks."""

    reuse: bool = False
    added: Tensor | None = None  # [B, L, dim]; of this rank's tokens where a pass is shared


class WanModel(nn.Module):
    """Bidirectional Wan2.1 transformer (arXiv 2503.20314): predicts the flow eps - x0 of a noisy latent clip.

    `gradient_checkpointing` recomputes each block in the backward pass; gradients are unchanged.
    """

    def __init__(self, config: WanConfig, *, attention_backend: str = "auto"):
        super().__init__()
        check_backend(attention_backend)
        self.config = config
        self.attention_backend = attention_backend
        self.gradient_checkpointing = False
        self.rotate, self.remember = apply_rope, remember_rotated  # compile_blocks compiles them too
        self.compute_device: torch.device | None = None  # set where weights compute elsewhere than they lie (sharding)
        self.compute_dtype: torch.dtype | None = None
        self.sequence_parallel: Ulysses | None = None
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, stride=config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(WanAttentionBlock(config) for _ in range(config.num_layers))
        self.head = Head(config)
        if config.model_type == "i2v":
            self.img_emb = ImageEmbedding(config.clip_dim, dim)
        if config.pose_dim:
            self.pose_proj = nn.Identity() if config.pose_dim == dim else nn.Linear(config.pose_dim, dim)
        self.init_weights()

    def init_weights(self) -> None:
        """Xavier for linear layers, N(0, .02) for text and time, zero for head and pose: a new model predicts 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        nn.init.zeros_(self.patch_embedding.bias)
        for module in (*self.text_embedding, *self.time_embedding):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)
        if isinstance(getattr(self, "pose_proj", None), nn.Linear):
            nn.init.zeros_(self.pose_proj.weight)

    @property
    def device(self) -> torch.device:
        return self.compute_device or self.patch_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.compute_dtype or self.patch_embedding.weight.dtype

    def share_passes(self, ulysses: Ulysses | None) -> None:
        """From now on passes are made together with other ranks, which hold the same weights and are given the same;
        each returns the whole flow. None: alone again. KV caches made before do not fit any more.
        """
        if ulysses is not None:
            check_heads(self.config.num_heads, ulysses.size)
        self.sequence_parallel = ulysses

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        clip_fea: Tensor | None = None,
        y: Tensor | None = None,
        *,
        add_condition: Tensor | None = None,
        taps: Sequence[int] = (),
        shortcut: Shortcut | None = None,
    ) -> Tensor | tuple[Tensor, Features]:
        """Flow of a whole clip; every token sees every token.

        x [B, C, F, H, W]; t [B] or [B, F] in [0, 1000]; context [B, <=T, text_dim] (padded with zeros to text_len,
        padding is attended to); clip_fea [B, 257, clip_dim] and y [B, in_dim - C, F, H, W] for i2v; add_condition [B,
        L, pose_dim]. Returns [B, out_dim, F, H, W]; with taps (blocks, counted from 0) also the features after them.
        shortcut: filled, or used in place of the blocks.
        """
        tokens, grid = self.embed(x, y, add_condition)
        rope = rope_frequencies(self.config.head_dim, range(grid[0]), *grid[1:], device=x.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(self.rotate(q, rope), self.rotate(k, rope), v, self.attention_backend)

        return self.run(
            tokens, self.frame_times(t, grid[0]), context, clip_fea, attend, grid, taps=taps, shortcut=shortcut
        )

    def embed(self, x: Tensor, y: Tensor | None, add_condition: Tensor | None) -> tuple[Tensor, tuple[int, int, int]]:
        """Patches as tokens [B, L, dim], and their grid (F, rows, columns)."""
        channels = x.shape[1] + (0 if y is None else y.shape[1])
        if channels != self.config.in_dim:
            expected = self.config.in_dim - self.config.out_dim
            remedy = (
                f"this model needs y with {expected} channels (4 mask + image latent); use a t2v model without an image"
                if expected
                else "this model takes no y; give the image as initial_latent, or use an i2v model"
            )
            raise ValueError(f"{channels} input channels came, the model takes {self.config.in_dim}: {remedy}")
        if y is not None:
            x = torch.cat([x, y.to(x.dtype)], dim=1)
        self.config.tokens_per_frame(*x.shape[-2:])  # a size that does not split into patches is refused with a remedy
        patches = self.patch_embedding(x.to(self.dtype))
        tokens = patches.flatten(2).transpose(1, 2).contiguous()  # as after every block, for which code is compiled
        if add_condition is not None:
            tokens = tokens + self.embed_pose(add_condition, tokens.shape[1])
        return tokens, tuple(patches.shape[2:])

    def embed_pose(self, add_condition: Tensor, num_tokens: int) -> Tensor:
        """Pose tokens [B, L, pose_dim] -> [B, L, dim]; those of width dim have been projected already.

        A token of zeros is how training says "no pose": it stays zero, as if none had come.
        """
        if not self.config.pose_dim:
            raise ValueError(
                "this model takes no add_condition (pose_dim is 0 in its config.json); load pose weights first"
            )
        widths = (self.config.pose_dim, self.config.dim)
        if add_condition.shape[1] != num_tokens or add_condition.shape[2] not in widths:
            raise ValueError(
                f"add_condition has {tuple(add_condition.shape[1:])} (tokens, width), the video has "
                f"{(num_tokens, self.config.pose_dim)}; give one pose token per video token"
            )
        add_condition = add_condition.to(self.dtype)
        if add_condition.shape[2] != self.config.pose_dim or isinstance(self.pose_proj, nn.Identity):
            return add_condition
        return self.pose_proj(add_condition) * (add_condition != 0).any(-1, keepdim=True)

    def add_pose_proj(self, pose_dim: int) -> None:
        """Let a model that was made without pose take tokens of this width.

        pose_proj is Identity where they are as wide as the model's own (14B), else a Linear that begins at zero: until
        it is trained, pose changes nothing.
        """
        if self.config.pose_dim:
            if self.config.pose_dim != pose_dim:
                raise ValueError(f"pose tokens of width {pose_dim} came, this model takes {self.config.pose_dim}")
            return
        self.config = replace(self.config, pose_dim=pose_dim)
        self.pose_proj = nn.Identity()
        if pose_dim != self.config.dim:
            self.pose_proj = nn.Linear(pose_dim, self.config.dim, device=self.device, dtype=self.dtype)
            nn.init.zeros_(self.pose_proj.weight)
            nn.init.zeros_(self.pose_proj.bias)
            self.pose_proj.train(self.training).requires_grad_(self.patch_embedding.weight.requires_grad)

    def frame_times(self, t: Tensor, num_frames: int) -> Tensor:
        """t [B] or [B, F] -> [B, F]."""
        return t[:, None].expand(-1, num_frames) if t.dim() == 1 else t

    def embed_time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t [B, F] -> (embedding [B, F, dim] for the head, modulation [B, F, 6, dim] for the blocks), float32."""
        embedding = self.time_embedding(sinusoidal_embedding(t, self.config.freq_dim).to(self.dtype))
        return embedding.float(), self.time_projection(embedding).unflatten(-1, (6, -1)).float()

    def embed_text(self, context: Tensor) -> Tensor:
        """[B, <=T, text_dim] -> [B, T, dim]; zero rows fill up to text_len and are attended to, as Wan was trained."""
        length = context.shape[1]
        if length > self.config.text_len or context.shape[2] != self.config.text_dim:
            raise ValueError(
                f"prompt embeddings {tuple(context.shape[1:])} do not fit a model with at most {self.config.text_len} "
                f"text tokens of width {self.config.text_dim}; use the text encoder of the same model folder"
            )
        return self.text_embedding(F.pad(context.to(self.dtype), (0, 0, 0, self.config.text_len - length)))

    def run(
        self,
        tokens: Tensor,
        t: Tensor,
        context: Tensor,
        clip_fea: Tensor | None,
        attend: Attend,
        grid: tuple[int, int, int],
        kv_cache: KVCache | None = None,
        num_head_frames: int | None = None,
        taps: Sequence[int] = (),
        shortcut: Shortcut | None = None,
        keys_only: bool = False,
    ) -> Tensor | tuple[Tensor, Features]:
        """All blocks and the head on embedded tokens [B, L, dim]; t [B, frames of the token sequence].

        kv_cache: where the prompt's keys are remembered (wan.modules.kv_cache.KVCache), without gradient only.
        keys_only: only what the cache keeps is wanted; the last block may stop at its keys, and the flow is then none.
        num_head_frames: only the last so many frames go through the head (teacher forcing: the noisy half).
        """
        ulysses, num_frames, frame_seqlen = self.sequence_parallel, t.shape[1], grid[1] * grid[2]
        if ulysses is not None:
            if taps:
                raise ValueError("a model that shares its passes (sequence_parallel) has no whole features to tap")
            tokens = ulysses.split(tokens, num_frames)
            attend = ulysses.around(attend, num_frames, frame_seqlen)
        time, modulation = self.embed_time(t)
        tapped: list[Tensor] = []
        if shortcut is not None and shortcut.reuse:
            tokens = tokens + shortcut.added
        else:
            before = None if shortcut is None else tokens
            keys_only = keys_only and hasattr(attend, "keep")
            tokens = self.run_blocks(tokens, modulation, context, clip_fea, attend, kv_cache, taps, tapped, keys_only)
            if shortcut is not None:
                shortcut.added = tokens - before
        frames = num_head_frames or grid[0]
        num_tokens = frames * (tokens.shape[1] // num_frames)
        patches = self.head(tokens[:, -num_tokens:], time[:, -frames:])
        if ulysses is not None:
            patches = ulysses.gather(patches, frames, frame_seqlen)
        flow = self.unpatchify(patches, (frames, *grid[1:]))
        return (flow, Features(tapped, time)) if taps else flow

    def run_blocks(
        self,
        tokens: Tensor,
        modulation: Tensor,
        context: Tensor,
        clip_fea: Tensor | None,
        attend: Attend,
        kv_cache: KVCache | None,
        taps: Sequence[int],
        tapped: list[Tensor],
        keys_only: bool = False,
    ) -> Tensor:
        """Tokens [B, L, dim] after all blocks; those after every tapped one are appended to `tapped`."""
        remember = kv_cache if not torch.is_grad_enabled() else None
        text, image = self.embed_prompt(context, clip_fea, remember)
        for layer, block in enumerate(self.blocks):
            prompt = (text, image) if remember is None else remembered_keys(block, layer, text, image, remember)
            arguments = (tokens, modulation, layer, attend, *prompt, self.attention_backend)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, *arguments, use_reentrant=False)
            else:
                tokens = block(*arguments, keys_only=keys_only and layer == len(self.blocks) - 1)
            tapped += [tokens] * taps.count(layer)
        return tokens

    def embed_prompt(
        self, context: Tensor, clip_fea: Tensor | None, remembered: KVCache | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Prompt and image [B, T, dim], each None where the cache has its keys already."""
        text = image = None
        if remembered is None or remembered.text[0] is None:
            text = self.embed_text(context)
        if self.config.model_type == "i2v" and (remembered is None or remembered.image[0] is None):
            if clip_fea is None:
                raise ValueError("an i2v model needs clip_fea [B, 257, clip_dim], the tokens of CLIPModel")
            image = self.img_emb(clip_fea.to(self.dtype))
        return text, image

    @torch.no_grad()
    def read_prompt(self, context: Tensor, clip_fea: Tensor | None, kv_cache: KVCache) -> None:
        """Put the keys of prompt and image of all layers into the cache, where they are missing."""
        text, image = self.embed_prompt(context, clip_fea, kv_cache)
        if text is None and image is None:
            return
        for layer, block in enumerate(self.blocks):
            remembered_keys(block, layer, text, image, kv_cache)

    def unpatchify(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, F*h*w, prod(patch) * C] -> [B, C, F*pf, h*ph, w*pw]; in a patch the channel varies fastest."""
        (f, h, w), (pf, ph, pw) = grid, self.config.patch_size
        video = patches.reshape(len(patches), f, h, w, pf, ph, pw, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return video.reshape(len(patches), -1, f * pf, h * ph, w * pw)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, **kwargs
    ) -> Self:
        """Load `config.json` and `diffusion_pytorch_model*.safetensors` straight to `device` in `dtype` (None: as
        stored).

        kwargs go to the constructor. Raises FileNotFoundError or ValueError saying what is missing or does not fit.
        """
        with torch.device("meta"):
            model = cls(WanConfig.from_folder(folder), **kwargs)
        files = sorted(Path(folder).glob("diffusion_pytorch_model*.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"{folder} holds no diffusion_pytorch_model*.safetensors; {how_to_get(Path(folder))}"
            )
        load_weights(model, files, device=device, dtype=dtype)
        return model.eval()

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype | None = None, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write `config.json` and `diffusion_pytorch_model.safetensors` in the published layout.

        weights: the state dict to write instead of the model's own, e.g. gathered from where it is sharded.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(self.config.to_json(), encoding="utf-8")
        weights = self.state_dict() if weights is None else weights
        save_safetensors(weights, folder / "diffusion_pytorch_model.safetensors", dtype)

    def fuse_projections(self) -> None:
        """Queries, keys and values of self-attention as one product in every block; state dicts keep names."""
        for block in self.blocks:
            block.self_attn.fuse_projections()

    def compile_blocks(self, **kwargs) -> None:
        """Compile what blocks do before and after self-attention; kwargs go to torch.compile. State dicts keep names.

        One pair of graphs serves all layers. Self-attention stays out of it: a layer's number, its place in a cache and
        the length of the past would each make a graph of their own. So do hooks around a block, such as those that
        gather sharded weights. Every shape has its graph, none grows dynamic: a checkpointed block that is recomputed
        must find the graph that it first ran.
        """
        allow_graphs()
        options = {"dynamic": False, **kwargs}
        for half in ("before_attention", "joined_projection", "after_attention"):
            compiled = torch.compile(getattr(WanAttentionBlock, half), **options)
            for block in self.blocks:
                setattr(block, half, MethodType(compiled, block))
        for block in self.blocks:
            block.joins = self.config.qk_norm and block.self_attn.qkv is not None and HAS_TRITON
        self.rotate, self.remember = (torch.compile(part, **options) for part in (apply_rope, remember_rotated))
        is_hopper(self.device)  # what torch.compile would ask about in vain


def allow_graphs() -> None:
    """Let torch.compile keep MAX_GRAPHS of a function; past its own limit of 8 it would run the function eagerly."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)


def remembered_keys(
    block: WanAttentionBlock, layer: int, text: Tensor | None, image: Tensor | None, kv_cache: KVCache
) -> tuple[Keys, Keys | None]:
    """The keys of prompt and image of one layer out of the cache; what was embedded anew is put there first."""
    if text is not None or image is not None:
        text_keys, image_keys = block.prompt_keys(text, image)
        if text_keys is not None:
            kv_cache.remember_text(layer, text_keys)
        if image_keys is not None:
            kv_cache.remember_image(layer, image_keys)
    return kv_cache.text[layer], kv_cache.image[layer]
