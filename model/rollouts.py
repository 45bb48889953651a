"""What the scores are asked about: clips that the generator made from words alone, from its own context."""

from collections.abc import Callable

import torch
from torch import Tensor

from model.base import Batch
from pipeline.self_forcing_training import SelfForcingTrainingPipeline, Trajectory
from utils.distributed import SampleRngs


class Rollouts:
    """Self-forcing: (batch, rngs) -> a Trajectory as long as the scores' clips.

    latent_shape: (C, H, W). num_frames: latents of a rollout, given ones included; above the pipeline's num_grad_frames
    every step draws a whole number of blocks between the two, the same on all ranks, and the scores see the end. There,
    the first latent stands for four pictures where a clip of its own has one: `first_latent` (clip so far [B, n, C, H,
    W] -> [B, 1, C, H, W]) encodes the last picture anew. num_input_frames: latents of the batch's clips that a rollout
    goes on from.
    A batch with a `past` is gone on from, by num_frames more, of which the scores see the end. window, sink: how much
    of the end of every rollout is kept in `end` [B, window, C, H, W], its first `sink` latents being the stream's.
    """

    def __init__(
        self,
        pipeline: SelfForcingTrainingPipeline,
        *,
        latent_shape: tuple[int, int, int],
        num_frames: int,
        num_input_frames: int = 0,
        first_latent: Callable[[Tensor], Tensor] | None = None,
        window: int = 0,
        sink: int = 0,
    ):
        judged, block = pipeline.num_grad_frames, pipeline.num_frame_per_block
        pipeline.plan(num_frames, num_input_frames)  # a length that does not split is refused here
        surplus = num_frames - judged
        if surplus > 0 and surplus % block:
            raise ValueError(
                f"rollouts of {num_frames} latent frames whose last {judged} are judged do not split into blocks of "
                f"{block}; use {num_frames - surplus % block}"
            )
        if (surplus > 0 or window) and first_latent is None:
            raise ValueError(f"rollouts of more than {judged} latent frames need first_latent")
        self.pipeline = pipeline
        self.latent_shape = latent_shape
        self.num_frames = num_frames
        self.num_input_frames = num_input_frames
        self.first_latent = first_latent
        self.window, self.sink = window, sink
        self.end: Tensor | None = None

    def __call__(self, batch: Batch, rngs: SampleRngs) -> Trajectory:
        given = batch.past
        if given is None and self.num_input_frames:
            given = batch.clean_latent[:, : self.num_input_frames]
        num_frames, exit_steps = self.decide(rngs.shared)
        made = self.pipeline.rollout(
            rngs.randn(num_frames - self.num_input_frames, *self.latent_shape),
            batch.conditioning,
            exit_steps=exit_steps,
            draw=lambda shape: rngs.randn(*shape[1:]),
            initial_latent=given,
        )
        if self.window:
            self.keep_end(made.latents.detach())
        return self.last_frames(made)

    def keep_end(self, latents: Tensor) -> None:
        """What the next block of a stream can see, in memory that stays: a captured pass writes to it again."""
        recent = latents[:, latents.shape[1] - (self.window - self.sink) :]
        end = torch.cat([latents[:, : self.sink], recent], dim=1)
        if self.end is None:
            self.end = torch.empty_like(end)
        self.end.copy_(end)

    def decide(self, shared: torch.Generator) -> tuple[int, tuple[int, ...]]:
        """Latents of this step's rollouts, and where each block leaves; `shared` is seeded alike on all ranks."""
        num_frames = self.draw_num_frames(shared)
        num_blocks = sum(not block.given for block in self.pipeline.plan(num_frames, self.num_input_frames))
        return num_frames, tuple(self.pipeline.draw_exit_steps(num_blocks, shared))

    def draw_num_frames(self, shared: torch.Generator) -> int:
        """Latents of this step's rollouts."""
        shortest, block = min(self.pipeline.num_grad_frames, self.num_frames), self.pipeline.num_frame_per_block
        more_blocks = (self.num_frames - shortest) // block
        return shortest + block * int(torch.randint(more_blocks + 1, (), generator=shared))

    def last_frames(self, made: Trajectory) -> Trajectory:
        """The part of a rollout that the scores see."""
        surplus = made.latents.shape[1] - self.pipeline.num_grad_frames
        if surplus <= 0:
            return made
        with torch.no_grad():
            first = self.first_latent(made.latents[:, : surplus + 1])
        latents = torch.cat([first.float(), made.latents[:, surplus + 1 :]], dim=1)
        return Trajectory(latents, made.t_from, made.t_to, made.first_grad_frame - surplus)
