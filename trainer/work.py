"""The work of a score distillation step in FLOPs, pass by pass: what its time is measured against."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.rollout import FrameBlock
from utils.flops import pass_flops
from wan.configs import WanConfig


@dataclass(frozen=True)
class DistillationWork:
    """FLOPs of one sample's generator step and critic step whose rollouts leave at a given exit step.

    A backward pass is two forward ones. through_scores: SiD's way, back through both scores. 1.3B, 21 latents of 60 x
    104, a 14B teacher with guidance: 4.9e15 and 1.8e15 on average.
    """

    student: WanConfig
    real: WanConfig
    fake: WanConfig
    blocks: Sequence[FrameBlock]  # of the rollout
    tokens_per_frame: int
    window: int  # latent frames that a block sees at most
    num_steps: int  # denoising steps of the sampler
    clean_context: bool = True
    real_passes: int = 2  # 2 with guidance
    fake_passes: int = 1
    through_scores: bool = False
    recomputation: bool = False  # blocks are computed again in the backward pass

    @property
    def num_tokens(self) -> int:
        return self.blocks[-1].stop * self.tokens_per_frame

    def walk(self, *, text_keys: bool, keys_only: bool = False) -> list[float]:
        """One forward pass over every block."""
        spans = [(b.num_frames * self.tokens_per_frame, self._seen(b) * self.tokens_per_frame) for b in self.blocks]
        options = {"text_keys": text_keys, "keys_only": keys_only}
        return [pass_flops(self.student, tokens, keys, **options) for tokens, keys in spans]

    def _seen(self, block: FrameBlock) -> int:
        return min(block.stop, self.window)

    def without_gradient(self, exit_step: int, *, exit_pass: bool) -> float:
        """A rollout's passes without gradient: those before the exit step, clean ones, and the exit pass if it learns
        nothing. The prompt's keys are made once."""
        remembered = self.walk(text_keys=False)
        passes = (exit_step + exit_pass) * sum(remembered)
        passes += sum(self.walk(text_keys=False, keys_only=True)[:-1]) if self.clean_context else 0.0
        first_text = self.walk(text_keys=True)[0] - remembered[0]
        return passes + (first_text if passes else 0.0)

    def generator_step(self, exit_step: int) -> float:
        learning = (3 + self.recomputation) * sum(self.walk(text_keys=True))
        scores = self.real_passes * self.score(self.real) + self.fake_passes * self.score(self.fake)
        return self.without_gradient(exit_step, exit_pass=False) + learning + scores

    def score(self, network: WanConfig) -> float:
        """A score of the clip and, where asked for, its gradient: of activations only, so once a forward pass for
        weights, but twice for attention, both of whose sides are activations."""
        forward = pass_flops(network, self.num_tokens)
        if not self.through_scores:
            return forward
        attention = forward - pass_flops(network, self.num_tokens, 0)
        return (2 + self.recomputation) * forward + attention

    def critic_step(self, exit_step: int) -> float:
        learning = (3 + self.recomputation) * pass_flops(self.fake, self.num_tokens)
        return self.without_gradient(exit_step, exit_pass=True) + learning

    def mean_generator_step(self) -> float:
        return sum(map(self.generator_step, range(self.num_steps))) / self.num_steps

    def mean_critic_step(self) -> float:
        return sum(map(self.critic_step, range(self.num_steps))) / self.num_steps
