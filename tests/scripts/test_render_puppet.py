"""scripts/render_puppet.py: what it writes is what inference.py reads."""

from pathlib import Path

import torch

from tests.scripts.loading import load_script
from utils.pose.source import open_pose, open_reference_pose
from utils.video import load_image, read_video

SCRIPT = Path(__file__).parents[2] / "scripts" / "render_puppet.py"


def test_its_files_are_read_by_inference(tmp_path: Path):
    assert load_script(SCRIPT).main([str(tmp_path), "--seed", "3", "--num_frames", "5", "--action", "wave"]) == 0
    assert load_image(tmp_path / "puppet.png", 128, 128).shape == (3, 128, 128)
    assert read_video(tmp_path / "motion.mp4")[0].shape == (5, 3, 128, 128)
    drawing = open_reference_pose(tmp_path / "puppet.npz", (128, 128), "body")
    own, fitted = (
        torch.cat([*open_pose(tmp_path / "motion.npz", 16, (128, 128), "body", reference).pieces()])
        for reference in (None, tmp_path / "puppet.npz")
    )
    assert own.shape == fitted.shape == (5, 3, 128, 128) and drawing.any()
    assert not torch.equal(own, fitted)  # another body
