"""The learning rate over a run, and gradients that are clipped and watched without asking the device."""

import logging
import math

import torch
from torch import Tensor, nn

from utils.config import OptimizerConfig

logger = logging.getLogger(__name__)

MAX_BAD_STEPS = 10  # non-finite gradients between two looks before the run is given up


def learning_rate(settings: OptimizerConfig, step: int, progress: float) -> float:
    """Linear warm-up over warmup_steps, then constant, or half a cosine down to final_lr_ratio of lr at progress 1."""
    warmup = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    if settings.schedule == "constant":
        return settings.lr * warmup
    low = settings.final_lr_ratio
    return settings.lr * warmup * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class GradientWatch:
    """Clips gradients to a norm, lets the optimizer skip a step that is not finite, and remembers who was to blame.

    Everything stays on the device until `look`: no step waits for the GPU.
    """

    def __init__(self, name: str, module: nn.Module, max_norm: float):
        self.name = name
        self.names, self.parameters = zip(
            *[(n, p) for n, p in module.named_parameters() if p.requires_grad], strict=True
        )
        self.max_norm = max_norm
        device = self.parameters[0].device
        self.num_bad = torch.zeros((), dtype=torch.int64, device=device)
        self.first_bad = torch.full((2,), -1, dtype=torch.int64, device=device)  # step, parameter

    @torch.no_grad()
    def clip(self, step: int) -> tuple[Tensor, Tensor]:
        """Scale gradients down to max_norm. Returns their norm before, and 1.0 to skip this step, else 0.0."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        owners = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(grads))
        norm = torch.linalg.vector_norm(norms)
        torch._foreach_mul_(grads, (self.max_norm / (norm + 1e-6)).clamp(max=1.0))
        is_bad = ~torch.isfinite(norm)
        worst = (~torch.isfinite(norms)).to(torch.uint8).argmax()
        culprit = torch.tensor(owners, device=norm.device)[worst] if len(owners) < len(self.parameters) else worst
        here = torch.stack([torch.full_like(culprit, step), culprit])
        self.first_bad = torch.where(is_bad & (self.num_bad == 0), here, self.first_bad)
        self.num_bad += is_bad
        return norm, is_bad.float()

    def look(self) -> None:
        """Tell of skipped steps (one sync); raise FloatingPointError when they are too many to be an accident."""
        num_bad = int(self.num_bad)
        if num_bad == 0:
            return
        step, culprit = self.first_bad.tolist()
        what = f"step {step}: the gradient of {self.name}.{self.names[culprit]} is not finite"
        if num_bad > MAX_BAD_STEPS:
            raise FloatingPointError(
                f"{what}, and {num_bad - 1} steps after it; weights and checkpoint are those before it: "
                "resume with a lower optimizer.lr, or with mixed_precision=false"
            )
        logger.warning("%s; %d step(s) skipped", what, num_bad)
        self.num_bad.zero_()
