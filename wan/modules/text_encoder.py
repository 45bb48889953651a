"""Wan's text encoder: transformers' umT5, loaded from and saved under the names of Wan's own `.pth`.

text -> TextTokenizer -> ids, mask [B, T] -> encode -> prompt_embeds [B, T, D], zero beyond each text's length
"""

from __future__ import annotations

import html
import importlib.util
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wan.modules.weights import check_same_tensors, read_tensors, save_safetensors

if TYPE_CHECKING:
    from transformers import UMT5Config, UMT5EncoderModel

logger = logging.getLogger(__name__)

# google/umt5-xxl, whose encoder Wan uses; transformers.UMT5Config's names.
UMT5_XXL_SIZES = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
}

# Wan's name -> transformers' name, outside and inside block i (`blocks.i.` -> `encoder.block.i.layer.`).
TOP_NAMES = {
    "token_embedding.weight": "shared.weight",
    "norm.weight": "encoder.final_layer_norm.weight",
}
BLOCK_NAMES = {
    "norm1.weight": "0.layer_norm.weight",
    "attn.q.weight": "0.SelfAttention.q.weight",
    "attn.k.weight": "0.SelfAttention.k.weight",
    "attn.v.weight": "0.SelfAttention.v.weight",
    "attn.o.weight": "0.SelfAttention.o.weight",
    "pos_embedding.embedding.weight": "0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "1.layer_norm.weight",
    "ffn.gate.0.weight": "1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "1.DenseReluDense.wo.weight",
}


def transformers_name(wan_name: str) -> str:
    """`blocks.3.attn.q.weight` -> `encoder.block.3.layer.0.SelfAttention.q.weight`."""
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", wan_name):
        return f"encoder.block.{match[1]}.layer.{BLOCK_NAMES[match[2]]}"
    return TOP_NAMES[wan_name]


def to_wan_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A UMT5EncoderModel's tensors under the names of `models_t5_umt5-xxl-enc-bf16.pth`, ready to be saved.

    The token embedding, which transformers lists twice, appears once.
    """
    tops = {theirs: wan for wan, theirs in TOP_NAMES.items()}
    blocks = {theirs: wan for wan, theirs in BLOCK_NAMES.items()}
    renamed = {}
    for name, tensor in state_dict.items():
        if match := re.fullmatch(r"encoder\.block\.(\d+)\.layer\.(.+)", name):
            renamed[f"blocks.{match[1]}.{blocks[match[2]]}"] = tensor
        elif name != "encoder.embed_tokens.weight":
            renamed[tops[name]] = tensor
    return renamed


def umt5_config(sizes: Mapping[str, int]) -> UMT5Config:
    """transformers' config for these sizes (the keys of UMT5_XXL_SIZES), without dropout: Wan's encoder is frozen."""
    from transformers import UMT5Config

    missing = UMT5_XXL_SIZES.keys() - sizes.keys()
    if missing:
        raise ValueError(f"the text encoder's sizes lack {', '.join(sorted(missing))}; needed: {list(UMT5_XXL_SIZES)}")
    return UMT5Config(
        **{name: sizes[name] for name in UMT5_XXL_SIZES}, feed_forward_proj="gated-gelu", dropout_rate=0.0
    )


def load_umt5(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> UMT5EncoderModel:
    """The text encoder in a file with Wan's names (`.pth` or `.safetensors`), frozen, in eval mode.

    Sizes come from `<stem>.json` beside it (keys of UMT5_XXL_SIZES), without one they are umT5-XXL's. Tensors are
    mapped from disk and go to the device one by one: no second copy on the CPU.
    """
    from transformers import UMT5EncoderModel

    path = Path(path)
    sizes_file = path.with_suffix(".json")
    config = umt5_config(json.loads(sizes_file.read_text()) if sizes_file.is_file() else UMT5_XXL_SIZES)
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    tensors = read_tensors(path)
    check_same_tensors(to_wan_names(model.state_dict()), tensors, str(path))
    tensors = {transformers_name(name): tensor.to(device, dtype) for name, tensor in tensors.items()}
    model.load_state_dict(tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"]}, assign=True)
    model.set_input_embeddings(model.shared)  # one parameter again: a later .to() must not copy it twice
    logger.info("text encoder %s: %.1fM parameters, %s on %s", path.name, model.num_parameters() / 1e6, dtype, device)
    return model.eval().requires_grad_(False)


def new_umt5(**sizes: int) -> UMT5EncoderModel:
    """A text encoder with fresh weights, float32, of these sizes (the keys of UMT5_XXL_SIZES).

    The relative position biases start local, head by head less so: -distance / 2^head (as in ALiBi, arXiv 2108.12409).
    From transformers' start near zero they must grow for thousands of steps before a word tells its neighbours from
    the rest, and until then a caption is a bag of words: "a red puppet with a blue ball" is also its opposite.
    """
    from transformers import UMT5EncoderModel

    model = UMT5EncoderModel(umt5_config(sizes))
    with torch.no_grad():
        for block in model.encoder.block:
            bias = block.layer[0].SelfAttention.relative_attention_bias.weight  # [buckets, heads]; half look forward
            distance = torch.arange(len(bias)) % (len(bias) // 2)
            bias.copy_(-distance[:, None] / 2.0 ** torch.arange(bias.shape[1]))
    return model


def save_umt5(model: UMT5EncoderModel, path: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a `.safetensors` under Wan's names and `<stem>.json` beside it: what `load_umt5` reads."""
    path = Path(path)
    save_safetensors(to_wan_names(model.state_dict()), path, dtype)
    sizes = {name: getattr(model.config, name) for name in UMT5_XXL_SIZES}
    path.with_suffix(".json").write_text(json.dumps(sizes, indent=2) + "\n")


