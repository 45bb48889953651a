"""Finds the pose in a video of a person: python scripts/extract_pose.py dance.mp4 dance.npz --reference me.png

Writes keypoints (.npz) that inference.py --pose takes. With --reference the motion is put on the body of the person in
that picture, and the drawing of the picture's own pose is written beside (dance_reference.png, for --ref_pose).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.errors import plain_errors  # noqa: E402
from utils.pose.backends import PoseBackend, choose_backend, detect_pose  # noqa: E402
from utils.pose.draw import PROFILES, draw  # noqa: E402
from utils.pose.keypoints import save_keypoints  # noqa: E402
from utils.pose.retarget import fit  # noqa: E402
from utils.video import load_pixels, pictures_at  # noqa: E402


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path, help="a video of a person")
    parser.add_argument("output", type=Path, help=".npz to write")
    parser.add_argument("--fps", type=float, default=16, help="pictures per second that are looked at (default: 16)")
    parser.add_argument("--dwpose", type=Path, metavar="FOLDER", help="DWPose's two ONNX files; none: MediaPipe")
    parser.add_argument("--mediapipe", type=Path, metavar="PYTHON", help="of an environment with MediaPipe")
    parser.add_argument("--reference", type=Path, metavar="IMAGE", help="the person who is to move so")
    parser.add_argument("--profile", choices=PROFILES, default="legacy", help="of the reference's drawing")
    return parser.parse_args(argv)


def bytes_of(picture: torch.Tensor) -> np.ndarray:
    """[3, H, W], uint8 or in [0, 1] -> uint8 [H, W, 3]."""
    if picture.dtype != torch.uint8:
        picture = picture.mul(255).round().to(torch.uint8)
    return np.ascontiguousarray(picture.permute(1, 2, 0).numpy())


def fit_to_reference(points: torch.Tensor, image: Path, backend: PoseBackend, arguments: argparse.Namespace):
    """points on the body in a picture, and the picture's (height, width); its own pose is drawn beside the output."""
    picture = bytes_of(load_pixels(image))
    (reference,) = detect_pose([picture], backend)
    how, size = fit(points, reference), picture.shape[:2]
    if how.unknown:
        print(f"only scaled, because they are hidden: {', '.join(how.unknown)}")
    drawing = draw(reference[None], size, size, arguments.profile)[0]
    beside = arguments.output.with_name(f"{arguments.output.stem}_reference.png")
    Image.fromarray(bytes_of(drawing)).save(beside)
    print(f"wrote {beside}")
    return how(points), size


@plain_errors
def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    backend, reason = choose_backend(arguments.dwpose, arguments.mediapipe)
    print(reason)
    with backend:
        pictures = map(bytes_of, pictures_at(arguments.video, arguments.fps))
        first = next(pictures, None)
        if first is None:
            raise ValueError(f"{arguments.video} holds no pictures")
        size, everything = first.shape[:2], (picture for part in ([first], pictures) for picture in part)
        points = torch.stack([*tqdm(detect_pose(everything, backend), unit="picture")])
        if arguments.reference is not None:
            points, size = fit_to_reference(points, arguments.reference, backend, arguments)
    save_keypoints(arguments.output, points, size[1], size[0], arguments.fps)
    print(f"wrote {arguments.output}: {len(points)} frames")
    return 0


if __name__ == "__main__":
    sys.exit(main())
