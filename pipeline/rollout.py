"""The walk of a video, block by block: the same for inference, live streams and training."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, pairwise

import torch
from torch import Tensor

from pipeline.samplers import Denoise, guide_in_turn
from utils.conditioning import Conditioning
from utils.wan_wrapper import WanDiffusionWrapper
from wan.modules.kv_cache import KVCache
from wan.modules.masks import block_starts
from wan.modules.model import Shortcut


@dataclass(frozen=True)
class FrameBlock:
    """Latent frames [start, stop) of a video; `given` ones are not generated but only remembered."""

    start: int
    stop: int
    given: bool = False

    @property
    def num_frames(self) -> int:
        return self.stop - self.start


def plan_blocks(
    num_frames: int | None, num_frame_per_block: int, independent_first_frame: bool = False, num_input_frames: int = 0
) -> Iterator[FrameBlock]:
    """Blocks of a video of num_frames latents, of which the first num_input_frames are given. None: without end.

    Given frames need not fill whole blocks: what is left of them makes a shorter first block, and generation goes on in
    whole blocks after them. 7 given frames of 13 in blocks of 3: [0, 1) [1, 4) [4, 7) given, [7, 10) [10, 13) made.
    Raises ValueError when what is left to generate does not split into whole blocks.
    """
    start = 0
    leading = [1] if independent_first_frame and num_input_frames else []
    leading += [(num_input_frames - sum(leading)) % num_frame_per_block]
    leading = [size for size in leading if size]
    while start < num_input_frames:
        stop = start + (leading.pop(0) if leading else num_frame_per_block)
        yield FrameBlock(start, stop, given=True)
        start = stop
    begins_with_one = independent_first_frame and start == 0
    if num_frames is not None:
        if num_frames <= start:
            raise ValueError(
                f"{num_frames} latent frames are asked for and {start} are given; ask for more than are given"
            )
        bounds = [start + bound for bound in block_starts(num_frames - start, num_frame_per_block, begins_with_one)]
        yield from (FrameBlock(*pair) for pair in pairwise(bounds))
        return
    while True:
        stop = start + (1 if begins_with_one and start == 0 else num_frame_per_block)
        yield FrameBlock(start, stop)
        start = stop


@dataclass
class Path:
    """One way through the generator: what steers it and what it remembers. Guidance walks two of them.

    kv_cache None: a bidirectional generator, which sees its one block only. sides 2: conditioning and cache hold the
    guided side's batch and then the unguided one's, which go through the generator in one pass.
    """

    conditioning: Conditioning
    kv_cache: KVCache | None
    sides: int = 1

    def without_pose(self) -> "Path":
        """The same memory, seen without the pose."""
        return replace(self, conditioning=replace(self.conditioning, pose=None))


# From one block's start to its clean latents: (block, paths) -> [B, f, C, H, W]. It may run with gradient.
SampleBlock = Callable[[FrameBlock, list[Path]], Tensor]


def denoise_path(
    generator: WanDiffusionWrapper,
    path: Path,
    block: FrameBlock,
    x: Tensor,
    t: Tensor | float,
    shortcut: Shortcut | None = None,
    keys_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """Flow and x0 [sides * B, f, C, H, W] of a block [B, f, C, H, W] at one time t, in the path's context.

    Moves nothing. shortcut: WanModel.forward's; keys_only: CausalWanModel.forward's, flow and x0 then mean nothing.
    """
    options = {"keys_only": True} if keys_only else {"shortcut": shortcut}
    x = x.repeat(path.sides, 1, 1, 1, 1)
    timestep = torch.zeros(x.shape[:2], device=x.device) + t  # no copy of a number: it would wait for the device
    conditioning = path.conditioning.frames(block.start, block.stop)
    return generator(x, conditioning, timestep, kv_cache=path.kv_cache, **options)


def guided(
    generator: WanDiffusionWrapper,
    paths: list[Path],
    block: FrameBlock,
    guidance_scale: float | Sequence[float] = 1.0,
    computed: Sequence[bool] | None = None,
    sees_pose: Callable[[int], bool] | None = None,
    all_sides: Callable[[list[Tensor]], list[Tensor]] | None = None,
) -> Denoise:
    """What a sampler sees of one block: the first side's prediction, guided away from those of the others.

    guidance_scale: one number, or one for each side but the last, see `guide_in_turn`. computed: for every call in
    turn, whether the blocks are run, or add what they last added (pipeline.teacache). sees_pose: whether the n-th call
    sees the pose (None: all do); where that changes, the blocks are run. all_sides: from the flows of these paths to
    those of all, where other ranks walk some of them (utils.video_ranks).
    """
    scales = [guidance_scale] if isinstance(guidance_scale, int | float) else guidance_scale
    shortcuts = [None if computed is None else Shortcut() for _ in paths]
    steps, blind = count(), [path.without_pose() for path in paths]
    saw = None

    def denoise(x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        nonlocal saw
        step, seen = next(steps), saw
        saw = sees_pose is None or sees_pose(step)
        if computed is not None:
            for shortcut in shortcuts:
                shortcut.reuse = not computed[step] and saw == seen
        predictions = [
            denoise_path(generator, path, block, x, t, shortcut)
            for path, shortcut in zip(paths if saw else blind, shortcuts, strict=True)
        ]
        flows = [flow for path, (flow, _) in zip(paths, predictions, strict=True) for flow in flow.chunk(path.sides)]
        if all_sides is not None:
            flows = all_sides(flows)
        if len(flows) == 1:
            return predictions[0]
        flow = guide_in_turn(flows, scales)
        return flow, generator.scheduler.flow_to_x0(flow, x, t)

    return denoise


def rollout(
    generator: WanDiffusionWrapper,
    paths: list[Path],
    blocks: Iterable[FrameBlock],
    sample: SampleBlock,
    *,
    initial_latent: Tensor | None = None,
    context_noise: float = 0.0,
    clean_context: bool = True,
    draw: Callable[[torch.Size], Tensor] | None = None,
) -> Iterator[tuple[FrameBlock, Tensor]]:
    """Yield each block and its latents [B, f, C, H, W]; a block becomes context when the next one is asked for.

    initial_latent [B, num_input_frames, C, H, W] fills the given blocks. Context costs one clean pass per block and
    path, and the last block none. context_noise: time in [0, 1000] at which later blocks see a block; 0 adds exactly
    nothing, anything else adds noise from `draw`, in training and inference alike. clean_context False: no such pass,
    later blocks see the keys that the block's last denoising step left in the cache.
    """
    previous = None
    for block in blocks:
        if previous is not None:
            if clean_context or previous[0].given:
                remember(generator, paths, *previous, context_noise, draw)
            for path in paths:
                path.kv_cache.commit(previous[0].num_frames)
        if block.given:
            latents = initial_latent[:, block.start : block.stop].float()
        else:
            latents = sample(block, paths)
        yield block, latents
        previous = block, latents


@torch.no_grad()
def remember(
    generator: WanDiffusionWrapper,
    paths: list[Path],
    block: FrameBlock,
    latents: Tensor,
    context_noise: float = 0.0,
    draw: Callable[[torch.Size], Tensor] | None = None,
) -> None:
    """Keys and values of a finished block: one pass at its final noise level. No gradient flows back."""
    latents = latents.detach()
    if context_noise and not block.given:
        latents = generator.scheduler.add_noise(latents, draw(latents.shape), context_noise)
    for path in paths:
        denoise_path(generator, path, block, latents, 0.0 if block.given else context_noise, keys_only=True)
