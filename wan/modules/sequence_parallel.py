"""Ulysses sequence parallelism (arXiv 2309.14509): ranks share the tokens of a pass, and inside attention its heads.

Each rank has its tokens of every frame all through a pass: projections, text, feed-forward and head are its own work.
Self-attention, and so the KV cache, has all tokens of its heads; two messages a layer lead there and back. 2 ranks, 2
frames of 5 tokens, 4 heads:

                projections, text, feed-forward          self-attention, KV cache
    rank 0      frame 0: 0 1 2   frame 1: 0 1 2          all tokens, heads 0 1
    rank 1      frame 0: 3 4     frame 1: 3 4            all tokens, heads 2 3

Every rank has a part of each frame, not some of the frames: time modulation goes by frames and stays what it was, and
a frame that does not divide makes messages of unequal size, no padding.

Shapes: B batch, F frames of the pass, S tokens per frame, s of them this rank's, N heads, D head size, P ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from .attention import Attend


def check_heads(num_heads: int, num_ranks: int) -> None:
    """Raise ValueError where heads do not divide over the ranks."""
    if num_ranks < 1 or num_heads % num_ranks:
        choice = ", ".join(str(n) for n in range(1, num_heads + 1) if num_heads % n == 0)
        raise ValueError(
            f"sequence_parallel is {num_ranks}, but {num_heads} attention heads do not divide over {num_ranks} ranks; "
            f"use one of {choice}"
        )


class Ulysses:
    """This rank among those that share the passes of a transformer. Without gradient: messages have none."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def shares(self, frame_seqlen: int) -> list[int]:
        """Tokens of each frame that every rank has; they differ by at most one."""
        if frame_seqlen < self.size:
            raise ValueError(
                f"a frame has {frame_seqlen} tokens, too few for {self.size} ranks; use a larger height and width, or "
                f"sequence_parallel {frame_seqlen} or less"
            )
        each, rest = divmod(frame_seqlen, self.size)
        return [each + (rank < rest) for rank in range(self.size)]

    def split(self, tokens: Tensor, num_frames: int) -> Tensor:
        """This rank's of all tokens: [B, F * S, C] -> [B, F * s, C]."""
        if torch.is_grad_enabled():
            raise ValueError("sequence parallelism is for inference: no gradient goes from rank to rank; use no_grad")
        frames = tokens.unflatten(1, (num_frames, -1))
        return frames.split(self.shares(frames.shape[2]), dim=2)[self.rank].flatten(1, 2)

    def gather(self, tokens: Tensor, num_frames: int, frame_seqlen: int) -> Tensor:
        """All tokens on every rank: [B, F * s, C] -> [B, F * S, C]."""
        own = tokens.unflatten(1, (num_frames, -1)).movedim(2, 0)  # [s, B, F, C]
        shares = self.shares(frame_seqlen)
        came = self._exchange(own.repeat(self.size, 1, 1, 1), [len(own)] * self.size, shares)
        return came.movedim(0, 2).flatten(1, 2)

    def around(self, attend: Attend, num_frames: int, frame_seqlen: int) -> Attend:
        """`attend`, which sees all tokens of this rank's heads, for this rank's tokens of all heads."""
        shares = self.shares(frame_seqlen)

        def attend_together(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            attended = attend(layer, *self._to_heads(q, k, v, num_frames, shares))
            return self._to_tokens(attended, num_frames, shares)

        return attend_together

    def _to_heads(self, q: Tensor, k: Tensor, v: Tensor, num_frames: int, shares: list[int]) -> tuple[Tensor, ...]:
        """[B, F * s, N, D] each -> [B, F * S, N / P, D] each, in one message."""
        by_rank = [
            x.unflatten(2, (self.size, -1)).unflatten(1, (num_frames, -1)).permute(3, 2, 0, 1, 4, 5) for x in (q, k, v)
        ]  # [P, s, B, F, N / P, D]
        sent = torch.stack(by_rank, dim=2).flatten(0, 1)
        came = self._exchange(sent, [shares[self.rank]] * self.size, shares)  # [S, 3, B, F, N / P, D]
        return came.permute(1, 2, 3, 0, 4, 5).flatten(2, 3).unbind(0)

    def _to_tokens(self, attended: Tensor, num_frames: int, shares: list[int]) -> Tensor:
        """[B, F * S, N / P, D] -> [B, F * s, N, D]."""
        sent = attended.unflatten(1, (num_frames, -1)).movedim(2, 0)  # [S, B, F, N / P, D]
        came = self._exchange(sent, shares, [shares[self.rank]] * self.size).unflatten(0, (self.size, -1))
        return came.permute(2, 3, 1, 0, 4, 5).flatten(3, 4).flatten(1, 2)

    def _exchange(self, sent: Tensor, to_each: list[int], from_each: list[int]) -> Tensor:
        """Rows of `sent`, the first to_each[0] to rank 0 and so on; returns those that came, in the ranks' order."""
        came = sent.new_empty(sum(from_each), *sent.shape[1:])
        dist.all_to_all_single(came, sent.contiguous(), from_each, to_each, group=self.group)
        return came
