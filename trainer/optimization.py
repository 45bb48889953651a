"""The learning rate over a run, and gradients that are clipped and watched without asking the device."""

import dataclasses
import logging
import math

import torch
import torch.distributed as dist
from torch import Tensor

from utils.config import Config, OptimizerConfig
from utils.sharding import LocalParameters, Sharding

logger = logging.getLogger(__name__)

MAX_BAD_STEPS = 10  # non-finite gradients between two looks before the run is given up


def learning_rate(settings: OptimizerConfig, step: int, progress: float) -> float:
    """Linear warm-up over warmup_steps, then constant, or half a cosine down to final_lr_ratio of lr at progress 1."""
    warmup = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    if settings.schedule == "constant":
        return settings.lr * warmup
    low = settings.final_lr_ratio
    return settings.lr * warmup * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def optimizer_settings(config: Config, is_critic: bool) -> OptimizerConfig:
    """The section `optimizer`; for a critic with what `critic_optimizer` says otherwise."""
    if not is_critic:
        return config.optimizer
    given = {name: value for name, value in vars(config.critic_optimizer).items() if value is not None}
    return dataclasses.replace(config.optimizer, **given)


class GradientWatch:
    """Clips gradients to a norm, lets the optimizer skip a step that is not finite, and remembers who was to blame.

    Everything stays on the device until `look`: no step waits for the GPU.
    """

    def __init__(self, name: str, parameters: LocalParameters, max_norm: float, sharding: Sharding):
        """name: the player's."""
        self.name = name
        self.names, self.parameters = list(parameters.tensors), list(parameters.tensors.values())
        self.max_norm, self.group, self.device = max_norm, sharding.group, sharding.ranks.device
        self.is_sharded = torch.tensor([parameters.is_sharded(n) for n in self.names], device=self.device)
        self.num_bad = torch.zeros((), dtype=torch.int64, device=self.device)
        self.first_bad = torch.full((3,), -1, dtype=torch.int64, device=self.device)  # step, parameter, pass
        self.passes: list[range] = []  # samples of this step's passes so far, the same places in every step
        self.last_passes: list[range] = []
        self.losses: list[Tensor] = []

    def see(self, loss: Tensor, samples: range) -> None:
        """Remember the loss of a pass over samples of this step."""
        self.losses.append(loss.detach())
        self.passes.append(samples)

    @torch.no_grad()
    def clip(self, step: int) -> tuple[Tensor, Tensor]:
        """Scale gradients down to max_norm. Returns their norm before, and 1.0 to skip this step, else 0.0."""
        norms = self.norms()
        norm = torch.linalg.vector_norm(norms)
        scale = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        for device, grads in self.gradients().items():
            torch._foreach_mul_(grads, scale.to(device))
        is_bad = ~torch.isfinite(norm)
        culprit = (~torch.isfinite(norms)).to(torch.uint8).argmax()
        bad_losses = ~torch.isfinite(torch.stack(self.losses))
        bad_pass = torch.where(bad_losses.any(), bad_losses.to(torch.uint8).argmax(), -1)
        here = torch.stack([torch.full_like(culprit, step), culprit, bad_pass])
        self.first_bad = torch.where(is_bad & (self.num_bad == 0), here, self.first_bad)
        self.num_bad += is_bad
        self.last_passes, self.passes, self.losses = self.passes, [], []
        return norm, is_bad.float()

    def gradients(self) -> dict[torch.device, list[Tensor]]:
        """Gradients by where they lie (offloaded shards lie in main memory, the rest on the GPU)."""
        found: dict[torch.device, list[Tensor]] = {}
        for p in self.parameters:
            if p.grad is not None:
                found.setdefault(p.grad.device, []).append(p.grad)
        return found

    def norms(self) -> Tensor:
        """The norm of every parameter's whole gradient, 0 where there is none."""
        lengths = torch.zeros(len(self.parameters), device=self.device)
        for device, grads in self.gradients().items():
            places = [i for i, p in enumerate(self.parameters) if p.grad is not None and p.grad.device == device]
            values = torch.stack(torch._foreach_norm(grads)).float().to(self.device, non_blocking=True)
            if len(places) == len(lengths):
                lengths = values
            else:
                lengths[torch.tensor(places, device=self.device)] = values
        if self.group is not None:
            parts = torch.where(self.is_sharded, lengths.square(), 0.0)
            dist.all_reduce(parts, group=self.group)
            lengths = torch.where(self.is_sharded, parts.sqrt(), lengths)
        return lengths

    def look(self) -> None:
        """Tell of skipped steps (one sync); raise FloatingPointError when they are too many to be an accident."""
        num_bad = int(self.num_bad)
        if num_bad == 0:
            return
        step, culprit, bad_pass = self.first_bad.tolist()
        what = f"step {step}: the gradient of {self.name}.{self.names[culprit]} is not finite"
        if bad_pass >= 0:
            samples = self.last_passes[bad_pass]
            what += f", nor is the loss of samples {samples.start} to {samples.stop - 1} of that step"
        if num_bad > MAX_BAD_STEPS:
            raise FloatingPointError(
                f"{what}, and {num_bad - 1} steps after it; weights and checkpoint are those before it: "
                "resume with a lower optimizer.lr, or with mixed_precision=false"
            )
        logger.warning("%s; %d step(s) skipped", what, num_bad)
        self.num_bad.zero_()
