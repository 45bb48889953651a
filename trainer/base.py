"""One loop for every recipe: accumulate, average, clip, step; and save so that a resumed run is the same run."""

import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.base import Player
from trainer.graphs import GraphedPass, wants_graphs
from trainer.layout import count_passes, make_sharding
from trainer.learner import Learner
from trainer.optimization import learning_rate
from trainer.plan import plan_training
from trainer.state import OWN, compact_state, copied_state, restore_state
from utils.checkpointer import Checkpointer
from utils.config import Config, ConfigError, config_hash, dump
from utils.distributed import Ranks, Rngs, SampleRngs, barrier, broadcast_value, mix_seed
from utils.report import write_report
from utils.sharding import distribute
from utils.tracking import Tracker
from utils.training_state import StoredState, TrainingState, open_training_state, save_compact_state

logger = logging.getLogger(__name__)

CLOCK_SECONDS = 2.0  # how often ranks agree on the time; asking costs a device sync


class Trainer(ABC):
    """The loop. A recipe says who learns (`build`), what a pass sees (`prepare`), how it is judged and exported.

    All randomness of a step is a function of (seed, step, sample), so a resumed run needs no generator state, and how a
    batch is split over ranks and passes changes nothing but rounding.
    """

    name: ClassVar[str]
    can_shard: ClassVar[bool] = False  # whether the recipe's transformers may be cut over ranks
    can_graph: ClassVar[bool] = False  # whether `Player.decide` tells all that its passes decide on the host

    def __init__(self, config: Config, ranks: Ranks, run_dir: str | Path, tracker: Tracker | None = None):
        """tracker: where rank 0 logs; other ranks have none."""
        self.started = time.monotonic()
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
        self.flops: float | None = None  # of a step on one GPU, once planned
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
        torch.manual_seed(mix_seed(config.seed))
        self.sharding = make_sharding(config, ranks, self.name, can_shard=self.can_shard)
        self.frozen: list[nn.Module] = []
        self.players = self.build()
        for player in self.players:
            distribute(player.module, self.sharding)
        self.learners = [Learner(player, config, self.sharding) for player in self.players]
        self.graphs: dict[str, GraphedPass] = {}  # by the player's name
        if wants_graphs(config, self.sharding, self.name, can_graph=self.can_graph):
            for learner in self.learners:
                learner.parameters.keeps_gradients = True
                self.graphs[learner.name] = GraphedPass(partial(self.run_pass, learner), self.device)
        self.checkpointer = Checkpointer(self.run_dir, ranks, config.checkpoint.keep_last)

    # --- what a recipe says ---

    @abstractmethod
    def build(self) -> list[Player]:
        """Make networks and data; return who learns."""

    @abstractmethod
    def prepare(self, rngs: SampleRngs) -> Any:
        """The encoded batch of one pass: samples rngs.samples of step rngs.step. Called under autocast."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write what inference needs, with the averaged weights in place.

        Called on rank 0; on every rank when networks are sharded, as gathering takes them all: then `whole_state` gives
        the weights, and only rank 0 writes.
        """

    def start(self) -> None:  # noqa: B027 (optional)
        """Called once before the first step of this process; `self.step` says where the run stands."""

    def after_pass(self, learner: Learner, batch: Any, rngs: SampleRngs) -> None:  # noqa: B027 (optional)
        """Called after every pass of a learner, with what it saw."""

    def after_step(self) -> None:  # noqa: B027 (optional)
        """Called after every optimizer step, e.g. to refresh data."""

    def own_state(self) -> dict[str, Tensor]:
        """More that an uninterrupted run has and a resumed one needs, by name: this rank's part of it."""
        return {}

    def restore_own(self, stored: StoredState) -> None:  # noqa: B027 (optional)
        """Put back what `own_state` gave, as far as the saved state holds it."""

    def evaluate(self) -> dict[str, float | Tensor]:
        """Metrics on held-out data, with the averaged weights in place.

        Called on rank 0; on every rank when networks are sharded: the same passes everywhere, files on rank 0 only.
        """
        return {}

    def step_flops(self) -> float | None:
        """FLOPs of one step on one GPU, averaged over a player's rhythm; None where nobody has counted them."""
        return None

    def activation_bytes(self) -> int:
        """About what the largest pass keeps for its backward; 0 where nobody has counted it."""
        return 0

    # --- the loop ---

    def train(
        self, *, save: bool = True, visualize: bool = True, on_step: Callable[["Trainer"], None] = lambda run: None
    ) -> None:
        """Run to the end, from where the run folder stands.

        save: write states and the export; visualize: evaluate; on_step: called after every step.
        """
        self.resume()
        if not self.finished():
            self.plan()
            self.start()
        try:
            self._train(save, visualize, on_step)
        except BaseException:
            self.checkpointer.settle()
            raise

    def _train(self, save: bool, visualize: bool, on_step: Callable[["Trainer"], None]) -> None:
        settings = self.config.logging
        log_step, log_time = self.step, time.monotonic()
        self.saved_clock = self.clock
        metrics: dict[str, Tensor] = {}  # the newest since the last report: not every player learns in every step
        while not self.finished():
            metrics |= self.train_step()
            self.step += 1
            self.after_step()
            self.look_at_clock()
            on_step(self)
            last = self.finished()
            if self.step % settings.log_iters == 0 or last:
                self.report(metrics, (time.monotonic() - log_time) / (self.step - log_step))
                metrics = {}
                log_step, log_time = self.step, time.monotonic()
            if save and (last or self.save_is_due()):
                self.save()
            if visualize and (last or (settings.sample_iters and self.step % settings.sample_iters == 0)):
                self.judge()
        self.checkpointer.wait()
        if self.tracker is not None:
            logger.info("curves in %s", write_report(self.run_dir))
        if save and self.takes_part:
            self.export_averages(self.run_dir / "export")
        barrier(self.ranks)

    def plan(self) -> None:
        """Tell what the run will take."""
        helpers = [*self.frozen, *(value for value in vars(self).values() if isinstance(value, nn.Module))]
        self.flops = self.step_flops()
        plan = plan_training(
            self.learners, helpers, self.sharding, activations=self.activation_bytes(), flops=self.flops
        )
        for line in plan.lines():
            logger.info("%s", line)

    def train_step(self) -> dict[str, Tensor]:
        """One update of every player that is due; returns their metrics, on the device."""
        torch.manual_seed(mix_seed(self.config.seed, self.step + 1, self.ranks.rank))  # dropout inside networks
        metrics: dict[str, Tensor] = {}
        for stream, learner in enumerate(self.learners):
            if learner.player.due(self.step):
                metrics |= self.update(learner, Rngs(self.config.seed, self.step, self.device, stream))
        return metrics

    def update(self, learner: Learner, rngs: Rngs) -> dict[str, Tensor]:
        """Accumulate all passes of this rank, then one optimizer step."""
        metrics: dict[str, Tensor] = {}
        name, passes = learner.name, self.passes()
        graphed = self.graphs.get(name)
        for samples in passes:
            rngs_of_pass = SampleRngs(rngs, samples)
            learner.begin_pass(is_last=samples == passes[-1])
            with self.only(learner):
                with self.autocast():
                    batch = self.prepare(rngs_of_pass)
                if graphed is None:
                    loss, details = self.run_pass(learner, batch, rngs_of_pass)
                else:
                    loss, details = graphed(batch, rngs_of_pass, learner.player.decide(rngs_of_pass.shared))
            self.after_pass(learner, batch, rngs_of_pass)
            learner.watch.see(loss, samples)
            for key, value in {"loss": loss, **details}.items():
                metrics[f"{name}/{key}"] = metrics.get(f"{name}/{key}", 0) + value / self.num_passes
        return {**metrics, f"{name}/grad_norm": learner.step(self.step, self.progress())}

    def run_pass(self, learner: Learner, batch: Any, rngs: SampleRngs) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward and backward: adds this pass's share to the gradients; returns its loss and metrics, detached."""
        with self.autocast():
            loss, details = learner.player.loss(batch, rngs)
        (loss / self.num_passes).backward()
        return loss.detach(), details

    @contextlib.contextmanager
    def only(self, learner: Learner) -> Iterator[None]:
        """Others' networks may stand in this player's loss, but inside, forward and backward, they learn nothing."""
        others = [other for other in self.learners if other is not learner]
        parameters = [p for other in others for p in other.parameters.sources.values()]
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)
            for other in others:  # a sharded network's gathered weights take gradients all the same
                other.parameters.zero_grad()

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
        """Numbers of the last steps, averaged over ranks, to the tracker and one line to the log."""
        for learner in self.learners:
            learner.watch.look()
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
        for learner in self.learners:
            if learner.player.is_critic:
                numbers[f"{learner.name}/lr"] = learning_rate(learner.settings, self.step, self.progress())
        if self.flops is not None:
            numbers["tflops_per_second"] = self.flops / seconds_per_step / 1e12
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
        if self.tracker is None and self.sharding.mesh is None:
            return
        with self.averaged_weights(), torch.no_grad():
            metrics = self.evaluate()
        if metrics and self.tracker is not None:
            numbers = self.tracker.log({f"eval/{name}": value for name, value in metrics.items()}, self.step)
            logger.info("step %d  %s", self.step, "  ".join(f"{name} {value:.3f}" for name, value in numbers.items()))

    def export_averages(self, folder: Path) -> None:
        """Hand the averaged weights over to inference."""
        with self.averaged_weights():
            self.export(folder)
        logger.info("exported to %s", folder)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Every player's module that has an EMA speaks with it inside."""
        with contextlib.ExitStack() as stack:
            for ema in (learner.ema for learner in self.learners if learner.ema is not None):
                stack.enter_context(ema.swapped_in())
            yield

    # --- what is kept ---

    def save_is_due(self) -> bool:
        settings = self.config.checkpoint
        by_steps = settings.every_steps is not None and self.step % settings.every_steps == 0
        return by_steps or self.clock - self.saved_clock > settings.every_seconds

    @cached_property
    def resolved_config(self) -> str:
        """The settings as YAML: made once, for it takes longer than a small step and every state holds it."""
        return dump(self.config)

    def save(self) -> None:
        """Keep the run as it stands: compact at once, else in the background."""
        self.checkpointer.check()
        for learner in self.learners:
            learner.watch.look()
        self.saved_clock = self.clock
        settings = self.config.checkpoint
        facts = {
            "trainer": self.name,
            "step": self.step,
            "seconds": self.clock_before + time.monotonic() - self.started,
            "compact": settings.compact,
            "config_hash": config_hash(self.resolved_config),
            "config": self.resolved_config,
        }
        if not settings.compact:
            own = {OWN + name: tensor.to("cpu", copy=True) for name, tensor in self.own_state().items()}
            self.checkpointer.save(copied_state(self.learners, self.sharding) | own, facts)
        elif self.takes_part:
            state = TrainingState(compact_state(self.learners, self.ranks), facts)
            if self.ranks.is_main:
                options = {"keep_last": settings.keep_last, "max_file_mb": settings.max_file_mb}
                logger.info("saved %s", save_compact_state(self.run_dir, state, **options))

    def resume(self, state: str | None = None) -> None:
        """Go on from the newest state in the run folder, or from the one of that folder name, if there is one."""
        stored = open_training_state(self.run_dir, state)
        if stored is None:
            return
        if stored.facts["trainer"] != self.name:
            raise ConfigError(
                f"{self.run_dir} holds a run of the {stored.facts['trainer']} trainer, not {self.name}; "
                "choose another --logdir"
            )
        restore_state(self.learners, stored)
        self.restore_own(stored)
        self.step = self.last_look = stored.facts["step"]
        self.clock = self.clock_before = stored.facts["seconds"]
        if stored.facts["config_hash"] != config_hash(self.resolved_config):
            logger.info("settings differ from those of the saved run; the new ones hold from step %d", self.step)
        logger.info("resumed %s at step %d", self.run_dir, self.step)

    # --- how the networks lie ---

    @property
    def takes_part(self) -> bool:
        """Whether this rank is needed to export and to evaluate: rank 0, or all when networks are sharded."""
        return self.ranks.is_main or self.sharding.mesh is not None

    def freeze(self, network: nn.Module) -> nn.Module:
        """A network that only helps, such as a teacher: no gradients, bfloat16 under mixed precision, sharded.

        It was made on `self.sharding.build_device`.
        """
        self.frozen.append(network.eval().requires_grad_(False))
        if self.sharding.compute_dtype is not None:
            network.to(self.sharding.compute_dtype)
        distribute(network, self.sharding)
        return network
