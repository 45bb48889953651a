"""Denoising losses by the quantity they compare; `denoising_loss_type` picks one.

All follow from x_t = (1 - sigma) x0 + sigma eps and flow = eps - x0 (rectified flow, arXiv 2209.03003). They take
flow_pred, x0, noise, x_t [B, F, C, H, W] and t [B, F] in [0, 1000], and return the squared error [B, F] in float32,
averaged over channels and space only, so that a caller may weight frames.
"""

from collections.abc import Callable

from torch import Tensor


def flow_loss(flow_pred: Tensor, x0: Tensor, noise: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """|flow_pred - (eps - x0)|^2: the same weight for every noise level."""
    return _per_frame(flow_pred.float() - (noise.float() - x0.float()))


def x0_loss(flow_pred: Tensor, x0: Tensor, noise: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """|x0_pred - x0|^2 with x0_pred = x_t - sigma flow: sigma^2 times the flow loss."""
    return _per_frame(x_t.float() - _sigma(t) * flow_pred.float() - x0.float())


def noise_loss(flow_pred: Tensor, x0: Tensor, noise: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """|eps_pred - eps|^2 with eps_pred = x_t + (1 - sigma) flow: (1 - sigma)^2 times the flow loss."""
    return _per_frame(x_t.float() + (1 - _sigma(t)) * flow_pred.float() - noise.float())


def _sigma(t: Tensor) -> Tensor:
    return (t.float() / 1000)[..., None, None, None]


def _per_frame(error: Tensor) -> Tensor:
    return error.square().mean(dim=(-3, -2, -1))


DENOISING_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "flow": flow_loss,
    "x0": x0_loss,
    "noise": noise_loss,
}
