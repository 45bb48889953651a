"""DMD and SiD with their critic, where everything is known: the student ends up with the teacher's distribution."""

import pytest
import torch
from torch import Tensor, nn

from model.base import Batch
from model.dmd import DMD
from model.scores import Critic, ScorePair, ScoreTimes
from model.sid import SiD
from pipeline.self_forcing_training import Trajectory
from utils.conditioning import Conditioning
from utils.distributed import Rngs, SampleRngs
from utils.scheduler import FlowMatchScheduler

CLOCK = FlowMatchScheduler(3.0)
TEACHER = (1.5, 0.5)  # mean and deviation of every element of a true clip
WORDS = Conditioning(torch.zeros(1, 1, 1))


class GaussianScore(nn.Module):
    """The exact x0 and flow of clips whose elements are N(mean, deviation^2)."""

    def __init__(self, mean: float, deviation: float):
        super().__init__()
        self.mean, self.log_deviation = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(deviation).log())

    def forward(self, x_t: Tensor, conditioning: Conditioning, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma, variance = CLOCK.sigma(t, x_t), (2 * self.log_deviation).exp()
        gain = (1 - sigma) * variance / ((1 - sigma) ** 2 * variance + sigma**2)
        x0 = self.mean + gain * (x_t - (1 - sigma) * self.mean)
        return (x_t - x0) / sigma, x0


class Student(nn.Module):
    """Clips scale * noise + shift."""

    def __init__(self):
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.tensor(-1.0)), nn.Parameter(torch.tensor(1.2))

    def forward(self, batch: Batch, rngs: SampleRngs) -> Trajectory:
        return Trajectory(self.shift + self.scale * rngs.randn(2, 2, 4, 4))


@pytest.mark.parametrize("objective_class", [DMD, SiD])
def test_the_student_becomes_what_the_teacher_describes(objective_class: type):
    student, real, fake = Student(), GaussianScore(*TEACHER).requires_grad_(False), GaussianScore(0.0, 1.0)
    times = ScoreTimes(CLOCK)
    objective = objective_class(student, ScorePair(real, fake, 1.0, 1.0), times)
    critic = Critic(student, fake, times)
    players = ((student, objective.loss, 2), (fake, critic.loss, 1))  # who learns, from what, every so many steps
    optimizers = [torch.optim.Adam(module.parameters(), lr=0.03, betas=(0.0, 0.999)) for module, _, _ in players]
    for step in range(200):
        for stream, (_, loss, every) in enumerate(players):
            if step % every == 0:
                for optimizer in optimizers:
                    optimizer.zero_grad()
                rngs = SampleRngs(Rngs(0, step, torch.device("cpu"), stream), range(16))
                loss(Batch(None, WORDS), rngs)[0].backward()
                optimizers[stream].step()
    learned = torch.stack([student.shift, student.scale.abs(), fake.mean, fake.log_deviation.exp()]).tolist()
    assert learned == pytest.approx([*TEACHER, *TEACHER], abs=0.15)
