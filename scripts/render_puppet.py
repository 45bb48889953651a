"""A puppet to try poses with: a picture of one, and another's motion as keypoints.

python scripts/render_puppet.py example --seed 3 --action dance
python inference.py --prompt "a puppet dances" --input_image example/puppet.png --ref_pose example/puppet.npz \\
    --pose example/motion.npz --image_mode ref_sink model_kwargs.sink_size=1

Writes puppet.png and puppet.npz (its joints), and motion.npz with the pictures it is of, motion.mp4.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.errors import plain_errors  # noqa: E402 (run as a script, the repository is not on the path yet)
from utils.pose.keypoints import save_keypoints  # noqa: E402
from utils.video import write_video  # noqa: E402
from world.evaluate import to_bytes  # noqa: E402
from world.puppet import ACTIONS, CANVAS, FPS, joints, sample_scenes  # noqa: E402
from world.render import render  # noqa: E402


@plain_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument("--seed", type=int, default=0, help="which two puppets (default: 0)")
    parser.add_argument("--action", choices=ACTIONS, default="dance", help="what the other does (default: dance)")
    parser.add_argument("--num_frames", type=int, default=81, help=f"of the motion, at {FPS} a second (default: 81)")
    args = parser.parse_args(argv)
    scenes = sample_scenes(2, args.seed, moving_camera=0.0)
    scenes = replace(scenes, action=torch.tensor([int(scenes.action[0]), ACTIONS.index(args.action)]))
    shown, moving = scenes.select([0]), scenes.select([1])
    args.folder.mkdir(parents=True, exist_ok=True)
    picture = to_bytes(render(shown, 1)[0, 0] * 0.5 + 0.5).permute(1, 2, 0)
    Image.fromarray(picture.numpy()).save(args.folder / "puppet.png")
    save_keypoints(args.folder / "puppet.npz", joints(shown, torch.arange(1))[0], CANVAS, CANVAS, FPS)
    track = joints(moving, torch.arange(args.num_frames))[0]
    save_keypoints(args.folder / "motion.npz", track, CANVAS, CANVAS, FPS)
    write_video(args.folder / "motion.mp4", render(moving, args.num_frames)[0] * 0.5 + 0.5, FPS)
    print(f"puppet.png, puppet.npz, motion.npz and motion.mp4 are in {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
