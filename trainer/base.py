"""One loop for every recipe: accumulate, average, clip, step; and save so that a resumed run is the same run."""

import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.base import Player
from trainer.optimization import GradientWatch, learning_rate
from utils.checkpoint import TrainingState, load_training_state, save_training_state
from utils.config import Config, ConfigError, config_hash, dump
from utils.distributed import (
    Ranks,
    Rngs,
    SampleRngs,
    average_gradients,
    barrier,
    broadcast_module,
    broadcast_value,
    mix_seed,
)
from utils.ema import EMA
from utils.tracking import Tracker
from wan.modules.weights import check_same_tensors

logger = logging.getLogger(__name__)

CLOCK_SECONDS = 2.0  # how often ranks agree on the time; asking costs a device sync


class Trainer(ABC):
    """The loop. A recipe says who learns (`build`), what a pass sees (`prepare`), how it is judged and exported.

    All randomness of a step is a function of (seed, step, sample), so a resumed run needs no generator state, and how a
    batch is split over ranks and passes changes nothing but rounding.
    """

    name: ClassVar[str]

    def __init__(self, config: Config, ranks: Ranks, run_dir: str | Path, tracker: Tracker | None = None):
        """tracker: where rank 0 logs; other ranks have none."""
        self.started = time.monotonic()
        if config.sharding_strategy != "no_shard" and ranks.size > 1:
            raise ConfigError(
                f"sharding_strategy is {config.sharding_strategy!r}, but the {self.name} trainer keeps whole replicas "
                "on every GPU; set sharding_strategy: no_shard"
            )
        if config.optimizer.schedule == "cosine" and config.max_steps is None and config.max_seconds is None:
            raise ConfigError(
                "a cosine schedule needs an end; set max_steps or max_seconds, or optimizer.schedule: constant"
            )
        self.config, self.ranks, self.device = config, ranks, ranks.device
        self.run_dir = Path(run_dir)
        self.tracker = tracker
        self.num_passes = count_passes(config, ranks)
        self.step = 0
        self.clock = 0.0  # seconds of the run on rank 0, resumed sessions included, as of the last look
        self.clock_before = 0.0  # of sessions before this one
        self.last_look = self.next_look = 0  # steps
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
        torch.manual_seed(mix_seed(config.seed))
        self.players = self.build()
        for player in self.players:
            broadcast_module(player.module, ranks)
        self.emas = {p.name: EMA(p.module, config.ema.weight, config.ema.start_step) for p in self.players}
        self.optimizers = {p.name: self._make_optimizer(p.module) for p in self.players}
        self.watches = {p.name: GradientWatch(p.name, p.module, config.optimizer.max_grad_norm) for p in self.players}

    # --- what a recipe says ---

    @abstractmethod
    def build(self) -> list[Player]:
        """Make networks and data; return who learns."""

    @abstractmethod
    def prepare(self, rngs: SampleRngs) -> Any:
        """The encoded batch of one pass: samples rngs.samples of step rngs.step. Called under autocast."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write what inference needs; called on rank 0 with the averaged weights in place."""

    def start(self) -> None:  # noqa: B027 (optional)
        """Called once before the first step of this process; `self.step` says where the run stands."""

    def after_step(self) -> None:  # noqa: B027 (optional)
        """Called after every optimizer step, e.g. to refresh data."""

    def evaluate(self) -> dict[str, float | Tensor]:
        """Metrics on held-out data; called on rank 0 with the averaged weights in place."""
        return {}

    # --- the loop ---

    def train(self, *, save: bool = True, visualize: bool = True) -> None:
        """Run to the end, from where the run folder stands. save: write states and the export; visualize: evaluate."""
        self.resume()
        if not self.finished():
            self.start()
        settings = self.config.logging
        log_step, log_time, saved = self.step, time.monotonic(), self.clock
        while not self.finished():
            metrics = self.train_step()
            self.step += 1
            self.after_step()
            self.look_at_clock()
            last = self.finished()
            if self.step % settings.log_iters == 0 or last:
                self.report(metrics, (time.monotonic() - log_time) / (self.step - log_step))
                log_step, log_time = self.step, time.monotonic()
            if save and (last or self.clock - saved > self.config.checkpoint.every_seconds):
                self.save()
                saved = self.clock
            if visualize and (last or (settings.sample_iters and self.step % settings.sample_iters == 0)):
                self.judge()
        if save and self.ranks.is_main:
            self.export_averages(self.run_dir / "export")
        barrier(self.ranks)

    def train_step(self) -> dict[str, Tensor]:
        """One update of every player that is due; returns their metrics, on the device."""
        torch.manual_seed(mix_seed(self.config.seed, self.step + 1, self.ranks.rank))  # dropout inside networks
        metrics: dict[str, Tensor] = {}
        for stream, player in enumerate(self.players):
            if player.due(self.step):
                metrics |= self.update(player, Rngs(self.config.seed, self.step, self.device, stream))
        return metrics

    def update(self, player: Player, rngs: Rngs) -> dict[str, Tensor]:
        """Accumulate all passes of this rank, average over ranks, clip, step, average over time."""
        metrics: dict[str, Tensor] = {}
        for samples in self.passes():
            sample_rngs = SampleRngs(rngs, samples)
            with self.autocast():
                loss, details = player.loss(self.prepare(sample_rngs), sample_rngs)
            (loss / self.num_passes).backward()
            for name, value in {"loss": loss.detach(), **details}.items():
                metrics[f"{player.name}/{name}"] = metrics.get(f"{player.name}/{name}", 0) + value / self.num_passes
        average_gradients(player.module.parameters(), self.ranks)
        norm, skip = self.watches[player.name].clip(self.step)
        optimizer = self.optimizers[player.name]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optimizer, self.step, self.progress())
        optimizer.grad_scale, optimizer.found_inf = None, skip  # the fused kernel skips the step itself
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.emas[player.name].update(self.step)
        return {**metrics, f"{player.name}/grad_norm": norm}

    def passes(self) -> list[range]:
        """This rank's samples of a step, pass by pass: places in the step's whole batch."""
        size = self.config.batch_size
        starts = [(i * self.ranks.size + self.ranks.rank) * size for i in range(self.num_passes)]
        return [range(start, start + size) for start in starts]

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.config.mixed_precision and self.device.type == "cuda":
            return torch.autocast("cuda", torch.bfloat16)
        return contextlib.nullcontext()

    # --- how far ---

    def look_at_clock(self) -> None:
        """Agree with all ranks on the run's seconds, about every CLOCK_SECONDS."""
        if self.step < self.next_look:
            return
        before = self.clock
        self.clock = broadcast_value(self.clock_before + time.monotonic() - self.started, self.ranks)
        steps = max(1, self.step - self.last_look)
        per_step = max(1e-3, (self.clock - before) / steps)
        self.last_look, self.next_look = self.step, self.step + max(1, int(CLOCK_SECONDS / per_step))

    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]; 0 for a run without end."""
        by_steps = self.step / self.config.max_steps if self.config.max_steps else 0.0
        by_seconds = self.clock / self.config.max_seconds if self.config.max_seconds else 0.0
        return min(1.0, max(by_steps, by_seconds))

    def finished(self) -> bool:
        """Whether the run, or this session of it, is over."""
        config = self.config
        return (
            (config.max_steps is not None and self.step >= config.max_steps)
            or (config.max_seconds is not None and self.clock >= config.max_seconds)
            or (config.session_seconds is not None and self.clock - self.clock_before >= config.session_seconds)
        )

    def report(self, metrics: dict[str, Tensor], seconds_per_step: float) -> None:
        """Numbers of the last step, averaged over ranks, to the tracker and one line to the log."""
        for watch in self.watches.values():
            watch.look()
        names, values = list(metrics), torch.stack([value.float() for value in metrics.values()])
        if self.ranks.size > 1:
            dist.all_reduce(values)
            values /= self.ranks.size
        if self.tracker is None:
            return
        numbers = dict(zip(names, values.tolist(), strict=True))
        numbers |= {
            "lr": learning_rate(self.config.optimizer, self.step, self.progress()),
            "seconds_per_step": seconds_per_step,
            "samples_per_second": self.num_passes * self.config.batch_size * self.ranks.size / seconds_per_step,
            "progress": self.progress(),
        }
        if self.device.type == "cuda":
            numbers["peak_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        self.tracker.log(numbers, self.step)
        losses = "  ".join(f"{n} {numbers[n]:.4f}" for n in names if n.endswith(("/loss", "/grad_norm")))
        eta = f"{self.seconds_left(seconds_per_step) / 60:.1f} min left" if self.progress() else "no end set"
        logger.info("step %d  %s  %.3f s/step  %s", self.step, losses, seconds_per_step, eta)

    def seconds_left(self, seconds_per_step: float) -> float:
        by_steps = (self.config.max_steps - self.step) * seconds_per_step if self.config.max_steps else float("inf")
        by_seconds = self.config.max_seconds - self.clock if self.config.max_seconds else float("inf")
        return max(0.0, min(by_steps, by_seconds))

    def judge(self) -> None:
        """Evaluate the averaged weights and log the result."""
        if self.tracker is None:
            return
        with self.averaged_weights(), torch.no_grad():
            metrics = self.evaluate()
        if metrics:
            numbers = self.tracker.log({f"eval/{name}": value for name, value in metrics.items()}, self.step)
            logger.info("step %d  %s", self.step, "  ".join(f"{name} {value:.3f}" for name, value in numbers.items()))

    def export_averages(self, folder: Path) -> None:
        """Hand the averaged weights over to inference."""
        with self.averaged_weights():
            self.export(folder)
        logger.info("exported to %s", folder)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Every player's module speaks with its EMA inside."""
        with contextlib.ExitStack() as stack:
            for player in self.players:
                stack.enter_context(self.emas[player.name].swapped_in())
            yield

    # --- what is kept ---

    def save(self) -> None:
        """Write the training state (rank 0; replicas are equal)."""
        for watch in self.watches.values():
            watch.look()
        if not self.ranks.is_main:
            return
        settings = self.config.checkpoint
        facts = {
            "trainer": self.name,
            "step": self.step,
            "seconds": self.clock_before + time.monotonic() - self.started,
            "compact": settings.compact,
            "config_hash": config_hash(self.config),
            "config": dump(self.config),
        }
        state = TrainingState(self.state_tensors(settings.compact), facts)
        folder = save_training_state(
            self.run_dir, state, keep_last=settings.keep_last, max_file_mb=settings.max_file_mb
        )
        logger.info("saved %s", folder)

    def state_tensors(self, compact: bool) -> dict[str, Tensor]:
        """Weights, averages and, unless compact, the optimizer's moments, by name."""
        tensors: dict[str, Tensor] = {}
        for player in self.players:
            parameters = _learning(player.module)
            tensors |= {f"{player.name}/weights/{name}": p.detach() for name, p in parameters.items()}
            tensors |= {f"{player.name}/ema/{name}": t for name, t in self.emas[player.name].state_dict().items()}
            if compact:
                continue
            for name, p in parameters.items():
                for kind, value in self.optimizers[player.name].state[p].items():
                    tensors[f"{player.name}/optimizer/{kind}/{name}"] = value
        return {name: t.bfloat16() for name, t in tensors.items()} if compact else tensors

    def resume(self) -> None:
        """Go on from the newest state in the run folder, if there is one."""
        state = load_training_state(self.run_dir)
        if state is None:
            return
        if state.facts["trainer"] != self.name:
            raise ConfigError(
                f"{self.run_dir} holds a run of the {state.facts['trainer']} trainer, not {self.name}; "
                "choose another --logdir"
            )
        for player in self.players:
            self._load_player(player, state.tensors)
        self.step = self.last_look = state.facts["step"]
        self.clock = self.clock_before = state.facts["seconds"]
        if state.facts["config_hash"] != config_hash(self.config):
            logger.info("settings differ from those of the saved run; the new ones hold from step %d", self.step)
        logger.info("resumed %s at step %d", self.run_dir, self.step)

    @torch.no_grad()
    def _load_player(self, player: Player, tensors: dict[str, Tensor]) -> None:
        prefix = f"{player.name}/weights/"
        weights = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        parameters = _learning(player.module)
        check_same_tensors(parameters, weights, f"the saved state in {self.run_dir}")
        optimizer_state = self.optimizers[player.name].state
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
            for kind in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors.get(f"{player.name}/optimizer/{kind}/{name}")
                if value is not None:  # the fused kernel walks memory: moments must lie as their parameter does
                    like = parameter if value.dim() else value.to(parameter.device)
                    optimizer_state[parameter][kind] = torch.empty_like(like).copy_(value)
        self.emas[player.name].load_state_dict({name: tensors[f"{player.name}/ema/{name}"] for name in parameters})

    def _make_optimizer(self, module: nn.Module) -> torch.optim.AdamW:
        settings = self.config.optimizer
        return torch.optim.AdamW(
            _learning(module).values(),
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )


def count_passes(config: Config, ranks: Ranks) -> int:
    """Passes that each rank accumulates per step so that total_batch_size is met exactly."""
    per_pass = config.batch_size * ranks.size
    total = config.total_batch_size or per_pass
    passes, rest = divmod(total, per_pass)
    if rest or passes == 0:
        raise ConfigError(
            f"total_batch_size {total} does not split into {ranks.size} GPU(s) x batch_size {config.batch_size}; "
            f"use {max(1, passes) * per_pass} or {(passes + 1) * per_pass}"
        )
    return passes


def _learning(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
