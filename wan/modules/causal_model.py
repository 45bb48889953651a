"""Causality on top of Wan: masks for whole clips, a KV cache for streams, teacher forcing, pose tokens."""

import torch
from torch import Tensor

from ..configs import WanConfig
from .attention import Attend, attention, masked_attention
from .kv_cache import KVCache, KVContext
from .masks import BlockCausalMask, check_window
from .model import Shortcut, WanModel, WanSelfAttention
from .rope import Rope, rope_frequencies

ROPE_BASES = ("absolute", "window")


class AttendCached:
    """Self-attention (`Attend`) of a block and its past, rotated keys in a cache, where the block's own go, too."""

    def __init__(self, model: "CausalWanModel", past: KVContext, rope: Rope):
        self.model, self.past, self.rope = model, past, rope

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(*self.keep(layer, q, k, v), self.model.attention_backend)

    def keep(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add the block's keys and values to the cache; (queries, keys, values) that are to meet."""
        model, places = self.model, self.past.places(layer, k.shape[0])
        if places is None:
            keys, values = self.past.extend(layer, model.rotate(k, self.rope), v)
        else:
            own, (keys, values) = places
            model.remember(*own, k, v, self.rope)
        return model.rotate(q, self.rope), keys, values

    def keep_joined(self, layer: int, projection: Tensor, self_attn: WanSelfAttention) -> tuple[Tensor, Tensor, Tensor]:
        """The same on a GPU, of q, k and v in one [B, L, 3 N D], before their norms."""
        places = self.past.places(layer, projection.shape[0])
        if places is None:
            return self.keep(layer, *self_attn.split(projection))
        from .triton_blocks import finish_projection

        own, (keys, values) = places
        norm_q, norm_k = self_attn.norm_q, self_attn.norm_k
        q = finish_projection(projection, norm_q.weight, norm_k.weight, norm_q.eps, self.rope, *own)
        return q, keys, values


class CausalWanModel(WanModel):
    """Block-causal Wan transformer: the same weights as WanModel, three ways of looking at the past.

    - whole clip: `forward(x, t, context)` under a BlockCausalMask (diffusion forcing, ODE regression);
    - teacher forcing: `forward(x, t, context, clean_x=...)`, each noisy block looks at the clean blocks before it;
    - stream: `forward(x, t, context, kv_cache=...)`, one block looks at committed frames.

    num_frame_per_block: latent frames denoised together. local_attn_size: latent frames that a block sees, itself and
    the sink included (-1: all). sink_size: leading frames that never leave the window. independent_first_frame: frame 0
    is a block of its own. rope_base: "absolute" frame positions, or "window": positions counted from the window's first
    frame, so that the distance to the sink stays within what was trained (streams only; keys are then cached
    unrotated).
    """

    def __init__(
        self,
        config: WanConfig,
        *,
        num_frame_per_block: int = 3,
        local_attn_size: int = -1,
        sink_size: int = 0,
        independent_first_frame: bool = False,
        rope_base: str = "absolute",
        attention_backend: str = "auto",
    ):
        check_window(local_attn_size, sink_size, num_frame_per_block)
        if rope_base not in ROPE_BASES:
            raise ValueError(f"rope_base {rope_base!r} is unknown; use one of {', '.join(ROPE_BASES)}")
        super().__init__(config, attention_backend=attention_backend)
        self.num_frame_per_block = num_frame_per_block
        self.local_attn_size = local_attn_size
        self.sink_size = sink_size
        self.independent_first_frame = independent_first_frame
        self.rope_base = rope_base

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        clip_fea: Tensor | None = None,
        y: Tensor | None = None,
        *,
        kv_cache: KVCache | None = None,
        clean_x: Tensor | None = None,
        aug_t: Tensor | None = None,
        add_condition: Tensor | None = None,
        image_first: bool = False,
        shortcut: Shortcut | None = None,
        keys_only: bool = False,
    ) -> Tensor:
        """Flow [B, out_dim, F, H, W] of noisy latents x [B, C, F, H, W] at times t [B, F] in [0, 1000].

        kv_cache: x is the next block(s) of a stream. Without gradient the block's keys are written into their slots;
        the caller commits. clean_x [B, C, F, H, W]: clean latents for teacher forcing, at times aug_t [B, F] (default
        0). image_first (whole clips): frame 0 is a given image, a block of its own that never leaves the window.
        keys_only (streams): the block is to be remembered, no more; what is returned means nothing. The other
        arguments are WanModel.forward's.
        """
        if shortcut is not None and kv_cache is None:
            raise ValueError("a shortcut belongs to the steps of a stream's block; give kv_cache, too")
        if kv_cache is not None and clean_x is not None:
            raise ValueError("kv_cache and clean_x exclude each other: a stream's past is in the cache")
        tokens, grid = self.embed(x, y, add_condition)
        t = self.frame_times(t, grid[0])
        if kv_cache is not None:
            past = kv_cache.context(grid[0])
            attend = self.attend_cached(past, self.stream_rope(past, *grid[1:]))
            return self.run(
                tokens, t, context, clip_fea, attend, grid, kv_cache, shortcut=shortcut, keys_only=keys_only
            )
        if clean_x is not None:
            clean_tokens, _ = self.embed(clean_x, y, add_condition)
            tokens = torch.cat([clean_tokens, tokens], dim=1)
            t = torch.cat([torch.zeros_like(t) if aug_t is None else aug_t.to(t.dtype), t], dim=1)
        attend = self._attend_masked(grid, clean_x is not None, x.device, image_first)
        return self.run(tokens, t, context, clip_fea, attend, grid, num_head_frames=grid[0])

    def _attend_masked(
        self, grid: tuple[int, int, int], teacher_forcing: bool, device: torch.device, image_first: bool
    ) -> Attend:
        sink_size = max(self.sink_size, 1) if image_first else self.sink_size
        if self.rope_base == "window" and sink_size and self.local_attn_size != -1:
            raise ValueError(
                "rope_base 'window' moves the sink's position from block to block, which one masked pass cannot do; "
                "train with rope_base=absolute, with sink_size=0, or through the cached rollout"
            )
        mask = BlockCausalMask(
            num_frames=grid[0],
            frame_seqlen=grid[1] * grid[2],
            num_frame_per_block=self.num_frame_per_block,
            local_attn_size=self.local_attn_size,
            sink_size=sink_size,
            independent_first_frame=self.independent_first_frame or image_first,
            teacher_forcing=teacher_forcing,
        ).prepare(device)
        frames = [*range(grid[0])] * (2 if teacher_forcing else 1)  # clean and noisy halves share their positions
        rope = rope_frequencies(self.config.head_dim, frames, *grid[1:], device=device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return masked_attention(self.rotate(q, rope), self.rotate(k, rope), v, mask, self.attention_backend)

        return attend

    def stream_rope(self, past: KVContext, height: int, width: int) -> tuple[Rope, Rope]:
        """Rotations of a block's own tokens, and of the keys that `attend_cached` finds in the slab.

        The second is that of the block's own keys, too, where keys are remembered rotated (rope_base "absolute").
        height, width: in tokens.
        """
        frames, size = range(past.start_frame, past.stop_frame), (height, width, self.device)
        if self.rope_base == "absolute":
            own = rope_frequencies(self.config.head_dim, frames, *size)
            return own, own
        # Window-relative: the i-th oldest visible frame stands at position i. Keys lie in the slab as they came.
        position = {frame: i for i, frame in enumerate(sorted(past.frames))}
        own = rope_frequencies(self.config.head_dim, [position[f] for f in frames], *size)
        return own, rope_frequencies(self.config.head_dim, [position[f] for f in past.frames], *size)

    def attend_cached(self, past: KVContext, rope: tuple[Rope, Rope]) -> Attend:
        """Self-attention of a block and its past; the block's keys are written on the way. rope: stream_rope's."""
        if self.rope_base == "absolute":
            return AttendCached(self, past, rope[0])
        own_rope, slab_rope = rope

        def attend_in_window(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = past.extend(layer, k, v)
            q, keys = self.rotate(q, own_rope), self.rotate(keys, slab_rope)
            return attention(q, keys, values, self.attention_backend)

        return attend_in_window

    def cache_capacity(self, num_frames: int | None, *, keep_all: bool = False) -> int:
        """Latent frames that a cache holds for a video of num_frames (None: without end)."""
        if num_frames is None and (self.local_attn_size == -1 or keep_all):
            raise ValueError(
                "a cache that keeps the whole past needs num_frames; set local_attn_size to stream without end"
            )
        if self.local_attn_size == -1 or keep_all:
            return num_frames
        return self.local_attn_size if num_frames is None else min(self.local_attn_size, num_frames)

    def kv_cache_bytes(self, batch_size: int, height: int, width: int, num_frames: int) -> int:
        """Bytes of a cache of so many frames, in the model's dtype."""
        tokens = batch_size * num_frames * self.config.tokens_per_frame(height, width)
        width = self.num_cached_heads * self.config.head_dim
        return 2 * self.config.num_layers * tokens * width * self.dtype.itemsize

    @property
    def num_cached_heads(self) -> int:
        """Heads whose keys this rank keeps: all, or its own of a model that shares its passes."""
        return self.config.num_heads // (1 if self.sequence_parallel is None else self.sequence_parallel.size)

    def make_kv_cache(
        self,
        batch_size: int,
        height: int,
        width: int,
        num_frames: int | None = None,
        *,
        keep_all: bool = False,
        keeps_last_pass: bool = False,
        dtype: torch.dtype | None = None,
    ) -> KVCache:
        """Empty cache for latents of `height` x `width` cells on the model's device, by default in its dtype.

        num_frames: latent frames of the whole video; needed without a window, an upper bound with one. keep_all: never
        overwrite (a training rollout whose checkpointed blocks are recomputed). keeps_last_pass: KVCache's.

        Memory: 2 * num_layers * frames * tokens per frame * dim * bytes per number, e.g. 6.0 GB for 1.3B, bf16, 21
        frames of 60x104; of a model that shares its passes, its share.
        """
        capacity = self.cache_capacity(num_frames, keep_all=keep_all)
        frame_seqlen = self.config.tokens_per_frame(height, width)
        shape = (batch_size, capacity * frame_seqlen, self.num_cached_heads, self.config.head_dim)

        def slab() -> Tensor:
            return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

        return KVCache(
            keeps_last_pass=keeps_last_pass,
            keys=[slab() for _ in self.blocks],
            values=[slab() for _ in self.blocks],
            frame_seqlen=frame_seqlen,
            num_frame_per_block=self.num_frame_per_block,
            local_attn_size=self.local_attn_size,
            sink_size=self.sink_size,
        )
