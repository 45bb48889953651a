"""The puppet text encoder, before any picture is painted: it learns to say what a caption says.

Real Wan starts from a umT5 that has read the web. A fresh encoder that learns through the transformer alone takes
long to bind words to things (whose colour is "crimson", the puppet's or the ball's?), and until then the transformer is
taught by scrambled prompts. A minute of captions with known meaning, without any video, gives it that start.
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.base import Player
from trainer.base import Trainer
from utils.config import ConfigError
from utils.distributed import SampleRngs, barrier, mix_seed
from utils.training_state import has_training_state
from wan.configs import TEXT_ENCODER_FILES, TOKENIZER_FOLDERS, WAN_CONFIGS
from wan.modules.text_encoder import TextTokenizer, encode, new_umt5, save_umt5
from world.captions import captions
from world.puppet import ACTIONS, BACKGROUNDS, BODY_COLOURS, PROPS, SPEEDS, sample_scenes
from world.tokenizer import train_tokenizer

logger = logging.getLogger(__name__)

ATTRIBUTES = {
    "body": len(BODY_COLOURS),
    "background": len(BACKGROUNDS),
    "action": len(ACTIONS),
    "speed": len(SPEEDS),
    "prop": len(PROPS),
    "prop_colour": len(BODY_COLOURS),
}
NUM_EVAL_CAPTIONS = 512


@dataclass(frozen=True)
class Captions:
    """ids and mask, int64 [B, T]; meaning: attribute -> class, int64 [B], -1 where the scene has none."""

    ids: Tensor
    mask: Tensor
    meaning: dict[str, Tensor]


class Reader(nn.Module):
    """One attribute read from prompt embeddings: a learned query picks the words, a linear layer names the class."""

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.query = nn.Parameter(torch.randn(width) * width**-0.5)
        self.head = nn.Linear(width, num_classes)

    def forward(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """embeds [B, T, D], mask [B, T] -> logits [B, num_classes]."""
        scores = (embeds @ self.query).masked_fill(mask == 0, float("-inf"))
        return self.head((scores.softmax(dim=1)[..., None] * embeds).sum(dim=1))


class TextTrainer(Trainer):
    """Cross-entropy of every attribute of the scene, read from the caption's embeddings. The readers are thrown away.

    Captions leave things unsaid at times, as the transformer's do; there the best answer is the attribute's frequency.
    """

    name = "text"

    def build(self) -> list[Player]:
        config, sizes = self.config, self.config.text_encoder
        if config.model_name not in WAN_CONFIGS:
            raise ConfigError(f"model_name is {config.model_name!r}; a new text encoder is made for one of WAN_CONFIGS")
        wanted = WAN_CONFIGS[config.model_name]
        if wanted.text_dim != sizes.d_model:
            raise ConfigError(
                f"text_encoder.d_model is {sizes.d_model}, but {config.model_name} reads prompts of width "
                f"{wanted.text_dim}; set text_encoder.d_model={wanted.text_dim}"
            )
        folder = self.run_dir / "export" / TOKENIZER_FOLDERS[0]
        if self.ranks.is_main and not has_training_state(self.run_dir):
            if config.data.tokenizer_folder:
                shutil.copytree(config.data.tokenizer_folder, folder, dirs_exist_ok=True)
            else:
                train_tokenizer(folder, max_length=wanted.text_len)
        barrier(self.ranks)
        self.tokenizer = TextTokenizer(folder, wanted.text_len)
        self.text_encoder = new_umt5(vocab_size=len(self.tokenizer.tokenizer), **vars(sizes)).to(self.device)
        self.readers = nn.ModuleDict({name: Reader(sizes.d_model, n) for name, n in ATTRIBUTES.items()}).to(self.device)
        learners = nn.ModuleDict({"text_encoder": self.text_encoder, "readers": self.readers})
        return [Player("text", learners, self.loss)]

    def prepare(self, rngs: SampleRngs) -> Captions:
        first = rngs.step * self.config.batch_size * self.num_passes * self.ranks.size + rngs.samples.start
        return self.read(len(rngs.samples), first)

    def read(self, count: int, first: int, *, split: str = "train", full: bool = False) -> Captions:
        """Captions of scenes first, first + 1, ... of this run's seed. full: nothing is left unsaid."""
        seed = self.config.seed
        scenes = sample_scenes(count, seed, split, start=first)
        ids, mask = self.tokenizer(captions(scenes, mix_seed(seed, first), full=full))
        meaning = {name: getattr(scenes, name) for name in ATTRIBUTES}
        meaning["prop_colour"] = torch.where(scenes.prop > 0, scenes.prop_colour, -1)
        return Captions(
            ids.to(self.device), mask.to(self.device), {name: m.to(self.device) for name, m in meaning.items()}
        )

    def logits(self, text: Captions) -> dict[str, Tensor]:
        embeds = encode(self.text_encoder, text.ids, text.mask)
        return {name: reader(embeds, text.mask) for name, reader in self.readers.items()}

    def loss(self, text: Captions, rngs: SampleRngs) -> tuple[Tensor, dict[str, Tensor]]:
        losses = {
            name: F.cross_entropy(logits.float(), text.meaning[name], ignore_index=-1)
            for name, logits in self.logits(text).items()
        }
        return torch.stack(list(losses.values())).mean(), {name: loss.detach() for name, loss in losses.items()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, Tensor]:
        """Accuracy per attribute on full captions of held-out combinations."""
        text = self.read(NUM_EVAL_CAPTIONS, 0, split="heldout", full=True)
        accuracies = {}
        for name, logits in self.logits(text).items():
            known = text.meaning[name] >= 0
            accuracies[name] = (logits.argmax(-1) == text.meaning[name])[known].float().mean()
        return accuracies

    def export(self, folder: Path) -> None:
        """The text encoder in bfloat16 under Wan's names, beside its tokenizer."""
        save_umt5(self.text_encoder, folder / TEXT_ENCODER_FILES[-1], torch.bfloat16)
