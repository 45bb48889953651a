"""Makes the environment in which MediaPipe finds poses: python scripts/pose_env.py [folder] (430 MB, once).

mediapipe 0.10.21 is the last release whose wheel brings its models; it wants numpy < 2 and protobuf < 5, which the rest
of the project does not, so it gets an environment of its own and is talked to through a pipe (utils/pose/backends.py).
"""

import argparse
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.pose.backends import ENVIRONMENT, MediaPipe  # noqa: E402

# Without mediapipe's own list, which asks for jax and a windowed OpenCV that finding poses does not need.
PACKAGES = ("mediapipe==0.10.21", "absl-py", "attrs", "flatbuffers", "numpy<2", "protobuf<5", "matplotlib", "pillow")
PACKAGES += ("opencv-python-headless<4.11", "cycler", "python-dateutil", "six", "kiwisolver", "packaging", "pyparsing")
PACKAGES += ("contourpy", "fonttools")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ENVIRONMENT, help=f"default: {ENVIRONMENT}")
    folder = parser.parse_args(argv).folder
    if not (3, 9) <= sys.version_info[:2] <= (3, 12):
        print(f"mediapipe 0.10.21 exists for Python 3.9 to 3.12, this is {sys.version.split()[0]}", file=sys.stderr)
        return 1
    venv.create(folder, with_pip=True)
    python = next(place for place in (folder / "bin/python", folder / "Scripts/python.exe") if place.exists())
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *PACKAGES], check=True)
    with MediaPipe(python):
        print(f"MediaPipe works in {python}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
