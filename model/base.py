"""What every objective shares: the batch, the player, and one timestep per block."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from utils.conditioning import Conditioning
from utils.dataset import Controls
from utils.distributed import SampleRngs


@dataclass(frozen=True)
class Batch:
    """Training samples after encoding.

    clean_latent: [B, F, C, H, W], None where words are all there is; conditioning: of the same B samples; negative:
    the unguided side, where an objective asks a guided teacher; controls: drawings and images that some come with.
    past: [B, n, C, H, W] of streams that rollouts go on from.
    """

    clean_latent: Tensor | None
    conditioning: Conditioning
    negative: Conditioning | None = None
    controls: Controls | None = None
    past: Tensor | None = None


# (batch, rngs) -> (scalar, metrics): all randomness comes from rngs; metrics are detached tensors.
Loss = Callable[[Any, SampleRngs], tuple[Tensor, dict[str, Tensor]]]


@dataclass
class Player:
    """A network that learns: whose parameters, from which loss, how often.

    It learns on steps start_step, start_step + every, ...

    decide: what a pass decides on the host with `SampleRngs.shared`; passes that decide alike do the same work.
    """

    name: str
    module: nn.Module
    loss: Loss
    every: int = 1
    start_step: int = 0
    decide: Callable[[torch.Generator], Hashable] = lambda shared: None
    is_critic: bool = False  # takes its learning rate and the like from the section critic_optimizer

    def due(self, step: int) -> bool:
        return step >= self.start_step and (step - self.start_step) % self.every == 0


def block_values(values: Tensor, num_frame_per_block: int, independent_first_frame: bool = False) -> Tensor:
    """One value per block, spread over the block's frames.

    blocks of 2:                       a b c -> a a b b c c
    blocks of 2, first frame alone:    a b c -> a b b c c
    values: [B, blocks]; returns [B, F].
    """
    if independent_first_frame:
        return torch.cat([values[:, :1], values[:, 1:].repeat_interleave(num_frame_per_block, dim=1)], dim=1)
    return values.repeat_interleave(num_frame_per_block, dim=1)


def block_timesteps(
    timesteps: Sequence[float],
    num_frames: int,
    rngs: SampleRngs,
    num_frame_per_block: int,
    independent_first_frame: bool = False,
) -> Tensor:
    """One of a sampler's `timesteps` for every block, drawn evenly: float32 [B, F]."""
    blocks = num_blocks(num_frames, num_frame_per_block, independent_first_frame)
    # Filled on the device: a copy of numbers would wait for it, and cannot be captured in a graph.
    times = torch.stack([torch.full((), t, dtype=torch.float32, device=rngs.device) for t in timesteps])
    drawn = times[(rngs.rand(blocks) * len(timesteps)).long()]
    return block_values(drawn, num_frame_per_block, independent_first_frame)


def num_blocks(num_frames: int, num_frame_per_block: int, independent_first_frame: bool = False) -> int:
    """Blocks that a clip splits into; raises ValueError when it does not."""
    first = 1 if independent_first_frame else 0
    blocks, rest = divmod(num_frames - first, num_frame_per_block)
    if rest:
        raise ValueError(
            f"{num_frames} latent frames do not split into blocks of {num_frame_per_block}; "
            f"train on {num_frames - rest} or {num_frames - rest + num_frame_per_block}"
        )
    return blocks + first
