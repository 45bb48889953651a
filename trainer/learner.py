"""A player's machinery: its parameters as this rank holds them, optimizer, average, guard, and what is kept of them."""

import torch
from torch import Tensor

from model.base import Player
from trainer.optimization import GradientWatch, learning_rate, optimizer_settings
from utils.config import Config
from utils.distributed import average_gradients
from utils.ema import EMA
from utils.sharding import LocalParameters, Sharding, defer_all_reduce, dress

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter


class Learner:
    """One player learning: backward passes in, optimizer steps out.

    The same on one GPU and on many: everything here sees `LocalParameters`.
    """

    def __init__(self, player: Player, config: Config, sharding: Sharding):
        self.player, self.name, self.sharding = player, player.name, sharding
        self.settings = optimizer_settings(config, player.is_critic)
        self.parameters = LocalParameters(player.module)
        self.ema: EMA | None = None  # nobody asks a critic of days gone by
        if not player.is_critic:
            self.ema = EMA(self.parameters.tensors, config.ema.weight, config.ema.start_step)
        self.watch = GradientWatch(player.name, self.parameters, self.settings.max_grad_norm, sharding)
        self.optimizer = torch.optim.AdamW(
            self.parameters.tensors.values(),
            lr=self.settings.lr,
            betas=(self.settings.beta1, self.settings.beta2),
            eps=self.settings.eps,
            weight_decay=self.settings.weight_decay,
            fused=True,
        )

    def begin_pass(self, *, is_last: bool) -> None:
        """is_last: of this step, after which copies of the network agree."""
        defer_all_reduce(self.player.module, not is_last)

    def step(self, step: int, progress: float) -> Tensor:
        """Average over ranks, clip, step, average over time. Returns the gradient's norm before clipping."""
        average_gradients(self.parameters.replicated, self.sharding.ranks)
        self.parameters.take_gradients()
        norm, skip = self.watch.clip(step)
        if self.sharding.offload:
            skip = skip.cpu()  # and waited for: the optimizer would fetch it without
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, step, progress)
        self.optimizer.grad_scale, self.optimizer.found_inf = None, skip  # the fused kernel skips the step itself
        self.optimizer.step()
        self.parameters.zero_grad()
        if self.ema is not None:
            self.ema.update(step)
        return norm

    # --- what is kept ---

    @property
    def averages(self) -> dict[str, Tensor]:
        return {} if self.ema is None else self.ema.average

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("weights",) if self.ema is None else ("weights", "ema")

    def state(self) -> dict[str, Tensor]:
        """This rank's parts by name, not copied: weights, averages, and the optimizer's moments once it has stepped."""
        state: dict[str, Tensor] = {}
        for name, part in self.parameters.tensors.items():
            state[f"{self.name}/weights/{name}"] = part.detach()
        for name, part in self.averages.items():
            state[f"{self.name}/ema/{name}"] = part
        for name, part in self.parameters.tensors.items():
            for kind, value in self.optimizer.state[part].items():
                state[f"{self.name}/optimizer/{kind}/{name}"] = value
        return state

    def source(self, key: str) -> Tensor:
        """The parameter that an entry of the state belongs to, as the module holds it."""
        for kind in ("weights", "ema", *(f"optimizer/{moment}" for moment in MOMENTS)):
            prefix = f"{self.name}/{kind}/"
            if key.startswith(prefix):
                return self.parameters.sources[key.removeprefix(prefix)]
        raise KeyError(key)

    def expected(self) -> dict[str, Tensor]:
        """Entries that every state of this player has, as whole tensors without memory: weights, averages if any."""
        return {
            f"{self.name}/{kind}/{name}": torch.empty(source.shape, device="meta")
            for kind in self.kinds
            for name, source in self.parameters.sources.items()
        }

    def targets(self, stored: set[str]) -> dict[str, Tensor]:
        """Empty memory on the CPU for this rank's parts of what is stored of this player."""
        targets = {}
        for name, source in self.parameters.sources.items():
            part = torch.empty_like(self.parameters.tensors[name], device="cpu", requires_grad=False)
            keys = {f"{self.name}/{kind}/{name}": part for kind in self.kinds}
            keys |= {f"{self.name}/optimizer/{kind}/{name}": part for kind in MOMENTS[1:]}
            keys |= {f"{self.name}/optimizer/step/{name}": torch.zeros(())}
            targets |= {key: dress(torch.empty_like(t), source) for key, t in keys.items() if key in stored}
        return targets

    @torch.no_grad()
    def load(self, parts: dict[str, Tensor]) -> None:
        """Go on from parts as `targets` laid them out. Without moments the optimizer starts anew."""
        for name, parameter in self.parameters.tensors.items():
            parameter.copy_(parts[f"{self.name}/weights/{name}"])
            for kind in MOMENTS:
                value = parts.get(f"{self.name}/optimizer/{kind}/{name}")
                if value is not None:  # the fused kernel walks memory: moments must lie as their parameter does
                    like = parameter if value.dim() else value.to(parameter.device)
                    self.optimizer.state[parameter][kind] = torch.empty_like(like, requires_grad=False).copy_(value)
        if self.ema is not None:
            self.ema.load_state_dict({name: parts[f"{self.name}/ema/{name}"] for name in self.parameters.tensors})
