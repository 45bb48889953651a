"""Embed every prompt of a run, so that training needs no text encoder. Run it again to go on.

    python scripts/cache_text.py --config_path configs/self_forcing_dmd.yaml data.text_cache=data/words
    torchrun --nproc_per_node=8 scripts/cache_text.py --config_path ... data.text_cache=...

train.py fills its cache itself where something is missing; this does it beforehand, on any machine.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from trainer.data import run_prompts, text_encoder_home  # noqa: E402 (run as a script, ROOT is not on the path yet)
from utils.config import ConfigError, load_config  # noqa: E402
from utils.distributed import init_distributed, shutdown  # noqa: E402
from utils.errors import plain_errors  # noqa: E402
from utils.text_cache import TextEncoderFiles, fill_text_cache  # noqa: E402
from wan.configs import (  # noqa: E402
    TEXT_ENCODER_FILES,
    TOKENIZER_FOLDERS,
    WanConfig,
    find_model_file,
    find_model_folder,
)


@plain_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", required=True, help="the run's config")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, e.g. data.text_cache=data/words")
    args = parser.parse_intermixed_args(argv)
    config = load_config(args.config_path, args.overrides)
    if not config.data.text_cache:
        raise ConfigError(f"{args.config_path}: data.text_cache is not set; say where to, e.g. data/words")
    prompts, home = run_prompts(config), text_encoder_home(config)
    weights, tokenizer = (find_model_file(home, names) for names in (TEXT_ENCODER_FILES, TOKENIZER_FOLDERS))
    text_len = WanConfig.from_folder(find_model_folder(config.model_name)).text_len
    ranks = init_distributed(config.device)
    logging.basicConfig(level=logging.INFO if ranks.is_main else logging.WARNING, format="%(message)s")
    try:
        encoder = TextEncoderFiles(weights, tokenizer, text_len)
        made = fill_text_cache(config.data.text_cache, prompts, encoder, ranks)
    finally:
        shutdown()
    if ranks.is_main:
        print(f"{made} of {len(set(prompts))} prompts embedded, the others were in {config.data.text_cache} already")
    return 0


if __name__ == "__main__":
    sys.exit(main())
