"""Encode a folder of captioned videos once, so that training reads latents. Run it again to go on, or with new videos.

    python scripts/cache_latents.py --config_path configs/causal_diffusion.yaml data.kind=videos data.path=data/videos
    torchrun --nproc_per_node=8 scripts/cache_latents.py --config_path ... data.latent_cache=/scratch/latents

Size, frame rate and length of the clips and the VAE are the config's. train.py does the same before its first step;
this does it beforehand, on any number of GPUs. Afterwards data.kind=latents data.path=<latents> needs no videos.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from trainer.data import fill_latent_cache, latent_cache  # noqa: E402 (as a script, ROOT is not on the path yet)
from utils.config import ConfigError, load_config  # noqa: E402
from utils.distributed import init_distributed, resolve_dtype, shutdown  # noqa: E402
from utils.errors import plain_errors  # noqa: E402
from utils.latent_folder import LatentFolder  # noqa: E402
from utils.shards import Shards  # noqa: E402
from wan.configs import find_model_folder  # noqa: E402


@plain_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", required=True, help="the run's config")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, e.g. data.path=data/videos")
    args = parser.parse_intermixed_args(argv)
    config = load_config(args.config_path, args.overrides)
    if config.data.kind != "videos":
        raise ConfigError(f"data.kind is {config.data.kind}, which needs no encoding; set data.kind=videos")
    vae_folder = Path(config.data.vae_folder or find_model_folder(config.model_name))
    ranks = init_distributed(config.device)
    logging.basicConfig(level=logging.INFO if ranks.is_main else logging.WARNING, format="%(message)s")
    try:
        fill_latent_cache(config, vae_folder, ranks, resolve_dtype("auto", ranks.device))
    finally:
        shutdown()
    if ranks.is_main:
        items = Shards(latent_cache(config), LatentFolder.kind).items
        print(f"{sum(item.row['num_clips'] for item in items)} clips of {len(items)} videos in {latent_cache(config)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