def encode(model: UMT5EncoderModel, ids: Tensor, mask: Tensor, *, longest: int | None = None) -> Tensor:
    """prompt_embeds [B, T, D] of ids [B, T], where mask [B, T] is 1 on text and 0 on the padding after it.

    Padded rows are zero, as Wan's transformer expects. Differentiable. Only as many columns as the longest text has
    are computed: padding is never attended, so 512 tokens cost no more than the words in them. To know that length the
    host waits for the device; a training step gives `longest` (T is always right) and does not wait.
    """
    longest = longest or max(1, int(mask.sum(dim=1).max()))
    hidden = model(input_ids=ids[:, :longest], attention_mask=mask[:, :longest]).last_hidden_state
    hidden = hidden.masked_fill(mask[:, :longest, None] == 0, 0.0)
    return torch.nn.functional.pad(hidden, (0, 0, 0, ids.shape[1] - longest))


def clean_text(text: str) -> str:
    """Text as Wan's encoder was fed: mojibake repaired (if ftfy is installed), HTML entities and spaces tidied."""
    if importlib.util.find_spec("ftfy"):
        import ftfy

        text = ftfy.fix_text(text)
    text = html.unescape(html.unescape(text))  # twice, as in Wan: captions from the web come doubly escaped
    return re.sub(r"\s+", " ", text).strip()


class TextTokenizer:
    """A folder of Hugging Face tokenizer files (`google/umt5-xxl/`, or `tokenizer/`) applied the way Wan does."""

    def __init__(self, folder: str | Path, text_len: int):
        folder = Path(folder)
        if not (folder / "tokenizer_config.json").is_file():
            raise FileNotFoundError(
                f"no tokenizer_config.json in {folder}; expected Hugging Face tokenizer files, "
                f"which a Wan folder has in google/umt5-xxl/ and the puppet model in tokenizer/"
            )
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.text_len = text_len

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """ids and mask, both int64 [B, text_len]; the end token is included, longer texts are cut."""
        encoded = self.tokenizer(
            [clean_text(text) for text in texts],
            padding="max_length",
            truncation=True,
            max_length=self.text_len,
            return_tensors="pt",
        )
        return encoded.input_ids, encoded.attention_mask
