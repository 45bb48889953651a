"""Low-rank updates (LoRA, arXiv 2106.09685) merged into a transformer's weights: W + alpha * B A."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn as nn
from torch import Tensor

from .float8 import Float8Linear

logger = logging.getLogger(__name__)

# pipe.dit.blocks.0.self_attn.q.lora_A.default.weight (PEFT), diffusion_model.blocks.0.self_attn.q.lora_down.weight, ...
PREFIXES = re.compile(r"^(?:(?:pipe|dit|base_model|model|diffusion_model|transformer)\.)+")
LORA_NAME = re.compile(r"^(?P<module>.+)\.lora_(?P<side>A|B|down|up)(?:\.[^.]+)?\.weight$")


@dataclass
class LowRank:
    """One module's update: up [out, rank] @ down [rank, in]; scale: a file's own alpha over the rank, else 1."""

    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = field(default=None)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def delta(self, device: torch.device) -> Tensor:
        """The update [out, in], float32."""
        return self.scale * (self.up.to(device, torch.float32) @ self.down.to(device, torch.float32))


def find_lora(tensors: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """A checkpoint's updates by the name of the module that they change; what is no LoRA tensor is left alone.

    Names may carry prefixes (pipe.dit., diffusion_model., model.), an adapter's name, A/B or down/up, and `.alpha`.
    """
    found: dict[str, LowRank] = {}
    for key, tensor in tensors.items():
        name = PREFIXES.sub("", key)
        if match := LORA_NAME.match(name):
            side = "down" if match["side"] in ("A", "down") else "up"
            setattr(found.setdefault(match["module"], LowRank()), side, tensor)
    for key, tensor in tensors.items():
        module = PREFIXES.sub("", key).removesuffix(".alpha")
        if key.endswith(".alpha") and module in found:
            found[module].alpha = float(tensor)
    for module, update in found.items():
        if update.down is None or update.up is None:
            raise ValueError(f"the LoRA of {module} has only one of its two halves; the file is incomplete")
        if update.down.shape[0] != update.up.shape[1]:
            raise ValueError(f"the LoRA of {module}: ranks {update.down.shape[0]} and {update.up.shape[1]} differ")
    return found


@torch.no_grad()
def merge_lora(model: nn.Module, tensors: Mapping[str, Tensor], alpha: float = 1.0) -> dict[str, int]:
    """Add alpha * B A to the weights in place; {module: rank} of what was merged.

    No division by the rank: UniAnimate trained with alpha = rank. A file's own `.alpha` entries are divided by it, as
    those who write them do. Nothing is changed unless everything fits; ValueError names the first that does not.
    """
    updates = find_lora(tensors)
    if not updates:
        raise ValueError(f"no LoRA tensors (*.lora_A.weight, *.lora_B.weight) among {len(tensors)}")
    if any(isinstance(module, Float8Linear) for module in model.modules()):
        raise ValueError(
            "a LoRA cannot be merged into float8 weights; name it in the config (lora_ckpt, pose_ckpt), which merges "
            "it before they are rounded, or set linear_dtype=auto"
        )
    weights = dict(model.named_parameters())
    for module, update in updates.items():
        weight, shape = weights.get(f"{module}.weight"), (update.up.shape[0], update.down.shape[1])
        if weight is None:
            raise ValueError(f"the LoRA changes {module}, which this model does not have; it was made for another one")
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"the LoRA changes {module} of {list(shape)}, here it is {list(weight.shape)}: it was made for a model "
                "of another size (UniAnimate's for Wan2.1-I2V-14B)"
            )
    for module, update in updates.items():
        weight = weights[f"{module}.weight"]
        weight.copy_((weight.float() + alpha * update.delta(weight.device)).to(weight.dtype))
    ranks = {module: update.rank for module, update in updates.items()}
    logger.info("LoRA merged into %d matrices, rank %s", len(ranks), "/".join(map(str, sorted({*ranks.values()}))))
    return ranks
