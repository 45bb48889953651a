"""Formulas against what they must give."""

import numpy as np
import pytest
import torch

from world.metrics import flicker, frechet_distance, pck, psnr, ssim


def test_psnr_of_a_known_error():
    video = torch.full((2, 3, 3, 16, 16), 0.5)
    assert torch.allclose(psnr(video + 0.1, video), torch.full((2, 3), 20.0), atol=1e-4)
    mask = torch.zeros(2, 3, 1, 16, 16)
    mask[..., :4, :] = 1
    worse = video.clone()
    worse[..., 4:, :] = 0.0  # all of the error is off the mask
    worse[..., :4, :] += 0.01
    assert torch.allclose(psnr(worse, video, mask), torch.full((2, 3), 40.0), atol=1e-3)


def test_ssim_is_one_for_equal_and_falls_with_noise():
    video = torch.rand(1, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ssim(video, video), torch.ones(1, 2), atol=1e-5)
    assert ssim(video, video.flip(-1)).max() < 0.3


def test_flicker_sees_alternation_and_not_motion_of_a_few_pixels():
    still = torch.zeros(1, 8, 3, 16, 16)
    blinking = still.clone()
    blinking[:, ::2] = 1 / 255
    assert flicker(blinking).item() == pytest.approx(2.0)
    moving = still.clone()
    for t in range(8):
        moving[:, t, :, :3, t : t + 3] = 1
    assert flicker(moving).item() == 0


def test_pck_counts_the_fourteen_body_joints():
    true = torch.zeros(1, 2, 18, 3)
    read = true[..., :2].clone()
    read[:, :, 14:] += 100  # eyes and ears do not count
    read[:, :, :7, 0] = 6.5
    read[:, :, 7:14, 1] = 6.3
    assert pck(read, true, 128).item() == pytest.approx(0.5)


def test_frechet_distance_of_gaussians_is_the_formula():
    rng = np.random.default_rng(0)
    a = torch.from_numpy(rng.normal(size=(4000, 3)) * [1.0, 2.0, 0.5])
    b = torch.from_numpy(rng.normal(size=(4000, 3)) * [2.0, 2.0, 1.5] + [1.0, 0.0, -2.0])
    assert frechet_distance(a, b) == pytest.approx(5 + 1 + 0 + 1, rel=0.05)  # |m|^2 + sum (s1 - s2)^2
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_frechet_distance_identities_also_with_few_samples():
    features = torch.randn(20, 128, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(features, features) < 1e-9
    shift = torch.zeros(128)
    shift[0] = 3.0
    assert frechet_distance(features, features + shift) == pytest.approx(9.0, rel=1e-5)
    assert frechet_distance(features, 2 * features) == pytest.approx(
        (features.mean(0) ** 2).sum().item() + features.var(0).sum().item(), rel=1e-4
    )


def test_frechet_distance_agrees_with_the_matrix_root():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(50, 6)), rng.normal(size=(70, 6)) @ rng.normal(size=(6, 6))
    trace_of_root = np.sqrt(np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).real).sum()
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * trace_of_root
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(wanted, rel=1e-8)


def test_one_sample_has_no_spread():
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(torch.zeros(1, 4), torch.zeros(5, 4))
