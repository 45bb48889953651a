"""TeaCache (arXiv 2411.19108) for a walk in blocks: denoising steps that repeat what the step before added.

What a transformer adds to its tokens changes little from some steps to the next. TeaCache tells which from the time
modulation alone: its relative change d, through a polynomial fitted to the real change, is added up over the steps, and
a step is computed when the sum reaches the threshold; the others add what the last computed one added. The modulation
knows nothing of the content, so that the plan is made once, on the host, for all blocks, prompts and ranks. The first
step of a block and the last are always computed, and so is the clean pass that writes the cache.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from wan.modules.model import Shortcut, WanModel

logger = logging.getLogger(__name__)
DEGREE = 4  # of the polynomial, as published

# Published fits to the modulation of every block (e0), highest power first: ali-vilab/TeaCache, TeaCache4Wan2.1.
PUBLISHED = {
    "Wan2.1-T2V-1.3B": (-5.21862437e4, 9.23041404e3, -5.28275948e2, 1.36987616e1, -4.99875664e-2),
    "Wan2.1-T2V-14B": (-3.03318725e5, 4.90537029e4, -2.65530556e3, 5.87365115e1, -3.15583525e-1),
    "Wan2.1-I2V-14B-480P": (2.57151496e5, -3.54229917e4, 1.40286849e3, -1.35890334e1, 1.32517977e-1),
    "Wan2.1-I2V-14B-720P": (8.10705460e3, 2.13393892e3, -3.72934672e2, 1.66203073e1, -4.17769401e-2),
}


@dataclass(frozen=True)
class TeaCache:
    """coefficients: of the polynomial, highest power first. threshold: change that may be left out; 0: none."""

    coefficients: tuple[float, ...]
    threshold: float

    def plan(self, model: WanModel, timesteps: Tensor) -> tuple[bool, ...]:
        """Which of these steps are computed; the first and the last are."""
        changes = np.polyval(self.coefficients, modulation_changes(model, timesteps))
        computed, left_out = [True], 0.0
        for change in changes[:-1]:
            left_out += max(0.0, float(change))
            computed.append(left_out >= self.threshold)
            left_out = 0.0 if computed[-1] else left_out
        plan = (*computed, True)[: len(timesteps)]
        logger.info("TeaCache computes %d of %d steps", sum(plan), len(plan))
        return plan


@torch.no_grad()
def modulation_changes(model: WanModel, timesteps: Tensor) -> np.ndarray:
    """Relative change of the time modulation from each step to the next, |m' - m| / |m|, float64 [steps - 1]."""
    _, modulation = model.embed_time(timesteps.to(model.device).float()[None])
    modulation = modulation[0].double().flatten(1)
    return (modulation.diff(dim=0).abs().mean(1) / modulation[:-1].abs().mean(1)).cpu().numpy()


class ChangeMeter:
    """Measures on a running model what TeaCache estimates: how much what the blocks add changes from step to step.

    with ChangeMeter(model) as meter:
        pipeline.inference(...)        # with a TeaCache of threshold 0, so that every step is computed
    meter.changes()                    # [steps - 1]
    """

    def __init__(self, model: WanModel):
        self.model = model
        self._seen: WeakKeyDictionary[Shortcut, tuple[int, Tensor]] = WeakKeyDictionary()
        self._measured: dict[int, list[float]] = {}

    def __enter__(self) -> "ChangeMeter":
        self._hook = self.model.register_forward_hook(self._look, with_kwargs=True)
        return self

    def __exit__(self, *_) -> None:
        self._hook.remove()

    def _look(self, model: WanModel, inputs: tuple, options: dict, output: Tensor) -> None:
        shortcut = options.get("shortcut")
        if shortcut is None:  # the clean pass
            return
        step, before = self._seen.get(shortcut, (-1, None))
        if before is not None:
            change = (shortcut.added - before).abs().mean() / before.abs().mean()
            self._measured.setdefault(step, []).append(change.item())
        self._seen[shortcut] = step + 1, shortcut.added

    def changes(self) -> np.ndarray:
        """Mean over blocks, prompts and sides of guidance; float64 [steps - 1]."""
        return np.array([np.mean(self._measured[step]) for step in sorted(self._measured)])


@dataclass(frozen=True)
class Calibration:
    """A fit for one model's weights, and what it was made of."""

    coefficients: tuple[float, ...]
    weights: str  # fingerprint
    solver: str
    steps: int
    shift: float
    estimated_from: tuple[float, ...]  # change of the modulation, step by step
    measured: tuple[float, ...]  # and of what the blocks add

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def fit(estimated_from: Sequence[float], measured: Sequence[float]) -> tuple[float, ...]:
    """Polynomial from the modulation's changes to the measured ones, highest power first."""
    if len(measured) <= DEGREE:
        raise ValueError(
            f"{len(measured)} changes are too few to fit a polynomial of degree {DEGREE}; "
            f"calibrate with sampling_steps of {DEGREE + 2} or more"
        )
    return tuple(np.polyfit(np.asarray(estimated_from), np.asarray(measured), DEGREE).tolist())


def load_coefficients(path: Path, model_name: str, weights: str) -> tuple[float, ...]:
    """The fit for a model: of its own calibration file, or the published one. ValueError says how to make one."""
    if path.is_file():
        try:
            calibration = json.loads(path.read_text(encoding="utf-8"))
            coefficients = tuple(float(c) for c in calibration["coefficients"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no TeaCache calibration ({error!r}); make it again") from error
        if calibration.get("weights") != weights:
            logger.warning("%s was made for other weights; scripts/calibrate_teacache.py makes a new one", path)
        return coefficients
    if model_name in PUBLISHED:
        return PUBLISHED[model_name]
    raise ValueError(
        f"teacache needs to know how {model_name} changes from step to step, and there is no {path}; make it with: "
        "python scripts/calibrate_teacache.py --config_path CONFIG"
    )
