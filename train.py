"""Train a model: one config, one run folder; alone or under torchrun; run again to resume.

python train.py --config_path configs/puppet_diffusion.yaml --logdir logs/puppet max_seconds=540
torchrun --nproc_per_node=2 train.py --config_path configs/puppet_vae.yaml --logdir logs/puppet_vae
"""

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer import TRAINERS
from utils.config import Config, dump, load_config
from utils.distributed import Ranks, init_distributed, shutdown
from utils.errors import plain_errors
from utils.heartbeat import Heartbeat
from utils.progress import ProgressLine
from utils.tracking import Tracker

logger = logging.getLogger(__name__)


@plain_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    overrides = args.overrides + (["logging.wandb=false"] if args.disable_wandb else [])
    config = load_config(args.config_path, overrides)
    if args.dry_run:
        print(dump(config), end="")
        return 0
    ranks = init_distributed(config.device)
    line = ProgressLine(sys.stderr)
    logging.basicConfig(
        level=logging.INFO if ranks.is_main else logging.WARNING,
        format="%(asctime)s %(message)s" if ranks.size == 1 else f"%(asctime)s [{ranks.rank}] %(message)s",
        datefmt="%H:%M:%S",
        handlers=[line],
    )
    run_dir = args.logdir or Path("logs") / Path(args.config_path).stem
    tracker = open_tracker(config, ranks, run_dir, args.wandb_save_dir)
    try:
        with Heartbeat(ranks, config.heartbeat_seconds):
            TRAINERS[config.trainer](config, ranks, run_dir, tracker).train(
                save=not args.no_save,
                visualize=not args.no_visualize,
                on_step=lambda run: line.show(run.step, run.progress(), run.seconds_left) if ranks.is_main else None,
            )
    finally:
        line.clear()
        if tracker is not None:
            tracker.close()
        shutdown()
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", required=True, help="YAML, merged over configs/default_config.yaml")
    parser.add_argument(
        "--logdir", type=Path, help="run folder (default: logs/<config name>); a run found there is resumed"
    )
    parser.add_argument("--wandb-save-dir", type=Path, help="where wandb keeps its files (default: the run folder)")
    parser.add_argument("--disable-wandb", action="store_true", help="as logging.wandb=false")
    parser.add_argument("--no_save", action="store_true", help="write neither checkpoints nor the exported model")
    parser.add_argument("--no_visualize", action="store_true", help="no evaluation and no samples while training")
    parser.add_argument("--dry_run", action="store_true", help="print the resolved config and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, e.g. optimizer.lr=1e-4")
    return parser.parse_intermixed_args(argv)


def open_tracker(config: Config, ranks: Ranks, run_dir: Path, save_dir: Path | None) -> Tracker | None:
    """The run's log on rank 0, after writing the resolved config into the run folder; None on other ranks."""
    if not ranks.is_main:
        return None
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(dump(config), encoding="utf-8")
    settings = config.logging
    return Tracker(
        run_dir,
        wandb=settings.wandb,
        project=settings.wandb_project,
        entity=settings.wandb_entity,
        mode=settings.wandb_mode,
        save_dir=save_dir,
        settings=dataclasses.asdict(config),
    )


if __name__ == "__main__":
    sys.exit(main())
