"""model/scores.py, rollouts.py and causvid.py: when scores look, at what, and which clips they are shown."""

import pytest
import torch
from torch import Tensor, nn

from model.base import Batch, block_timesteps
from model.causvid import NoisyClips
from model.dmd import DMD
from model.rollouts import Rollouts
from model.scores import Critic, ScorePair, ScoreTimes
from model.sid import SiD
from pipeline.self_forcing_training import SelfForcingTrainingPipeline, Trajectory
from tests.pipeline.test_self_forcing_training import make_generator
from tests.wan.modules.test_causal_model import TOY
from utils.conditioning import Conditioning
from utils.distributed import Rngs, SampleRngs
from utils.scheduler import FlowMatchScheduler

CPU = torch.device("cpu")
CLOCK = FlowMatchScheduler(5.0)
WORDS, NO_WORDS = (Conditioning(torch.full((2, 1, 1), value)) for value in (1.0, 0.0))
CLIP = Trajectory(torch.zeros(2, 4, 3, 2, 2), t_from=750.0, t_to=500.0)


def rngs(step: int = 0, samples: int = 2) -> SampleRngs:
    return SampleRngs(Rngs(0, step, CPU), range(samples))


class Score(nn.Module):
    """x0 is `value` more than x_t, and 10 more with words."""

    def __init__(self, value: float):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))
        self.num_passes = 0

    def forward(self, x_t: Tensor, conditioning: Conditioning, t: Tensor) -> tuple[Tensor, Tensor]:
        self.num_passes += 1
        words = conditioning.prompt_embeds.reshape(-1, 1, 1, 1, 1)
        return self.value * torch.ones_like(x_t), x_t + self.value + 10 * words


def test_scores_look_once_per_clip_where_they_are_reliable():
    times = ScoreTimes(CLOCK)
    t = torch.cat([times.draw(CLIP, rngs(step, 2)) for step in range(500)])
    assert t.shape == (1000, 4) and torch.equal(t, t[:, :1].expand(-1, 4))
    assert t.min() >= 20 and t.max() == 980
    assert 0.07 < (t[:, 0] == 980).float().mean() < 0.115  # 9.2 % of the draws at shift 5
    assert times.draw(Trajectory(CLIP.latents), rngs()).shape == (2, 4)


def test_the_exit_step_bounds_the_times():
    def bounds(**options) -> tuple[float, float]:
        times = ScoreTimes(CLOCK, **options)
        t = torch.cat([times.draw(CLIP, rngs(step)) for step in range(200)])
        u = CLOCK.unwarp(t)
        return float(u.min()), float(u.max())

    low, high = bounds(ts_schedule=True, ts_schedule_max=True)
    assert 500 <= low < 510 and 740 < high <= 750
    assert bounds(ts_schedule=True)[0] >= 500 and bounds(ts_schedule=True)[1] > 800
    assert bounds(min_timestep=900.0)[0] >= 900
    free = ScoreTimes(CLOCK, ts_schedule=True, ts_schedule_max=True)
    t = torch.cat([free.draw(Trajectory(CLIP.latents), rngs(step)) for step in range(200)])
    assert t.min() < 500, "blocks left at different steps: nothing to go by"


def test_guidance_is_w_and_one_saves_a_pass():
    scores = ScorePair(Score(1.0), Score(2.0), real_guidance_scale=4.0, fake_guidance_scale=1.0)
    x = torch.zeros(2, 4, 3, 2, 2)
    real, fake = scores(x, torch.full((2, 4), 500.0), Batch(None, WORDS, NO_WORDS))
    assert real.unique().item() == 1 + 4 * 10  # 1 + 10 * (0 + 4 (1 - 0))
    assert fake.unique().item() == 2 + 10
    assert (scores.real.num_passes, scores.fake.num_passes) == (2, 1)


def judged(objective: type) -> tuple[Tensor, ScorePair]:
    """A clip whose first two frames cannot learn, after its backward pass, and its scores."""
    x = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scores, made = ScorePair(Score(1.0), Score(3.0)), Trajectory(x, first_grad_frame=2)
    loss, _ = objective(lambda batch, rngs: made, scores, ScoreTimes(CLOCK)).loss(Batch(None, WORDS, NO_WORDS), rngs())
    loss.backward()
    return x.grad, scores


def test_dmd_counts_frames_that_learn_and_stops_at_the_scores():
    gradient, scores = judged(DMD)
    assert gradient[:, :2].abs().max() == 0 and gradient[:, 2:].abs().min() > 0
    assert scores.fake.value.grad is None and scores.real.value.grad is None


