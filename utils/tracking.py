"""Where numbers go: metrics.jsonl in the run folder always, Weights & Biases if asked."""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor


class Tracker:
    """One line of metrics per call. Tensors are read (one device sync) only when logged.

    A resumed run goes on in the same file; lines of steps that are trained again appear again, the last one counts.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        wandb: bool = False,
        project: str = "longtake",
        entity: str | None = None,
        mode: str = "online",
        save_dir: str | Path | None = None,
        settings: dict[str, Any] | None = None,
    ):
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.file = (self.run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self.wandb_run = None
        if wandb:
            self.wandb_run = _wandb().init(
                project=project,
                entity=entity,
                mode=mode,
                dir=str(save_dir or self.run_dir),
                name=self.run_dir.name,
                config=settings,
            )

    def log(self, metrics: dict[str, float | Tensor], step: int) -> dict[str, float]:
        """Write metrics of `step`; returns them as plain floats."""
        values = {name: float(value) for name, value in metrics.items()}
        self.file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self.file.flush()
        if self.wandb_run is not None:
            self.wandb_run.log(values, step=step)
        return values

    def show(self, files: Iterable[Path], step: int) -> None:
        """Pictures (.png) and videos (.mp4) of the run folder, to Weights & Biases too, if asked."""
        if self.wandb_run is not None:
            kinds = {".png": _wandb().Image, ".mp4": _wandb().Video}
            media = {f"samples/{file.name}": kinds[file.suffix](str(file)) for file in files}
            self.wandb_run.log(media, step=step)

    def close(self) -> None:
        self.file.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()


def _wandb():
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            "logging.wandb is true but wandb is not installed; pip install wandb, or --disable-wandb"
        ) from error
    return wandb
