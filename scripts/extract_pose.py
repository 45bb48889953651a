"""Finds the pose in a video of a person: python scripts/extract_pose.py dance.mp4 dance.npz --reference me.png

Of a folder (python scripts/extract_pose.py data/videos) every video that has none yet gets its dance.npz beside it, for
training (docs/training_data.md); a video that fails is named and left, and tried again by the next call.

Writes keypoints (.npz) that inference.py --pose takes. With --reference the motion is put on the body of the person in
that picture, and the drawing of the picture's own pose is written beside (dance_reference.png, for --ref_pose).
"""

import argparse
import os
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
from utils.pose.sides import put_sides_right  # noqa: E402
from utils.video import load_pixels, pictures_at  # noqa: E402
from utils.video_folder import VIDEO_SUFFIXES  # noqa: E402


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path, help="a video of a person, or a folder of such")
    parser.add_argument("output", type=Path, nargs="?", help=".npz to write (default: beside the video)")
    parser.add_argument("--fps", type=float, default=16, help="pictures per second that are looked at (default: 16)")
    parser.add_argument("--dwpose", type=Path, metavar="FOLDER", help="DWPose's two ONNX files; none: MediaPipe")
    parser.add_argument("--mediapipe", type=Path, metavar="PYTHON", help="of an environment with MediaPipe")
    parser.add_argument("--reference", type=Path, metavar="IMAGE", help="the person who is to move so")
    parser.add_argument("--profile", choices=PROFILES, default="legacy", help="of the reference's drawing")
    arguments = parser.parse_args(argv)
    if arguments.video.is_dir() and (arguments.output or arguments.reference):
        raise ValueError(
            f"{arguments.video} is a folder: keypoints lie beside its videos, each on its own body; leave out output "
            "and --reference, or give one video"
        )
    arguments.output = arguments.output or arguments.video.with_suffix(".npz")
    return arguments


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


def find_pose(video: Path, fps: float, backend: PoseBackend) -> tuple[torch.Tensor, tuple[int, int]]:
    """Joints [F, 134, 3] of a video, and its (height, width)."""
    pictures = map(bytes_of, pictures_at(video, fps))
    first = next(pictures, None)
    if first is None:
        raise ValueError(f"{video} holds no pictures")
    everything = (picture for part in ([first], pictures) for picture in part)
    points = torch.stack([*tqdm(detect_pose(everything, backend), unit="picture", leave=False)])
    points, exchanged = put_sides_right(points)
    if exchanged.any():
        print(f"{video}: left and right were the wrong way round in {int(exchanged.sum())} frames and are put right")
    return points, first.shape[:2]


def extract_folder(folder: Path, fps: float, backend: PoseBackend) -> int:
    """Keypoints beside every video that has none; how many videos failed."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in VIDEO_SUFFIXES and file.is_file())
    if not files:
        raise ValueError(f"{folder} holds no videos ({', '.join(VIDEO_SUFFIXES)})")
    waiting = [file for file in files if not file.with_suffix(".npz").is_file()]
    print(f"{len(files) - len(waiting)} of {len(files)} videos in {folder} have keypoints already")
    failed, number = 0, len(waiting)
    while waiting:
        with backend:  # begun anew after a failure: it may have been its own
            while waiting:
                video = waiting.pop(0)
                output, done = video.with_suffix(".npz"), f"{number - len(waiting)} of {number}"
                partial = output.with_name(f".{output.stem}.{os.getpid()}.partial.npz")
                try:
                    points, (height, width) = find_pose(video, fps, backend)
                    save_keypoints(partial, points, width, height, fps)
                    partial.replace(output)
                except (ValueError, OSError) as error:
                    partial.unlink(missing_ok=True)
                    failed += 1
                    print(f"{done}: left out: {video}: {error}")
                    break
                print(f"{done}: wrote {output}, {len(points)} frames", flush=True)
    print(f"{number - failed} videos done, {failed} left out")
    return failed


@plain_errors
def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    backend, reason = choose_backend(arguments.dwpose, arguments.mediapipe)
    print(reason)
    if arguments.video.is_dir():
        return int(extract_folder(arguments.video, arguments.fps, backend) > 0)
    with backend:
        points, size = find_pose(arguments.video, arguments.fps, backend)
        if arguments.reference is not None:
            points, size = fit_to_reference(points, arguments.reference, backend, arguments)
    save_keypoints(arguments.output, points, size[1], size[0], arguments.fps)
    print(f"wrote {arguments.output}: {len(points)} frames")
    return 0


if __name__ == "__main__":
    sys.exit(main())
