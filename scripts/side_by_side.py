"""Videos and skeletons side by side, as one animated picture for a page: a person, their pose, the puppet that follows.

python scripts/side_by_side.py dance.webp person.mp4 person.npz videos/a_yellow_puppet_dances-c91fa426-seed0-0.mp4

Keypoint files (.npz, .json) are drawn. Panels are squares, scaled to cover and cut around the centre; they begin
together and end with the shortest. A .gif is about ten times as large as a .webp.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.errors import plain_errors  # noqa: E402 (run as a script, the repository is not on the path yet)
from utils.pose.draw import draw  # noqa: E402
from utils.pose.keypoints import at_fps, read_keypoints  # noqa: E402
from utils.pose.source import cover, is_keypoints  # noqa: E402
from utils.video import to_uint8, video_pieces  # noqa: E402

SUFFIXES = (".webp", ".gif")


def panel(path: Path, fps: float, side: int, profile: str) -> Tensor:
    """A video, or the drawings of a keypoint file, uint8 [F, side, side, 3]."""
    size = (side, side)
    if is_keypoints(path):
        track = at_fps(read_keypoints(path), fps)
        pieces = (cover(piece, (track.height, track.width), size) for piece in track.pieces())
        return torch.cat([draw(piece, size, size, profile) for piece in pieces]).permute(0, 2, 3, 1)
    return torch.cat([to_uint8(piece * 0.5 + 0.5) for piece in video_pieces(path, fps, *size)])


@plain_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help=f"picture to write ({', '.join(SUFFIXES)})")
    parser.add_argument("panels", type=Path, nargs="+", help="videos and keypoint files, from left to right")
    parser.add_argument("--fps", type=float, default=16, help="pictures per second (default: 16)")
    parser.add_argument("--side", type=int, default=192, help="pixels of a panel (default: 192)")
    parser.add_argument("--profile", choices=("body", "native"), default="body", help="of the drawings (default: body)")
    parser.add_argument("--quality", type=int, default=50, help="of a .webp, 0 to 100 (default: 50)")
    args = parser.parse_args(argv)
    if args.output.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{args.output} is no name for an animated picture; end it with {' or '.join(SUFFIXES)}")
    panels = [panel(path, args.fps, args.side, args.profile) for path in args.panels]
    num_frames = min(len(frames) for frames in panels)
    frames = torch.cat([frames[:num_frames] for frames in panels], dim=2)
    first, *others = (Image.fromarray(frame) for frame in frames.numpy())
    duration = round(1000 / args.fps)
    first.save(args.output, save_all=True, append_images=others, duration=duration, loop=0, quality=args.quality)
    print(f"wrote {args.output}: {num_frames} frames, {args.output.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