def test_sid_goes_through_the_scores():
    gradient, scores = judged(SiD)
    assert gradient.abs().min() > 0
    assert scores.fake.value.grad is not None  # which is why the trainer lets one player learn at a time


def test_the_critic_sees_clips_without_their_history():
    generator, fake = nn.Linear(1, 1), Score(1.0)

    def generate(batch: Batch, rngs: SampleRngs) -> Trajectory:
        return Trajectory(generator(rngs.randn(4, 3, 2, 2, 1))[..., 0])

    loss, _ = Critic(generate, fake, ScoreTimes(CLOCK)).loss(Batch(None, WORDS), rngs())
    loss.backward()
    assert generator.weight.grad is None and fake.value.grad is not None


def make_rollouts(num_frames: int, num_grad_frames: int = 4, **options) -> Rollouts:
    pipeline = SelfForcingTrainingPipeline(
        make_generator(), num_frame_per_block=2, denoising_step_list=[1000, 500], num_grad_frames=num_grad_frames
    )
    return Rollouts(pipeline, latent_shape=(TOY.in_dim, 4, 4), num_frames=num_frames, **options)


PROMPTS = Batch(None, Conditioning(torch.randn(2, TOY.text_len, TOY.text_dim)))


def test_rollouts_know_samples_not_batches():
    rollouts = make_rollouts(4)
    whole = rollouts(PROMPTS, rngs())
    for sample in range(2):
        alone = SampleRngs(Rngs(0, 0, CPU), range(sample, sample + 1))
        words = Conditioning(PROMPTS.conditioning.prompt_embeds[sample : sample + 1])
        part = rollouts(Batch(None, words), alone)
        torch.testing.assert_close(part.latents, whole.latents[sample : sample + 1])
        assert part.t_from == whole.t_from


def test_long_rollouts_draw_their_length_and_show_their_end():
    seen = []

    def first_latent(clip: Tensor) -> Tensor:
        seen.append(clip.shape[1])
        return torch.zeros_like(clip[:, :1])

    rollouts = make_rollouts(8, first_latent=first_latent)
    lengths = {rollouts.draw_num_frames(Rngs(0, step, CPU).shared) for step in range(60)}
    assert lengths == {4, 6, 8}
    rollouts.draw_num_frames = lambda shared: 8
    made = rollouts(PROMPTS, rngs())
    assert made.latents.shape[1] == 4 and seen == [5]  # the judged clip begins with frame 4 of 0 .. 7
    assert made.latents[:, 0].abs().max() == 0 and made.first_grad_frame == 2
    rollouts.draw_num_frames = lambda shared: 4
    assert rollouts(PROMPTS, rngs()).first_grad_frame == 0 and seen == [5]


def test_rollouts_go_on_from_given_latents():
    clip = torch.randn(2, 4, TOY.in_dim, 4, 4)
    made = make_rollouts(3, num_input_frames=1)(Batch(clip, PROMPTS.conditioning), rngs())
    assert torch.equal(made.latents[:, :1], clip[:, :1])
    assert made.latents.shape[1] == 3 and made.first_grad_frame == 1


def test_lengths_that_do_not_split_are_refused():
    with pytest.raises(ValueError, match="blocks of 2"):
        make_rollouts(5)
    with pytest.raises(ValueError, match="whose last 3 are judged do not split into blocks of 2; use 7"):
        make_rollouts(8, num_grad_frames=3, first_latent=lambda clip: clip)
    with pytest.raises(ValueError, match="need first_latent"):
        make_rollouts(8)


def test_real_clips_are_noised_to_the_samplers_times_block_by_block():
    t = torch.cat([block_timesteps([1000, 937.5, 625], 6, rngs(step), 2) for step in range(50)])
    assert t.shape == (100, 6) and torch.equal(t[:, ::2], t[:, 1::2])
    assert set(t.unique().tolist()) == {1000, 937.5, 625}
    assert (t[:, 0] != t[:, 2]).any()


@pytest.mark.parametrize("teacher_forcing", [True, False])
def test_noisy_clips_look_back_only(teacher_forcing: bool):
    generator = make_generator()
    noisy = NoisyClips(generator, CLOCK, timesteps=[1000, 625], teacher_forcing=teacher_forcing, num_frame_per_block=2)
    clip = torch.randn(2, 6, TOY.in_dim, 4, 4).requires_grad_()
    made = noisy(Batch(clip, PROMPTS.conditioning), rngs())
    assert made.latents.shape == clip.shape and made.t_to is None and made.first_grad_frame == 0
    made.latents[:, :2].sum().backward()
    assert clip.grad[:, 2:].abs().max() == 0
