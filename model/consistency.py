"""Causal consistency distillation: a few-step start without a stored trajectory."""

import numpy as np
import torch
from torch import Tensor

from model.base import Batch, block_values, num_blocks
from pipeline.samplers import guide
from utils.distributed import SampleRngs
from utils.solvers import wan_sigmas
from utils.wan_wrapper import WanDiffusionWrapper


class ConsistencyDistillation:
    """E |f(x_t, t) - f'(x_s, s)|^2 with x_s one step further down the teacher's ODE and f' the average of f.

    A consistency function names the end of the trajectory that a state lies on (Song et al., arXiv 2303.01469). Two
    neighbours on one trajectory must name the same end, and the last state is its own end, because x0 = x - sigma flow
    is x at sigma 0; so clean clips and one teacher step replace whole trajectories:

        x0 --noise--> x_t --one Euler step of the teacher, with guidance (LCM, arXiv 2310.04378)--> x_s
                       |                                                                             |
                     f (learns)                      pulled together                    f' (average, no gradient)

    Every block is given the clean blocks before it (teacher forcing), as in the walk: the student then learns the map
    from a block's noise to the block given its past, which self-forcing starts from. This is the causal consistency
    distillation of Causal Forcing++ (arXiv 2605.15141). A causal teacher sees the same past, and blocks draw times of
    their own. A bidirectional one sees the whole noisy clip, so that all blocks share one time; its trajectory depends
    on frames that the student does not see, and the student learns their average (arXiv 2602.02214 shows why that is
    worse).

        block      0    1    2        context of block 2     time
        causal     t0   t1   t2       clean 0, clean 1       one per block
        bidirect.  t    t    t        clean 0, clean 1       one per clip
    """

    def __init__(
        self,
        generator: WanDiffusionWrapper,
        average: WanDiffusionWrapper,
        teacher: WanDiffusionWrapper,
        *,
        guidance_scale: float = 3.0,
        steps: int = 48,
        num_frame_per_block: int = 3,
        independent_first_frame: bool = False,
        image_first: bool = False,
    ):
        """average: f', a frozen copy of the generator that its owner keeps up to date. guidance_scale: w in uncond + w
        (cond - uncond), against batch.negative; 1 spares the teacher's second pass. steps: of the teacher's Euler
        solver, at the generator's shift. image_first: as CausalDiffusion's, for a causal teacher.
        """
        if image_first and not teacher.is_causal:
            raise ValueError("a bidirectional teacher sees no image before its clip; set consistency.causal_teacher")
        self.generator = generator
        self.average = average
        self.teacher = teacher
        self.guidance_scale = guidance_scale
        self.num_frame_per_block = num_frame_per_block
        self.independent_first_frame = independent_first_frame or image_first
        self.image_first = image_first
        self.options = {"image_first": True} if image_first else {}
        sigmas = np.append(wan_sigmas("euler", steps, generator.scheduler.shift), 0.0)
        self.grid = torch.from_numpy(1000 * sigmas).float()

    def loss(self, batch: Batch, rngs: SampleRngs) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared difference of the two ends; and the root of it over times above and below the grid's middle."""
        error, weight, t = self.errors(batch, rngs)
        return (weight * error).mean(), self.details(error.detach(), t)

    def errors(self, batch: Batch, rngs: SampleRngs) -> tuple[Tensor, Tensor, Tensor]:
        """Squared difference, its weight, and the time it starts from, of every frame that is learned: [B, F] each."""
        x0 = batch.clean_latent.float()
        place = self.places(x0.shape[1], rngs)
        self.grid = self.grid.to(x0.device)  # there from the first pass on
        t, s = self.grid[place], self.grid[place + 1]
        x_t = self.generator.scheduler.add_noise(x0, rngs.randn(*x0.shape[1:]), t)
        with torch.no_grad():
            step = ((s - t) / 1000)[..., None, None, None]
            x_s = x_t + step * self.teacher_flow(x_t, t, batch)
            _, end = self.average(x_s, batch.conditioning, s, clean_x=x0, **self.options)
        _, x0_pred = self.generator(x_t, batch.conditioning, t, clean_x=x0, **self.options)
        learned = slice(int(self.image_first), None)
        error = (x0_pred - end).square().mean(dim=(-3, -2, -1))[:, learned]
        return error, torch.ones_like(error), t[:, learned]

    def places(self, num_frames: int, rngs: SampleRngs) -> Tensor:
        """Where on the grid every frame starts, int64 [B, F]: one draw per block, or per clip (see the class)."""
        blocks = num_blocks(num_frames, self.num_frame_per_block, self.independent_first_frame)
        steps = len(self.grid) - 1
        if not self.teacher.is_causal:
            return (rngs.rand(1) * steps).long().expand(-1, num_frames)
        drawn = (rngs.rand(blocks) * steps).long()
        return block_values(drawn, self.num_frame_per_block, self.independent_first_frame)

    def teacher_flow(self, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """The frozen teacher's guided flow, [B, F, C, H, W]."""
        past = {"clean_x": batch.clean_latent, **self.options} if self.teacher.is_causal else {}
        flow, _ = self.teacher(x_t, batch.conditioning, t, **past)
        if self.guidance_scale == 1:
            return flow
        unguided, _ = self.teacher(x_t, batch.negative, t, **past)
        return guide(flow, unguided, self.guidance_scale)

    def details(self, error: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Root mean square of differences that start above and below the grid's middle; 0 where none do."""
        noisy = t > self.grid[(len(self.grid) - 1) // 2]
        return {
            f"error_{name}": ((error * where).sum() / where.sum().clamp(min=1)).sqrt()
            for name, where in (("noisy_half", noisy), ("clean_half", ~noisy))
        }
