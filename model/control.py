"""Objectives on clips of which some come with a pose to follow and some with an image to go by."""

from dataclasses import replace

import torch
from torch import Tensor

from model.base import Batch
from model.consistency import ConsistencyDistillation
from model.diffusion import CausalDiffusion
from pipeline.pose import prepare_drawings
from utils.conditioning import Conditioning
from utils.dataset import Controls
from utils.distributed import SampleRngs
from wan.modules.pose import DWPoseEmbedding

Objective = CausalDiffusion | ConsistencyDistillation


class ControlledObjective:
    """An objective under teacher forcing, on what inference will walk.

    Pose tokens stand in both halves, an image in front of the clip:

    without an image                       [0 1 2] [3 4 5] ...     as without controls
    its own first frame (context)      [0] [1 2 3] [4 5 6] ...     blocks begin one frame later
    a reference (ref_sink)             [r] [0 1 2] [3 4 5] ...     r has the pose of the reference, or none

    The image is never learned, and it stays in sight. Samples without a pose have tokens of zeros, which are none.
    """

    def __init__(self, pose_embedding: DWPoseEmbedding, plain: Objective, imaged: Objective):
        """plain, imaged: the objective on clips without and with an image."""
        self.pose_embedding, self.plain, self.imaged = pose_embedding, plain, imaged

    def loss(self, batch: Batch, rngs: SampleRngs) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over learned frames, and how it splits: as the objective's, and by what steers the sample."""
        controls, tokens = batch.controls, pose_tokens(self.pose_embedding, batch)
        is_posed = torch.zeros(len(tokens), device=tokens.device).index_fill(0, controls.posed, 1.0)
        errors, weights, times, details = [], [], [], {}
        for name, objective, places in (
            ("plain", self.plain, controls.plain),
            ("imaged", self.imaged, controls.imaged),
        ):
            if not len(places):
                continue
            part = self.part(batch, places, tokens.index_select(0, places))
            if name == "imaged":
                part = self.with_image(part, controls)
            error, weight, t = objective.errors(part, rngs.at(places))
            details |= _by_pose(f"loss_{name}", error.detach().mean(1), is_posed[places])
            errors.append(error.flatten())
            weights.append(weight.flatten())
            times.append(t.flatten())
        error, weight, t = torch.cat(errors), torch.cat(weights), torch.cat(times)
        return (weight * error).mean(), self.plain.details(error.detach(), t) | details

    def part(self, batch: Batch, places: Tensor, pose: Tensor) -> Batch:
        """The samples at `places`, with their pose."""
        negative = None if batch.negative is None else Conditioning(batch.negative.prompt_embeds[places])
        return Batch(
            batch.clean_latent[places], Conditioning(batch.conditioning.prompt_embeds[places], pose=pose), negative
        )

    def with_image(self, part: Batch, controls: Controls) -> Batch:
        """The same with the image in front, as many frames as split into it and whole blocks."""
        x0, pose, block = part.clean_latent, part.conditioning.pose, self.imaged.num_frame_per_block
        num_frames = 1 + (x0.shape[1] - 1) // block * block
        shown = controls.reference_posed[:, None, None, None, None]
        reference_pose = torch.where(shown, embed(self.pose_embedding, controls.reference_drawings).to(pose.dtype), 0)
        own = controls.first_frame[:, None, None, None, None]
        behind = torch.cat([controls.references.to(x0.dtype), x0[:, : num_frames - 1]], dim=1)
        pose_behind = torch.cat([reference_pose, pose[:, :, : num_frames - 1]], dim=2)
        pose = torch.where(own, pose[:, :, :num_frames], pose_behind)
        latents = torch.where(own, x0[:, :num_frames], behind)
        return replace(part, clean_latent=latents, conditioning=replace(part.conditioning, pose=pose))


def pose_tokens(pose_embedding: DWPoseEmbedding, batch: Batch) -> Tensor:
    """[B, pose_dim, F, h/2, w/2] of a batch with controls, zeros where there is no pose."""
    drawings, x0 = batch.controls.drawings, batch.clean_latent
    shape = (len(x0), pose_embedding.out_dim, x0.shape[1], x0.shape[3] // 2, x0.shape[4] // 2)
    if not len(drawings):
        return torch.zeros(shape, device=x0.device)
    pose = embed(pose_embedding, drawings)
    return pose.new_zeros(shape).index_copy(0, batch.controls.posed, pose)


def embed(pose_embedding: DWPoseEmbedding, drawings: Tensor) -> Tensor:
    """uint8 [P, F_px, 3, H, W] -> [P, pose_dim, F, H/16, W/16]."""
    return pose_embedding(prepare_drawings(drawings, drawings.shape[-2:]))


def _by_pose(name: str, error: Tensor, is_posed: Tensor) -> dict[str, Tensor]:
    """Mean error [n] of samples with and without a pose; 0 where there are none."""
    shares = {f"{name}_posed": is_posed, f"{name}_unposed": 1 - is_posed}
    return {key: (error * share).sum() / share.sum().clamp(min=1) for key, share in shares.items()}
