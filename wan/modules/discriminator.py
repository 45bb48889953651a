"""The GAN's judge: a few learned tokens ask a score network's features whether a clip is real."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn as nn
from torch import Tensor

from ..configs import WanConfig
from .model import Features, WanCrossAttention, WanLayerNorm, WanRMSNorm

# A network is tapped after these shares of its depth: after blocks 13, 21 and 29 of 30, counted from 0, as published.
TAP_DEPTHS = (14 / 30, 22 / 30, 1.0)
TIME_SCALE = 10.0  # of the time embedding when it stands beside the tokens


def tap_layers(num_layers: int, depths: Sequence[float] = TAP_DEPTHS) -> tuple[int, ...]:
    """Blocks to tap, counted from 0: (13, 21, 29) of 30, (4, 6, 9) of 10."""
    return tuple(max(1, round(depth * num_layers)) - 1 for depth in depths)


class RegisterTokens(nn.Module):
    """Learned queries [num_registers, dim], one per tap, brought to unit RMS."""

    def __init__(self, num_registers: int, dim: int, eps: float):
        super().__init__()
        self.register_tokens = nn.Parameter(torch.randn(num_registers, dim) * 0.02)
        self.rms_norm = WanRMSNorm(dim, eps)

    def forward(self) -> Tensor:
        return self.rms_norm(self.register_tokens)


class GanAttentionBlock(nn.Module):
    """A query looks at all tokens of a clip: q + attention(q, LN(tokens)), then q + FFN(LN(q))."""

    def __init__(self, config: WanConfig, ffn_dim: int):
        super().__init__()
        self.norm3 = WanLayerNorm(config.dim, config.eps)  # of the tokens: the published name
        self.cross_attn = WanCrossAttention(config)
        self.norm2 = WanLayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, config.dim)
        )

    def forward(self, query: Tensor, tokens: Tensor, backend: str) -> Tensor:
        """query [B, 1, dim], tokens [B, L, dim] -> [B, 1, dim]."""
        keys, _ = self.cross_attn.prompt_keys(self.norm3(tokens), None)
        query = query + self.cross_attn(query, keys, None, backend)
        return query + self.ffn(self.norm2(query))


class DiscriminatorHead(nn.Module):
    """Features of a score network -> logits, high where a clip looks real (the GAN of Self-Forcing, arXiv 2506.08009).

        block 13 -> tokens -> register 0 looks --.
        block 21 -> tokens -> register 1 looks ---+--> [r0 | r1 | r2 (| time)] -> norm -> linear -> SiLU -> logits
        block 29 -> tokens -> register 2 looks --'

    Names are those of the published branch. ffn_dim None: 16/3 of the width in steps of 64, 8192 for 1536 as published.
    concat_time_embeddings: the head is told the noise level beside what the registers saw.
    """

    def __init__(
        self,
        config: WanConfig,
        *,
        num_taps: int = len(TAP_DEPTHS),
        num_class: int = 1,
        ffn_dim: int | None = None,
        concat_time_embeddings: bool = False,
        attention_backend: str = "auto",
    ):
        super().__init__()
        config = replace(config, model_type="t2v")  # whatever the network is, its registers look at tokens only
        self.attention_backend = attention_backend
        self.concat_time_embeddings = concat_time_embeddings
        width = config.dim * (num_taps + concat_time_embeddings)
        ffn_dim = ffn_dim or max(64, round(config.dim * 16 / 3 / 64) * 64)
        self._register_tokens = RegisterTokens(num_taps, config.dim, config.eps)
        self._gan_ca_blocks = nn.ModuleList(GanAttentionBlock(config, ffn_dim) for _ in range(num_taps))
        self._cls_pred_branch = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, config.dim), nn.SiLU(), nn.Linear(config.dim, num_class)
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Xavier for linear layers, zero for the last: a new judge is undecided."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self._cls_pred_branch[-1].weight)

    def forward(self, features: Features) -> Tensor:
        """Features of one time per clip -> logits [B, num_class], float32."""
        registers = self._register_tokens()
        seen = []
        for register, block, tokens in zip(registers, self._gan_ca_blocks, features.tokens, strict=True):
            query = register.expand(len(tokens), 1, -1).to(tokens.dtype)
            seen.append(block(query, tokens, self.attention_backend)[:, 0])
        if self.concat_time_embeddings:
            seen.append(TIME_SCALE * features.time[:, 0].to(seen[0].dtype))
        return self._cls_pred_branch(torch.cat(seen, dim=1)).float()
