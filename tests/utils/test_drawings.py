"""Skeletons drawn on disk come back as they were drawn, in order, in pieces."""

import pytest
import torch
from PIL import Image

from utils.drawings import count_drawings, drawing_pieces, load_drawing
from utils.video import write_video


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    for index in reversed(range(5)):
        Image.new("RGB", (6, 4), (index, 0, 255)).save(tmp_path / f"{index:04d}.png")
    (tmp_path / "notes.txt").write_text("no drawing")
    pieces = list(drawing_pieces(tmp_path, 16, size=2))
    assert [piece.shape for piece in pieces] == [(2, 3, 4, 6), (2, 3, 4, 6), (1, 3, 4, 6)]
    assert torch.cat(pieces)[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4] and pieces[0].dtype == torch.uint8
    assert count_drawings(tmp_path, 16) == 5


def test_a_video_is_read_at_the_runs_speed(tmp_path):
    write_video(tmp_path / "pose.mp4", torch.rand(30, 3, 32, 48), fps=16)
    for fps, frames in ((16, 30), (8, 15)):
        assert sum(len(piece) for piece in drawing_pieces(tmp_path / "pose.mp4", fps)) == frames
        assert count_drawings(tmp_path / "pose.mp4", fps) == frames


def test_mistakes_are_sentences(tmp_path):
    with pytest.raises(ValueError, match="holds no drawings"):
        count_drawings(tmp_path, 16)
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="a drawing of 4x4 pixels after one of 4x6"):
        list(drawing_pieces(tmp_path, 16))
    with pytest.raises(FileNotFoundError, match="no video at"):
        count_drawings(tmp_path / "absent.mp4", 16)
    with pytest.raises(FileNotFoundError, match="no image at"):
        load_drawing(tmp_path / "absent.png")
