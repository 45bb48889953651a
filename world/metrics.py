"""Formulas of the measuring room. Videos are [N, T, 3, H, W] in [0, 1]; every function says over what it averages."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from world.puppet import NUM_BODY_JOINTS


def psnr(videos: Tensor, references: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB of each frame, [N, T]; with a mask [N, T, 1, H, W] of its pixels only."""
    error = (videos.float() - references.float()).square().mean(2)
    if mask is None:
        mse = error.mean((-2, -1))
    else:
        weight = mask[:, :, 0].float()
        mse = (error * weight).sum((-2, -1)) / weight.sum((-2, -1)).clamp(min=1.0)
    return -10 * torch.log10(mse.clamp(min=1e-10))


def ssim(videos: Tensor, references: Tensor) -> Tensor:
    """Structural similarity of each frame, [N, T]: 11 x 11 Gaussian window, sigma 1.5, as in Wang et al. 2004."""
    n, t = videos.shape[:2]
    x, y = videos.flatten(0, 1).float(), references.flatten(0, 1).float()
    axis = torch.arange(11, device=x.device, dtype=torch.float32) - 5
    gauss = torch.exp(-(axis**2) / (2 * 1.5**2))
    gauss = gauss / gauss.sum()

    def blur(image: Tensor) -> Tensor:
        channels = image.shape[1]
        image = F.conv2d(image, gauss.view(1, 1, 11, 1).expand(channels, 1, 11, 1), groups=channels)
        return F.conv2d(image, gauss.view(1, 1, 1, 11).expand(channels, 1, 1, 11), groups=channels)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    cov = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    score = ((2 * mean_x * mean_y + c1) * (2 * cov + c2)) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return score.mean((1, 2, 3)).view(n, t)


def flicker(videos: Tensor) -> Tensor:
    """How much a typical pixel jumps there and back, [N]: mean over time of |x[t-1] - 2 x[t] + x[t+1]|, in 1/255.

    The median over pixels: most are background, where a true video has none; edges that move are not flicker.
    """
    videos = videos.float()
    jumps = (videos[:, :-2] - 2 * videos[:, 1:-1] + videos[:, 2:]).abs().mean((1, 2))
    return jumps.flatten(1).median(1).values * 255


def pck(pred_joints: Tensor, true_joints: Tensor, size: int, threshold: float = 0.05) -> Tensor:
    """Share of the 14 body joints within threshold * size of the truth, [N]; joints [N, T, 18, >= 2] in px."""
    distance = (pred_joints[..., :2] - true_joints[..., :2]).norm(dim=-1)[..., :NUM_BODY_JOINTS]
    return (distance < threshold * size).float().mean((1, 2))


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of features [n, d] (Heusel et al. 2017, eq. 6).

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2) in float64. The last trace is the nuclear norm of X1 X2^T for
    centred, scaled feature matrices X (C = X^T X): its singular values are the square roots of the eigenvalues of C1
    C2. No matrix root is taken, so n < d and singular covariances are as sound as any.
    """
    a, b = (np.asarray(x.detach().cpu(), dtype=np.float64).reshape(-1, x.shape[-1]) for x in (features, reference))
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a Frechet distance needs at least 2 samples on each side, got {len(a)} and {len(b)}")
    mean_a, mean_b = a.mean(0), b.mean(0)
    x, y = ((v - m) / np.sqrt(len(v) - 1) for v, m in ((a, mean_a), (b, mean_b)))
    # QR first: singular values of X Y^T are those of Rx Ry^T, at most d x d.
    rx, ry = np.linalg.qr(x, mode="r"), np.linalg.qr(y, mode="r")
    cross = np.linalg.svd(rx @ ry.T, compute_uv=False).sum()
    distance = ((mean_a - mean_b) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * cross
    return float(max(distance, 0.0))
