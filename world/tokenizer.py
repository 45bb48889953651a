"""The small tokenizer of the puppet captions: `python -m world.tokenizer OUT` writes a Hugging Face tokenizer folder.

WordPiece, lower case: a piece for every word of the captions, and for every letter, so that any other English word is
spelled out; what is neither becomes <unk>. The words are counted, not learned by merging, so the same captions give
the same ids.
"""

from __future__ import annotations

import argparse
import json
import re
import string
from collections import Counter
from pathlib import Path

from world.captions import vocabulary_sentences

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
MAX_VOCABULARY = 1024
MIN_COUNT = 20  # made-up names are rarer: they stay spelled out


def build_vocabulary(sentences: list[str]) -> dict[str, int]:
    """Piece -> id: special tokens, letters and signs, letters inside words, then words by how often they occur."""
    letters = string.ascii_lowercase + string.digits
    pieces = [PAD, EOS, UNK, *letters, *string.punctuation, *(f"##{letter}" for letter in letters)]
    counts = Counter(word for sentence in sentences for word in re.findall("[a-z]{2,}", sentence.lower()))
    words = sorted((-count, word) for word, count in counts.items() if count >= MIN_COUNT)
    pieces += [word for _, word in words]
    return {piece: i for i, piece in enumerate(pieces[:MAX_VOCABULARY])}


def train_tokenizer(folder: Path, *, num_sentences: int = 20000, max_length: int = 64) -> int:
    """Count words in captions and write a tokenizer folder; returns the vocabulary's size.

    The result loads offline with `transformers.AutoTokenizer.from_pretrained(folder)`; every text ends with </s>.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    vocabulary = build_vocabulary(vocabulary_sentences(num_sentences))
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNK, max_input_chars_per_word=40))
    tokenizer.add_special_tokens([PAD, EOS, UNK])
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, vocabulary[EOS])]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "pad_token": PAD,
        "eos_token": EOS,
        "unk_token": UNK,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return len(vocabulary)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write")
    args = parser.parse_args(argv)
    size = train_tokenizer(args.out)
    print(f"{size} tokens written to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
