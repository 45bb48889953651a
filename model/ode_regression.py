"""Regression onto the teacher's trajectories: how a causal few-step generator gets its start."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.base import Batch, block_values, num_blocks
from utils.distributed import SampleRngs


class ODERegression:
    """E |x0(x_t, t) - x_0|^2 over states x_t of the teacher's probability-flow ODE (CausVid, arXiv 2412.07772, 4.3).

    Steps 1000, 750, 500, 250 at shift 5 and blocks of 2 frames; every block of every clip draws its own state:

        state   0     1      2      3     4          frames   0 1 | 2 3 | 4 5
        time    1000  937.5  833.3  625   0          state    2 2 | 0 0 | 4 4
                noise <------------------> clean     loss     x x | x x | . .    (a clean block only serves as context)

    The student sees all blocks in one block-causal pass. Training times are the times it will be sampled at, so the
    trajectories must hold exactly these: 48 solver steps at the model's shift pass through all four.

    teacher_forcing: the trajectories come from a causal teacher, whose ODE runs from a block's noise to the block given
    the clean blocks before it (Causal Forcing, arXiv 2602.02214). Then the student is given these too, and no block
    draws the clean state.
    """

    def __init__(
        self,
        generator: nn.Module,
        *,
        timesteps: Sequence[float],
        teacher_forcing: bool = False,
        num_frame_per_block: int = 3,
        independent_first_frame: bool = False,
    ):
        """timesteps: those of the noisy states, descending, as the network sees them (after the shift)."""
        self.generator = generator
        self.timesteps = torch.tensor([*timesteps, 0.0])
        self.teacher_forcing = teacher_forcing
        self.num_frame_per_block = num_frame_per_block
        self.independent_first_frame = independent_first_frame

    def loss(self, batch: Batch, rngs: SampleRngs) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over clips of the mean squared error of x0 over a clip's noisy frames; and the error of every state.

        batch.clean_latent: whole trajectories, [B, states, F, C, H, W], of which the last state is the clean clip.
        """
        trajectory = batch.clean_latent.float()
        if trajectory.shape[1] != len(self.timesteps):
            raise ValueError(
                f"the trajectories hold {trajectory.shape[1]} states, but the {len(self.timesteps) - 1} steps of this "
                f"run and the clean clip make {len(self.timesteps)}; use the denoising_step_list they were made with"
            )
        states = self.states(trajectory.shape[2], rngs)
        self.timesteps = self.timesteps.to(trajectory.device)  # there from the first pass on
        t = self.timesteps[states]
        index = states[:, None, :, None, None, None].expand(-1, 1, -1, *trajectory.shape[3:])
        x_t, x0 = trajectory.gather(1, index)[:, 0], trajectory[:, -1]
        _, x0_pred = self.generator(x_t, batch.conditioning, t, clean_x=x0 if self.teacher_forcing else None)
        error = (x0_pred.float() - x0).square().mean(dim=(-3, -2, -1))
        noisy = (t > 0).float()
        per_clip = (error * noisy).sum(1) / noisy.sum(1).clamp(min=1)
        return per_clip.mean(), self._by_state(error.detach(), states)

    def states(self, num_frames: int, rngs: SampleRngs) -> Tensor:
        """The state that every frame starts from, int64 [B, F]: one draw per block."""
        blocks = num_blocks(num_frames, self.num_frame_per_block, self.independent_first_frame)
        choices = len(self.timesteps) - (1 if self.teacher_forcing else 0)
        drawn = (rngs.rand(blocks) * choices).long()
        return block_values(drawn, self.num_frame_per_block, self.independent_first_frame)

    def _by_state(self, error: Tensor, states: Tensor) -> dict[str, Tensor]:
        """Mean error of frames in each noisy state; 0 where there are none."""
        return {
            f"loss_state_{i}": (error * (states == i)).sum() / (states == i).sum().clamp(min=1)
            for i in range(len(self.timesteps) - 1)
        }
