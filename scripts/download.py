"""Fetch published weights and prompt sets from the Hugging Face Hub, resuming what was interrupted.

    python scripts/download.py --list
    python scripts/download.py Wan2.1-T2V-1.3B self_forcing_dmd

Sizes are printed before anything is fetched. Files land where the configs look for them.
"""

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.errors import MissingPackageError, plain_errors  # noqa: E402


@dataclass(frozen=True)
class Download:
    """Files of one Hub repository and the folder (below the repository root) that they go to."""

    repository: str
    folder: str
    patterns: tuple[str, ...] | None = None  # None: everything
    repository_type: str = "model"
    about: str = ""


WAN = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.pth", "google/umt5-xxl/*")
SELF_FORCING = "gdhe17/Self-Forcing"
DOWNLOADS = {
    "Wan2.1-T2V-1.3B": Download("Wan-AI/Wan2.1-T2V-1.3B", "wan_models/Wan2.1-T2V-1.3B", WAN, about="text to video"),
    "Wan2.1-T2V-14B": Download(
        "Wan-AI/Wan2.1-T2V-14B", "wan_models/Wan2.1-T2V-14B", WAN, about="text to video, teacher"
    ),
    "Wan2.1-I2V-14B-480P": Download(
        "Wan-AI/Wan2.1-I2V-14B-480P", "wan_models/Wan2.1-I2V-14B-480P", WAN, about="image to video, 832x480"
    ),
    "Wan2.1-I2V-14B-720P": Download(
        "Wan-AI/Wan2.1-I2V-14B-720P", "wan_models/Wan2.1-I2V-14B-720P", WAN, about="image to video, 1280x720"
    ),
    "self_forcing_dmd": Download(
        SELF_FORCING, ".", ("checkpoints/self_forcing_dmd.pt",), about="4-step streaming generator, 1.3B"
    ),
    "self_forcing_sid": Download(
        SELF_FORCING, ".", ("checkpoints/self_forcing_sid.pt",), about="4-step streaming generator, 1.3B, SiD loss"
    ),
    "ode_init": Download(SELF_FORCING, ".", ("checkpoints/ode_init.pt",), about="where self-forcing training starts"),
    "vidprom": Download(
        SELF_FORCING, "prompts", ("vidprom_filtered_extended.txt",), about="248,000 prompts for data-free training"
    ),
}


def plan(download: Download) -> tuple[int, int]:
    """Bytes still to fetch and bytes in all. Needs the network."""
    files = _snapshot(download, dry_run=True)
    if not files:
        raise ValueError(
            f"{download.repository} has no files {', '.join(download.patterns or ())}; they may have moved"
        )
    sizes = [(file.file_size or 0, file.will_download) for file in files]
    return sum(size for size, missing in sizes if missing), sum(size for size, _ in sizes)


def _snapshot(download: Download, *, dry_run: bool):
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise MissingPackageError("downloads need the Hub's client: pip install huggingface_hub") from error
    try:
        return snapshot_download(
            download.repository,
            repo_type=download.repository_type,
            allow_patterns=list(download.patterns) if download.patterns else None,
            local_dir=ROOT / download.folder,
            dry_run=dry_run,
        )
    except (HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise OSError(
            f"{download.repository} cannot be reached ({reason}); connect this machine to the internet, or run "
            f"`hf download {download.repository}` on one that is and copy the files into {download.folder}/"
        ) from error


@plain_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(DOWNLOADS))
    parser.add_argument("--list", action="store_true", help="print what can be fetched, and where it goes")
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    if arguments.list or not arguments.names:
        for name, download in DOWNLOADS.items():
            print(f"{name:22} {download.repository:28} -> {download.folder + '/':34} {download.about}")
        return 0
    unknown = [name for name in arguments.names if name not in DOWNLOADS]
    if unknown:
        raise ValueError(f"nothing is called {', '.join(unknown)}; choose from {', '.join(DOWNLOADS)}")

    missing_in_all = 0
    for name in arguments.names:
        missing, size = plan(DOWNLOADS[name])
        missing_in_all += missing
        print(f"{name}: {size / 1e9:.2f} GB, {missing / 1e9:.2f} GB of it still to fetch")
    free = shutil.disk_usage(ROOT).free
    if missing_in_all > free:
        raise OSError(f"{missing_in_all / 1e9:.1f} GB are to be fetched and {free / 1e9:.1f} GB are free on this disk")
    for name in arguments.names:
        print(f"{name}: in {_snapshot(DOWNLOADS[name], dry_run=False)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
