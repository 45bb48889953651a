"""The flow-matching clock: sigma = t / 1000, one shift, no tables."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FlowMatchScheduler:
    """Rectified flow (arXiv 2209.03003): x_t = (1 - sigma) x0 + sigma eps, flow = eps - x0, sigma = t / 1000.

    shift moves times towards noise (arXiv 2403.03206, eq. 23); it changes which times are visited, never what a time
    means. In every method t is a tensor (or number) whose shape is a leading part of the latents' shape: [B, F] for [B,
    F, C, H, W].
    """

    shift: float = 5.0
    num_train_timesteps: int = 1000

    def warp(self, t: Tensor | list[float]) -> Tensor:
        """Times on the even grid -> times under the shift, in [0, 1000]: 750 -> 937.5 at shift 5. Float32."""
        u = torch.as_tensor(t).double() / self.num_train_timesteps
        return (self.num_train_timesteps * self.shift * u / (1 + (self.shift - 1) * u)).float()

    def unwarp(self, t: Tensor | list[float]) -> Tensor:
        """The inverse of warp: times under the shift -> times on the even grid. Float32."""
        u = torch.as_tensor(t).double() / self.num_train_timesteps
        return (self.num_train_timesteps * u / (self.shift - (self.shift - 1) * u)).float()

    def sigma(self, t: Tensor | float, like: Tensor) -> Tensor:
        """t / 1000 in float32, with trailing axes so that it multiplies `like`."""
        if not isinstance(t, Tensor):  # filled on the device: a copy would wait for it, once in every step of a stream
            t = torch.full((), t, dtype=torch.float32, device=like.device)
        sigma = t.to(like.device).float() / self.num_train_timesteps
        return sigma.reshape(*sigma.shape, *[1] * (like.dim() - sigma.dim()))

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """x_t at time t; float32 inside, dtype of x0. t = 0 gives x0 back exactly."""
        sigma = self.sigma(t, x0)
        return ((1 - sigma) * x0.float() + sigma * noise.float()).to(x0.dtype)

    def flow_to_x0(self, flow: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
        """x0 = x_t - sigma * flow, in float32."""
        return x_t.float() - self.sigma(t, x_t) * flow.float()

    def x0_to_flow(self, x0: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
        """flow = (x_t - x0) / sigma, in float32; t must be above 0."""
        return (x_t.float() - x0.float()) / self.sigma(t, x_t)

    def training_target(self, x0: Tensor, noise: Tensor) -> Tensor:
        """The flow eps - x0 that a network learns, in float32."""
        return noise.float() - x0.float()

    def training_weight(self, t: Tensor) -> Tensor:
        """Wan's bell-shaped loss weight: exp(-2 ((t - 500) / 1000)^2) lifted to 0 at its minimum, mean 1 over the even
        grid.

        Float32, any shape of t. The mean is taken over the shifted grid of num_train_timesteps times, as the weight's
        authors did, so it depends on the shift.
        """
        grid = self.warp(
            torch.linspace(1, 0, self.num_train_timesteps + 1, dtype=torch.float64)[:-1] * self.num_train_timesteps
        )
        bell = self._bell(grid)
        return ((self._bell(t) - bell.min()) * (len(grid) / (bell - bell.min()).sum())).float()

    def _bell(self, t: Tensor) -> Tensor:
        half = self.num_train_timesteps / 2
        return torch.exp(-2 * ((t.double() - half) / self.num_train_timesteps) ** 2)
