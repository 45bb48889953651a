"""scripts/side_by_side.py: panels begin together and end with the shortest."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.scripts.loading import load_script
from utils.video import write_video

ROOT = Path(__file__).parents[2]
SCRIPT = load_script(ROOT / "scripts" / "side_by_side.py")
JACKS = ROOT / "prompts" / "jumping_jacks.npz"  # of a real person


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_a_video_beside_its_skeleton(tmp_path: Path, suffix: str, capsys):
    video, picture = write_video(tmp_path / "a.mp4", torch.ones(6, 3, 48, 80)), tmp_path / f"a{suffix}"
    assert SCRIPT.main([str(picture), str(video), str(JACKS), "--side", "64", "--fps", "8"]) == 0
    assert "3 frames" in capsys.readouterr().out
    with Image.open(picture) as image:
        assert (image.n_frames, image.size) == (3, (128, 64))
        left, right = np.split(np.asarray(image.convert("RGB")), 2, axis=1)
    assert left.min() > 240
    assert np.median(right) == 0 and right.max() > 200


def test_mistakes(tmp_path: Path, capsys):
    assert SCRIPT.main([str(tmp_path / "a.mp4"), str(JACKS)]) == 1
    assert "end it with .webp or .gif" in capsys.readouterr().err
    assert SCRIPT.main([str(tmp_path / "a.webp"), str(tmp_path / "none.mp4")]) == 1
    assert "none.mp4" in capsys.readouterr().err
