"""Curves of a training run: report.html (one file, no outside parts) and report.png, from its metrics.jsonl.

python scripts/report.py logs/puppet_diffusion
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.errors import plain_errors  # noqa: E402 (run as a script, the repository is not on the path yet)
from utils.report import write_report  # noqa: E402


@plain_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="run folder of train.py; it may be running")
    args = parser.parse_args(argv)
    print(write_report(args.run_dir))
    return 0


if __name__ == "__main__":
    sys.exit(main())
