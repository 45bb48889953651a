"""Words without videos, for objectives whose student makes its own: score distillation is data-free."""

from collections.abc import Sequence
from pathlib import Path

from utils.dataset import EpochSampler, Samples, TrainingData, Words
from utils.distributed import SampleRngs, mix_seed
from utils.prompts import read_prompts
from world.captions import captions
from world.puppet import sample_scenes


class TextDataset(TrainingData):
    """A list of prompts, walked in shuffled epochs."""

    def __init__(self, prompts: Sequence[str], words: Words, *, seed: int, samples_per_step: int):
        self.prompts, self.words = list(prompts), words
        self.sampler = EpochSampler(len(self.prompts), seed, samples_per_step)

    @classmethod
    def from_file(cls, path: str | Path, words: Words, *, extended_path: str | Path | None = None, **options):
        """Prompts of a UTF-8 file, one per line; blank lines are left out, equal ones count as often as they stand.

        extended_path: line n of it, where it is not blank, is learned in place of line n. Raises FileNotFoundError for
        a missing file, ValueError for one without prompts, not in UTF-8, or whose lines do not pair.
        """
        return cls([prompt.text for prompt in read_prompts(path, extended_path)], words, **options)

    def draw(self, rngs: SampleRngs) -> Samples:
        return self.words([self.prompts[item] for item in self.sampler(rngs)])


class PuppetCaptions(TrainingData):
    """Captions of puppet scenes that nobody renders: half in full, half leaving things unsaid.

    Sample n of a player is the caption of its scene n, whoever draws it; no scene comes twice.
    """

    def __init__(self, words: Words, *, seed: int, samples_per_step: int, split: str = "train"):
        self.words, self.seed, self.samples_per_step, self.split = words, seed, samples_per_step, split

    def draw(self, rngs: SampleRngs) -> Samples:
        return self.words(self.texts(rngs.step * self.samples_per_step + rngs.samples.start, rngs))

    def texts(self, first: int, rngs: SampleRngs) -> list[str]:
        """Captions of scenes first, first + 1, ..., one for each of rngs.samples."""
        seed = mix_seed(self.seed, rngs.stream)
        scenes = sample_scenes(len(rngs.samples), seed, self.split, start=first)
        texts = []
        for place in range(len(scenes)):
            told = mix_seed(seed, first + place)
            texts += captions(scenes.select(slice(place, place + 1)), told, full=told % 2 == 0)
        return texts
