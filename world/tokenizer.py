"""The small tokenizer of the puppet captions: `python -m world.tokenizer OUT` writes a Hugging Face tokenizer folder.

WordPiece, lower case, every Latin letter in the alphabet: any English word has a spelling, anything else becomes <unk>.
"""

from __future__ import annotations

import argparse
import json
import string
from pathlib import Path

from world.captions import vocabulary_sentences

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
MAX_VOCABULARY = 1024


def train_tokenizer(folder: Path, *, num_sentences: int = 20000, max_length: int = 64) -> int:
    """Train on captions, write tokenizer.json and tokenizer_config.json into `folder`; returns the vocabulary's size.

    The result loads offline with `transformers.AutoTokenizer.from_pretrained(folder)`. Deterministic.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token=UNK, max_input_chars_per_word=40))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    letters = string.ascii_lowercase + string.digits + ".,;:!?'-"
    trainer = trainers.WordPieceTrainer(
        vocab_size=MAX_VOCABULARY,
        special_tokens=[PAD, EOS, UNK],
        initial_alphabet=list(letters),
        show_progress=False,
    )
    # Letters inside a word are pieces of their own ("##a"): show each once, or unseen words would be unknown.
    spelled = [a + b for a in letters for b in letters]
    tokenizer.train_from_iterator(vocabulary_sentences(num_sentences) + spelled, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, tokenizer.token_to_id(EOS))]
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
    return tokenizer.get_vocab_size()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write")
    args = parser.parse_args(argv)
    size = train_tokenizer(args.out)
    print(f"{size} tokens written to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
