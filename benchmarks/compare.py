"""Reports of benchmarks/realtime.py side by side.

python benchmarks/compare.py full.json tiny.json [more.json ...]

Settings appear where they differ; with two files there is a column of ratios.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from benchmarks.stream_report import markdown


def read_report(path: Path) -> dict:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise SystemExit(f"{path} cannot be read as a report: {error}") from error
    if "settings" not in report or "machine" not in report:
        raise SystemExit(f"{path} is no report of benchmarks/realtime.py; make one with --json")
    return report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+", help="JSON files of benchmarks/realtime.py")
    arguments = parser.parse_args(argv)
    print(markdown({path.stem: read_report(path) for path in arguments.reports}), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
