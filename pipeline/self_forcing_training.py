"""The walk of inference with a gradient: what self-forcing learns from is what it will do (arXiv 2506.08009)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.rollout import FrameBlock, Path, denoise_path, plan_blocks, rollout
from pipeline.samplers import Draw, few_step, few_step_times
from utils.conditioning import Conditioning
from utils.wan_wrapper import WanDiffusionWrapper
from wan.modules.kv_cache import KVCache


@dataclass(frozen=True)
class Trajectory:
    """A generated clip and which part of the way its gradient knows.

    latents: [B, F, C, H, W] float32, given frames included; frames before first_grad_frame carry no gradient. t_from,
    t_to: the exit step took noise from t_from to t_to, both on the unshifted grid in [0, 1000]; None where blocks left
    at different steps.
    """

    latents: Tensor
    t_from: float | None = None
    t_to: float | None = None
    first_grad_frame: int = 0


class SelfForcingTrainingPipeline:
    """Few-step generation from the model's own context, each block ended at an exit step that carries the gradient.

        steps     1000   937    833    625        exit step 2 of 0 .. 3
        block 0    x ---> x ---> X                x without gradient, noised again; X its x0, with gradient
        block 1    x ---> x ---> X                context: block 0's X, remembered without gradient

    The exit step is drawn anew for every rollout and is the same for all blocks and ranks, unless
    same_step_across_blocks is off; last_step_only always takes the last. All other arguments are the inference
    pipeline's, and a rollout that exits at the last step is its walk bit for bit. No gradient crosses blocks: context
    is detached. Of a clip longer than num_grad_frames only the end learns (see `first_grad_frame`).

    cache_dtype: of the remembered keys and values; None: the generator's parameters'. A cache is made for every rollout
    and keeps every frame, because checkpointed blocks read it again in the backward pass.
    """

    def __init__(
        self,
        generator: WanDiffusionWrapper,
        *,
        denoising_step_list: Sequence[float],
        warp_denoising_step: bool = True,
        num_frame_per_block: int = 3,
        independent_first_frame: bool = False,
        context_noise: float = 0.0,
        clean_context: bool = True,
        same_step_across_blocks: bool = True,
        last_step_only: bool = False,
        num_grad_frames: int = 21,
        cache_dtype: torch.dtype | None = None,
    ):
        self.generator = generator
        self.timesteps = few_step_times(denoising_step_list, generator.scheduler, warp=warp_denoising_step)
        self.unshifted = [*generator.scheduler.unwarp(self.timesteps).tolist(), 0.0]
        if warp_denoising_step:
            self.unshifted = [*(float(t) for t in denoising_step_list if t > 0), 0.0]
        self.num_frame_per_block = num_frame_per_block
        self.independent_first_frame = independent_first_frame
        self.context_noise = context_noise
        self.clean_context = clean_context
        self.same_step_across_blocks = same_step_across_blocks
        self.last_step_only = last_step_only
        self.num_grad_frames = num_grad_frames
        self.cache_dtype = cache_dtype

    def plan(self, num_frames: int, num_given: int = 0) -> list[FrameBlock]:
        """Blocks of a clip of num_frames latents, the first num_given of them given."""
        return list(plan_blocks(num_frames, self.num_frame_per_block, self.independent_first_frame, num_given))

    def draw_exit_steps(self, num_blocks: int, shared: torch.Generator) -> list[int]:
        """One exit step per generated block; `shared` is seeded alike on all ranks, so they decide alike."""
        last = len(self.timesteps) - 1
        if self.last_step_only:
            return [last] * num_blocks
        steps = torch.randint(last + 1, (num_blocks,), generator=shared).tolist()
        return steps[:1] * num_blocks if self.same_step_across_blocks else steps

    def first_grad_frame(self, num_frames: int, num_given: int = 0) -> int:
        """The first frame that learns: the first generated one, or in a long clip one near the end.

        A judge of num_grad_frames sees the last so many. Its first frame is then the middle of a stream where a clip
        of its own would begin, so it is encoded anew (an image, no gradient), and the block it is taken from has
        nothing to learn: 63 frames, blocks of 3, num_grad_frames 21: frames 45 .. 62 learn.
        """
        if num_frames <= self.num_grad_frames:
            return num_given
        return max(num_given, num_frames - self.num_grad_frames + self.num_frame_per_block)

    def rollout(
        self,
        noise: Tensor,
        conditioning: Conditioning,
        *,
        exit_steps: Sequence[int],
        draw: Draw,
        initial_latent: Tensor | None = None,
    ) -> Trajectory:
        """Generate a clip from start noise [B, F, C, H, W]; under torch.no_grad() nothing carries a gradient.

        exit_steps: one per generated block, see draw_exit_steps. draw: fresh noise of a shape, asked for block by block
        in inference's order. initial_latent [B, n, C, H, W]: given frames that the clip goes on from.
        """
        num_given = 0 if initial_latent is None else initial_latent.shape[1]
        num_frames = num_given + noise.shape[1]
        blocks = self.plan(num_frames, num_given)
        exits = dict(zip((block.start for block in blocks if not block.given), exit_steps, strict=True))
        first_grad = self.first_grad_frame(num_frames, num_given)
        learning = torch.is_grad_enabled()
        path = Path(conditioning, self._make_cache(noise, num_frames))

        def sample(block: FrameBlock, paths: list[Path]) -> Tensor:
            timesteps = self.timesteps[: exits[block.start] + 1]
            with_grad = learning and block.start >= first_grad

            def denoise(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
                with torch.set_grad_enabled(with_grad and t == timesteps[-1]):
                    return denoise_path(self.generator, paths[0], block, x, t)

            start = noise[:, block.start - num_given : block.stop - num_given].float()
            return few_step(denoise, start, timesteps, self.generator.scheduler, draw)

        walk = rollout(
            self.generator,
            [path],
            blocks,
            sample,
            initial_latent=initial_latent,
            context_noise=self.context_noise,
            clean_context=self.clean_context,
            draw=draw,
        )
        latents = torch.cat([latents for _, latents in walk], dim=1)
        t_from = t_to = None
        if len(set(exit_steps)) == 1:
            t_from, t_to = self.unshifted[exit_steps[0]], self.unshifted[exit_steps[0] + 1]
        return Trajectory(latents, t_from, t_to, first_grad)

    def _make_cache(self, noise: Tensor, num_frames: int) -> KVCache:
        batch, _, _, height, width = noise.shape
        return self.generator.model.make_kv_cache(
            batch,
            height,
            width,
            num_frames,
            keep_all=True,
            keeps_last_pass=not self.clean_context,
            dtype=self.cache_dtype,
        )
