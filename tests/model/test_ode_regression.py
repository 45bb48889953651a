"""model/ode_regression.py: the published loss and gradients, which state a block draws, what the network is shown."""

import pytest
import torch
from torch import Tensor, nn

from model.base import Batch
from model.ode_regression import ODERegression
from tests.golden_data import below, load_golden, wan_config
from utils.conditioning import Conditioning
from utils.distributed import Rngs, SampleRngs
from utils.scheduler import FlowMatchScheduler
from utils.wan_wrapper import WanDiffusionWrapper
from wan.modules.weights import assign_weights

STEPS = [1000.0, 937.5, 833.33, 625.0]
NOTHING = Conditioning(torch.zeros(1, 1, 1))


def rngs(count: int, start: int = 0) -> SampleRngs:
    return SampleRngs(Rngs(0, 0, torch.device("cpu")), range(start, start + count))


class Spy(nn.Module):
    """Predicts x0 wrong by `error` times the time, and remembers what it was shown."""

    def __init__(self, trajectory: Tensor, error: float = 0.0):
        super().__init__()
        self.trajectory, self.error = trajectory, error

    def forward(self, x_t: Tensor, conditioning: Conditioning, t: Tensor, *, clean_x=None):
        self.x_t, self.t, self.clean_x = x_t, t, clean_x
        return None, self.trajectory[:, -1] + self.error * t[..., None, None, None] / 1000


def numbered(clips: int, frames: int = 6) -> Tensor:
    """A trajectory whose every value is the number of its state."""
    return torch.arange(5.0)[None, :, None, None, None, None].expand(clips, 5, frames, 2, 4, 4)


def test_golden_loss_and_gradients():
    """The reference reads sigma from a table of 1000 times under shift 5, and 750, 500 and 250 lie between its rows:
    the snapped sigma is injected; ours is t / 1000."""
    golden, config = load_golden("i_ode")
    weights, sizes = load_golden("a_causal_forward")
    generator = WanDiffusionWrapper("", True, from_scratch=True, model_config=wan_config(sizes), num_frame_per_block=3)
    assign_weights(generator.model, below(weights, "w"), "golden")

    class Snapped(FlowMatchScheduler):
        def sigma(self, t, like):
            table = self.warp(torch.linspace(1000, 0, 1001)[:-1])
            nearest = table[(table - t.reshape(-1, 1)).abs().argmin(1)].reshape(t.shape)
            return super().sigma(nearest, like)

    class Drawn:
        def rand(self, blocks: int) -> Tensor:
            return (golden["draw00.randint"][:, ::3] + 0.5) / 5

    generator.scheduler = Snapped(config["scheduler_shift"])
    objective = ODERegression(generator, timesteps=golden["denoising_step_list"][:-1].tolist())
    loss, _ = objective.loss(Batch(golden["ode_latent"], Conditioning(golden["prompt_embeds"])), Drawn())
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden["loss"], atol=1e-6, rtol=1e-6)
    parameters = dict(generator.model.named_parameters())
    for name, expected in below(golden, "grad").items():
        torch.testing.assert_close(parameters[name].grad, expected, atol=1e-7, rtol=1e-5, msg=lambda m, n=name: n + m)
    norm = sum(p.grad.double().square().sum() for p in parameters.values()).sqrt()
    torch.testing.assert_close(norm, golden["grad_norm"], atol=1e-6, rtol=1e-6)


def test_every_block_draws_its_state_and_is_told_its_time():
    spy = Spy(numbered(256))
    loss, _ = ODERegression(spy, timesteps=STEPS).loss(Batch(spy.trajectory, NOTHING), rngs(256))
    assert loss == 0
    states = spy.x_t[:, :, 0, 0, 0].long()
    assert torch.equal(spy.t, torch.tensor([*STEPS, 0.0])[states])
    assert torch.equal(states[:, :3], states[:, :1].expand(-1, 3))
    assert (states[:, 0] != states[:, 3]).float().mean() > 0.7
    assert states.unique(return_counts=True)[1].min() > 256 * 6 / 5 * 0.7  # all five states about equally often
    assert spy.clean_x is None


def test_clean_blocks_are_context_and_cost_nothing():
    spy = Spy(numbered(64), error=1.0)
    loss, details = ODERegression(spy, timesteps=STEPS).loss(Batch(spy.trajectory, NOTHING), rngs(64))
    squares = (spy.t / 1000).square()
    noisy = spy.t > 0
    torch.testing.assert_close(loss, (squares.sum(1) / noisy.sum(1).clamp(min=1)).mean())
    for i, t in enumerate(STEPS):
        torch.testing.assert_close(details[f"loss_state_{i}"], torch.tensor((t / 1000) ** 2))
    assert f"loss_state_{len(STEPS)}" not in details


def test_a_batch_is_the_mean_of_its_clips():
    """So that accumulated passes are one large batch, however many of a clip's blocks are clean."""
    spy = Spy(numbered(4), error=1.0)
    objective = ODERegression(spy, timesteps=STEPS)
    whole, _ = objective.loss(Batch(spy.trajectory, NOTHING), rngs(4))
    spy.trajectory = numbered(2)
    parts = [objective.loss(Batch(numbered(2), NOTHING), rngs(2, start))[0] for start in (0, 2)]
    torch.testing.assert_close(whole, torch.stack(parts).mean())


def test_a_causal_teachers_ode_is_learned_given_the_clean_past():
    spy = Spy(numbered(64))
    objective = ODERegression(spy, timesteps=STEPS, teacher_forcing=True)
    objective.loss(Batch(spy.trajectory, NOTHING), rngs(64))
    assert torch.equal(spy.clean_x, spy.trajectory[:, -1])
    assert spy.t.min() > 0


def test_blocks_with_a_first_frame_of_its_own():
    spy = Spy(numbered(64, frames=7))
    objective = ODERegression(spy, timesteps=STEPS, num_frame_per_block=3, independent_first_frame=True)
    objective.loss(Batch(spy.trajectory, NOTHING), rngs(64))
    assert torch.equal(spy.t[:, 1:4], spy.t[:, 1:2].expand(-1, 3))
    assert (spy.t[:, 0] != spy.t[:, 1]).any()


def test_a_trajectory_with_other_states_is_refused():
    with pytest.raises(ValueError, match="hold 5 states, but the 3 steps of this run and the clean clip make 4"):
        ODERegression(Spy(numbered(1)), timesteps=STEPS[:3]).loss(Batch(numbered(1), NOTHING), rngs(1))
