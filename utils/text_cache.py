"""Prompt embeddings on disk, in place of a text encoder that takes 11 GB of every GPU.

Row of the index: the prompt and how many tokens it has; tensor: those tokens' embeddings [n, text_dim] (the padding
behind them is zero). The folder names encoder and tokenizer by their fingerprints: embeddings of other weights are
refused, never mixed.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.dataset import Samples, upload
from utils.distributed import Ranks
from utils.fingerprint import fingerprint
from utils.shards import Made, Shards, ShardWriter
from wan.modules.text_encoder import TextTokenizer, encode, load_umt5

KIND = "text embeddings"
PROMPTS_PER_SHARD = 256


@dataclass(frozen=True)
class TextEncoderFiles:
    """A text encoder that is not in memory. weights: its file; tokenizer: its folder; text_len: tokens of a prompt."""

    weights: Path
    tokenizer: Path
    text_len: int

    def about(self) -> dict[str, Any]:
        """What decides an embedding."""
        return {
            "kind": KIND,
            "encoder": fingerprint(self.weights),
            "tokenizer": fingerprint(self.tokenizer),
            "text_len": self.text_len,
        }

    def load(self, device: torch.device) -> Callable[[str], Tensor]:
        """The encoder: one prompt -> [n, text_dim] bfloat16, without padding."""
        tokenizer = TextTokenizer(self.tokenizer, self.text_len)
        model = load_umt5(self.weights, device=device)

        @torch.no_grad()
        def encode_prompt(prompt: str) -> Tensor:
            ids, mask = tokenizer([prompt])
            return encode(model, ids.to(device), mask.to(device))[0, : int(mask.sum())]

        return encode_prompt


def fill_text_cache(folder: str | Path, prompts: Iterable[str], encoder: TextEncoderFiles, ranks: Ranks) -> int:
    """Embed the prompts that the folder lacks, each rank its share. Returns how many those were.

    The encoder is loaded only if there are any, and is gone afterwards.
    """
    texts = {_key(prompt): prompt for prompt in prompts}
    writer = ShardWriter(Path(folder), encoder.about(), ranks, PROMPTS_PER_SHARD)
    missing = writer.missing(texts)
    if not missing:
        return 0
    encode_prompt = encoder.load(ranks.device)

    def make(keys: list[str]) -> Iterator[Made]:
        for key in keys:
            embeds = encode_prompt(texts[key])
            yield {"prompt": texts[key], "num_tokens": len(embeds)}, {"embeds": embeds}

    writer.fill(missing, make)
    return len(missing)


class TextCache:
    """Prompts to embeddings without an encoder. Called with prompts it gives the words of Samples."""

    def __init__(self, folder: str | Path, text_len: int, device: torch.device):
        self.shards = Shards(folder, KIND)
        self.items = {item.row["key"]: item for item in self.shards.items}
        self.text_len, self.device = text_len, device

    def __call__(self, prompts: Sequence[str]) -> Samples:
        """prompt_embeds [B, text_len, text_dim]; ValueError names a prompt that was never embedded."""
        return Samples(prompt_embeds=upload(torch.stack([self._padded(prompt) for prompt in prompts]), self.device))

    def _padded(self, prompt: str) -> Tensor:
        item = self.items.get(_key(prompt))
        if item is None:
            raise ValueError(
                f"{self.shards.folder} has no embedding of {prompt[:60]!r}; add it with scripts/cache_text.py"
            )
        embeds = self.shards.read(item, "embeds")
        return torch.nn.functional.pad(embeds, (0, 0, 0, self.text_len - len(embeds)))


def _key(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:32]
