"""Which processes make a video together: they share its tokens, and the two sides of its guidance."""

from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from utils.distributed import Ranks
from utils.wan_wrapper import WanVAEWrapper
from wan.modules.vae import Strip, VAECache

Side = TypeVar("Side")


@dataclass(frozen=True)
class VideoRanks:
    """The ranks that make one video together, seen from one of them; by itself, a process that makes its videos alone.

    Ranks 0 to 7 with guidance_parallel and sequence_parallel 2, which make two videos at a time:

        video 0:  guided side 0 1    unguided side 2 3
        video 1:  guided side 4 5    unguided side 6 7
    """

    together: dist.ProcessGroup | None = None  # all of them
    sequence: dist.ProcessGroup | None = None  # shares the tokens of every pass (wan.modules.sequence_parallel)
    guidance: dist.ProcessGroup | None = None  # two ranks, one for each side
    video: int = 0  # of those that are made at a time
    num_videos: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this rank gets the pictures and writes them; the latents are everywhere."""
        return self.together is None or dist.get_rank(self.together) == 0

    def wait(self) -> None:
        """For the others of this video."""
        if self.together is not None:
            dist.barrier(self.together)

    def own_sides(self, sides: list[Side]) -> list[Side]:
        """Those of all sides of guidance that this rank computes."""
        if self.guidance is None:
            return sides
        if len(sides) != 2:
            raise ValueError(
                f"guidance_parallel puts two sides of guidance on two ranks, this video has {len(sides)}; set "
                "guidance_parallel=false"
            )
        return [sides[dist.get_rank(self.guidance)]]

    def all_sides(self, flows: list[Tensor]) -> list[Tensor]:
        """The flows of all sides, of one shape, from this rank's."""
        if self.guidance is None:
            return flows
        (own,) = flows
        came = [torch.empty_like(own) for _ in range(2)]
        dist.all_gather(came, own.contiguous(), group=self.guidance)
        return came

    def decode(self, vae: WanVAEWrapper, latents: Tensor, cache: VAECache | None = None) -> Tensor:
        """Pixels [B, F_px, 3, height, width] in [0, 1] on the first rank, none ([B, 0, 3, height, width]) elsewhere.

        Each rank makes a strip of them, where the decoder can do that.
        """
        if self.together is not None and vae.splits:
            pixels = self._decode_strips(vae, latents, cache)
        elif self.is_first:
            pixels = vae.decode_to_pixel(latents, cache=cache)
        if self.is_first:
            return (pixels + 1) / 2
        height, width = (size * vae.model.spatial_stride for size in latents.shape[-2:])
        return latents.new_empty(len(latents), 0, 3, height, width)

    def _decode_strips(self, vae: WanVAEWrapper, latents: Tensor, cache: VAECache | None) -> Tensor:
        """All columns [B, F_px, 3, height, width] in [-1, 1] on the first rank, no column on the others."""
        rank, size, width = dist.get_rank(self.together), dist.get_world_size(self.together), latents.shape[-1]
        strips = [Strip.of(r, size, width) for r in range(size)]
        columns = [(strip.last - strip.first) * vae.model.spatial_stride for strip in strips]
        own = vae.decode_to_pixel(latents, cache=cache, strip=strips[rank]).movedim(-1, 0).contiguous()
        to_each = [columns[rank]] + [0] * (size - 1)
        from_each = columns if rank == 0 else [0] * size
        came = own.new_empty(sum(from_each), *own.shape[1:])
        dist.all_to_all_single(came, own, from_each, to_each, group=self.together)
        return came.movedim(0, -1).contiguous()

    def all_agree(self, claim: bool, device: torch.device) -> bool:
        """Whether it holds on every rank that shares the tokens (one device sync: not for every step)."""
        if self.sequence is None:
            return claim
        box = torch.tensor(int(claim), device=device)
        dist.all_reduce(box, dist.ReduceOp.MIN, group=self.sequence)
        return bool(box.item())


def check_world(world_size: int, sequence_parallel: int, guidance_parallel: bool) -> None:
    """Raise ValueError where so many processes do not make whole videos."""
    together = sequence_parallel * (2 if guidance_parallel else 1)
    if world_size % together:
        times = f"sequence_parallel {sequence_parallel}" + (
            ", times 2 for guidance_parallel," if guidance_parallel else ""
        )
        more = -(-world_size // together) * together
        started = f"{world_size} process" + ("es" if world_size > 1 else "")
        raise ValueError(
            f"{times} needs {together} processes for a video, {started} came; start with torchrun "
            f"--nproc_per_node={more}, or change the setting"
        )


def share_videos(ranks: Ranks, sequence_parallel: int = 1, guidance_parallel: bool = False) -> VideoRanks:
    """This process's place in the run, whose process group exists (see init_distributed)."""
    check_world(ranks.size, sequence_parallel, guidance_parallel)
    num_sides = 2 if guidance_parallel else 1
    together = sequence_parallel * num_sides
    if together == 1:
        return VideoRanks(video=ranks.rank, num_videos=ranks.size)
    kind, num_videos = ranks.device.type, ranks.size // together
    videos = init_device_mesh(kind, (num_videos, together), mesh_dim_names=("video", "together"))
    shape, names = (num_videos, num_sides, sequence_parallel), ("video", "guidance", "sequence")
    parts = init_device_mesh(kind, shape, mesh_dim_names=names)
    return VideoRanks(
        together=videos.get_group("together"),
        sequence=parts.get_group("sequence") if sequence_parallel > 1 else None,
        guidance=parts.get_group("guidance") if guidance_parallel else None,
        video=ranks.rank // together,
        num_videos=num_videos,
    )
