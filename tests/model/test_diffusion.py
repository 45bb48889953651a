"""model/diffusion.py: what the network is shown in each mode, and which loss comes of it."""

import pytest
import torch
from torch import Tensor, nn

from model.base import Batch, Player, block_values, num_blocks
from model.diffusion import CausalDiffusion
from utils.conditioning import Conditioning
from utils.distributed import Rngs, SampleRngs
from utils.scheduler import FlowMatchScheduler
from utils.wan_wrapper import WanDiffusionWrapper
from wan.configs import WanConfig

X0 = torch.randn(64, 6, 2, 4, 4)


class Spy(nn.Module):
    """Answers with the true flow plus an offset, and remembers what it was shown."""

    def __init__(self, offset: float = 0.0):
        super().__init__()
        self.offset = offset

    def forward(self, x_t: Tensor, conditioning: Conditioning, t: Tensor, *, clean_x=None, aug_t=None):
        self.x_t, self.t, self.clean_x, self.aug_t = x_t, t, clean_x, aug_t
        sigma = (t / 1000)[..., None, None, None]
        return (x_t - X0) / sigma + self.offset, None


def draw_loss(spy: Spy, **options) -> tuple[Tensor, dict[str, Tensor]]:
    objective = CausalDiffusion(spy, FlowMatchScheduler(shift=3.0), **options)
    rngs = SampleRngs(Rngs(0, 0, torch.device("cpu")), range(len(X0)))
    return objective.loss(Batch(X0, Conditioning(torch.zeros(len(X0), 1, 1))), rngs)


@pytest.mark.parametrize(
    "options",
    [{"teacher_forcing": True}, {"teacher_forcing": False}, {"teacher_forcing": False, "is_causal": False}],
    ids=["teacher forcing", "diffusion forcing", "bidirectional"],
)
def test_the_true_flow_costs_nothing_and_an_offset_its_square(options):
    loss, details = draw_loss(Spy(), **options)
    torch.testing.assert_close(loss, torch.tensor(0.0), atol=1e-3, rtol=0)
    loss, details = draw_loss(Spy(2.0), **options)
    torch.testing.assert_close(loss, torch.tensor(4.0), atol=1e-2, rtol=0)
    assert details.keys() == {"loss_low_noise", "loss_middle_noise", "loss_high_noise"}


def test_one_time_per_block_or_per_clip():
    spy = Spy()
    draw_loss(spy, num_frame_per_block=3)
    assert torch.equal(spy.t[:, :3], spy.t[:, :1].expand(-1, 3))
    assert (spy.t[:, 0] != spy.t[:, 3]).all()
    draw_loss(spy, is_causal=False, teacher_forcing=False)
    assert torch.equal(spy.t, spy.t[:, :1].expand(-1, 6))
    draw_loss(spy, num_frame_per_block=5, independent_first_frame=True)
    assert (spy.t[:, 0] != spy.t[:, 1]).all()


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_the_shift_moves_times_towards_noise(sampling: str):
    spy = Spy()
    draw_loss(spy, timestep_sampling=sampling)
    assert 600 < spy.t.mean() < 800  # 500 without the shift of 3
    assert spy.t.min() >= 0
    assert spy.t.max() <= 1000


def test_teacher_forcing_shows_the_clean_clip():
    spy = Spy()
    draw_loss(spy)
    assert torch.equal(spy.clean_x, X0)
    assert not spy.aug_t.any()
    draw_loss(spy, teacher_forcing=False)
    assert spy.clean_x is None


def test_noise_augmentation_is_mild_half_as_frequent_and_its_own():
    spy = Spy()
    draw_loss(spy, noise_augmentation_max_timestep=100.0)
    level = spy.aug_t[:, 0]
    assert torch.equal(spy.aug_t, level[:, None].expand(-1, 6))  # one level per clip
    assert 0 < level.max() <= 100
    assert 0.25 < (level == 0).float().mean() < 0.75
    untouched = level == 0
    assert torch.equal(spy.clean_x[untouched], X0[untouched])
    sigma = (level[~untouched] / 1000)[:, None, None, None, None]
    context_noise = (spy.clean_x[~untouched] - (1 - sigma) * X0[~untouched]) / sigma
    t = (spy.t[~untouched] / 1000)[..., None, None, None]
    target_noise = (spy.x_t[~untouched] - (1 - t) * X0[~untouched]) / t
    correlation = (context_noise * target_noise).mean() / (context_noise.std() * target_noise.std())
    assert abs(correlation) < 0.1


