"""utils/distributed.py: randomness that knows samples, not GPUs; devices by name; gradients over ranks."""

import pytest
import torch

from utils.distributed import Ranks, Rngs, SampleRngs, _buckets, mix_seed, resolve_device, resolve_dtype

CPU = torch.device("cpu")


def test_a_sample_draws_the_same_wherever_it_is_computed():
    rngs = Rngs(seed=3, step=7, device=CPU)
    whole = SampleRngs(rngs, range(6)).randn(2, 3)
    parts = [SampleRngs(rngs, range(start, start + 2)).randn(2, 3) for start in (0, 2, 4)]
    assert torch.equal(whole, torch.cat(parts))


def test_steps_samples_streams_and_seeds_differ():
    draws = {
        SampleRngs(Rngs(seed, step, CPU, stream), range(sample, sample + 1)).rand(1).item()
        for seed in range(3)
        for step in range(3)
        for stream in range(3)
        for sample in range(3)
    }
    assert len(draws) == 81
    assert len({Rngs(0, step, CPU).shared.initial_seed() for step in range(9)}) == 9


def test_consecutive_draws_of_a_batch_differ():
    rngs = SampleRngs(Rngs(0, 0, CPU), range(2))
    assert not torch.equal(rngs.randn(4), rngs.randn(4))
    assert rngs.rand(3).shape == (2, 3)
    assert rngs.randn(3, 1).shape == (2, 3, 1)


def test_draws_are_uniform_normal_and_unrelated():
    rngs = SampleRngs(Rngs(5, 1, CPU), range(64))
    u, z = rngs.rand(4096), rngs.randn(4096)
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.003
    moments = torch.stack([(z.double() ** k).mean() for k in (1, 2, 3, 4)])
    torch.testing.assert_close(moments, torch.tensor([0.0, 1, 0, 3], dtype=torch.float64), rtol=0, atol=0.05)
    for a, b in ((z[1:], z[:-1]), (z[:, 1:], z[:, :-1]), (z[:, :2048], z[:, 2048:])):
        assert abs((a * b).mean()) < 0.01
        assert abs(((a**2 - 1) * (b**2 - 1)).mean()) < 0.03


def test_mixed_seeds_spread():
    seeds = [mix_seed(0, i) for i in range(1000)]
    assert len(set(seeds)) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert 0.4 < sum(seed >> 62 for seed in seeds) / 1000 < 0.6
    assert mix_seed(1, 2) != mix_seed(2, 1)


def test_devices_and_dtypes_by_name(monkeypatch):
    assert resolve_device("cpu") == CPU
    with pytest.raises(ValueError, match="use auto, cpu, cuda or cuda:N"):
        resolve_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == CPU
    with pytest.raises(ValueError, match="device=cpu or device=auto"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto", local_rank=1) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="there is no GPU 2: this machine has 2"):
        resolve_device("cuda:2")
    assert resolve_dtype("auto", CPU) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16


def test_buckets_keep_order_and_dtype(monkeypatch):
    monkeypatch.setattr("utils.distributed.BUCKET_ELEMENTS", 10)
    sizes = [4, 6, 1, 20, 3]
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    parameters.append(torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)))
    assert [[p.numel() for p in bucket] for bucket in _buckets(parameters)] == [[4, 6], [1], [20], [3], [2]]


def test_main_rank():
    assert Ranks(CPU).is_main
    assert not Ranks(CPU, rank=1, size=2).is_main