def test_weighting_uses_the_schedulers_bell():
    spy = Spy(1.0)
    loss, _ = draw_loss(spy, timestep_weighting=True)
    torch.testing.assert_close(loss, FlowMatchScheduler(shift=3.0).training_weight(spy.t).mean(), atol=2e-3, rtol=1e-3)


def test_a_bidirectional_model_has_no_teacher_to_force():
    with pytest.raises(ValueError, match="set teacher_forcing: false"):
        CausalDiffusion(Spy(), FlowMatchScheduler(), is_causal=False)


class Tap(nn.Module):
    """A real network whose inputs can be asked what its outputs owe them."""

    def __init__(self, network: WanDiffusionWrapper):
        super().__init__()
        self.network = network

    def forward(self, x_t, conditioning, t, *, clean_x=None, aug_t=None):
        self.inputs = {"noisy": x_t.requires_grad_()}
        if clean_x is not None:
            self.inputs["clean"] = clean_x.clone().requires_grad_()
        self.flow, _ = self.network(x_t, conditioning, t, clean_x=self.inputs.get("clean"), aug_t=aug_t)
        return self.flow, None

    def owes(self, name: str) -> list[list[bool]]:
        """[i][j]: does block i of the flow depend on block j of an input? Blocks of two frames."""
        rows = []
        for block in self.flow.split(2, dim=1):
            (gradient,) = torch.autograd.grad(block.sum(), self.inputs[name], retain_graph=True, allow_unused=True)
            rows.append([bool(part.abs().sum() > 0) for part in gradient.split(2, dim=1)])
        return rows


@pytest.mark.parametrize("mode", ["bidirectional", "diffusion forcing", "teacher forcing"])
def test_who_sees_whom(mode: str):
    causal, forced = mode != "bidirectional", mode == "teacher forcing"
    sizes = WanConfig(dim=16, ffn_dim=32, num_heads=2, num_layers=2, in_dim=2, out_dim=2, text_dim=4, text_len=2)
    network = WanDiffusionWrapper("", causal, from_scratch=True, model_config=sizes, num_frame_per_block=2)
    torch.nn.init.normal_(network.model.head.head.weight)
    tap = Tap(network)
    objective = CausalDiffusion(tap, network.scheduler, is_causal=causal, teacher_forcing=forced, num_frame_per_block=2)
    rngs = SampleRngs(Rngs(0, 0, torch.device("cpu")), range(2))
    objective.loss(Batch(torch.randn(2, 6, 2, 4, 4), Conditioning(torch.randn(2, 2, 4))), rngs)
    x, o = True, False
    if mode == "bidirectional":
        assert tap.owes("noisy") == [[x, x, x], [x, x, x], [x, x, x]]
    elif mode == "diffusion forcing":
        assert tap.owes("noisy") == [[x, o, o], [x, x, o], [x, x, x]]
    else:
        assert tap.owes("noisy") == [[x, o, o], [o, x, o], [o, o, x]]
        assert tap.owes("clean") == [[o, o, o], [x, o, o], [x, x, o]]


def test_blocks_of_a_clip():
    values = torch.tensor([[1, 2, 3]])
    assert block_values(values, 2).tolist() == [[1, 1, 2, 2, 3, 3]]
    assert block_values(values, 2, independent_first_frame=True).tolist() == [[1, 2, 2, 3, 3]]
    assert num_blocks(6, 2) == 3
    assert num_blocks(5, 2, independent_first_frame=True) == 3
    with pytest.raises(ValueError, match="do not split into blocks of 3; train on 9 or 12"):
        num_blocks(10, 3)


def test_players_take_turns():
    player = Player("critic", nn.Identity(), lambda batch, rngs: None, every=3, start_step=2)
    assert [step for step in range(9) if player.due(step)] == [2, 5, 8]
