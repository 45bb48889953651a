"""utils/clip_poses.py: a clip's skeletons are those of its own frames, and an image is of its own video."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.utils.test_video_folder import CPU, SHAPE, dataset, encode
from utils.clip_poses import ClipPoses, find_tracks
from utils.config import ControlConfig
from utils.dataset import Samples
from utils.distributed import Rngs, SampleRngs
from utils.latent_folder import LatentFolder
from utils.pose.draw import draw
from utils.pose.keypoints import save_keypoints
from utils.video import write_video

SIZE = (SHAPE.height, SHAPE.width)
CONTROL = ControlConfig(pose_dim=8, pose_dropout=0, image_dropout=0, first_frame=0, reference_pose_dropout=0)
SOURCE = (64, 128)  # height, width: wider than the clips, so the sides are cut off


def dance(num_frames: int) -> Tensor:
    """A whole body that goes from left to right, a pixel a frame."""
    points = torch.cat(
        [torch.rand(134, 2, generator=torch.Generator().manual_seed(3)) * 40 + 12, torch.ones(134, 1)], 1
    )
    moved = points.repeat(num_frames, 1, 1)
    moved[..., 0] += torch.arange(num_frames)[:, None]
    return moved


def drawn(points: Tensor, profile: str = "native") -> Tensor:
    """Of points in SOURCE: half as large, 8 of 64 columns cut off at each side."""
    inside = points.clone()
    inside[..., 0] = inside[..., 0] / 2 - 8
    inside[..., 1] /= 2
    return draw(inside, SIZE, SIZE, profile)


def video(folder: Path, name: str, num_frames: int, fps: int = 16, keypoints: Tensor | None = None, at: int = 16):
    """Frame n is a grey of n / 64."""
    grey = (torch.arange(num_frames) / 64)[:, None, None, None].expand(-1, 3, *SOURCE)
    write_video(folder / f"{name}.mp4", grey, fps=fps)
    (folder / f"{name}.txt").write_text(name)
    if keypoints is not None:
        save_keypoints(folder / f"{name}.npz", keypoints, SOURCE[1], SOURCE[0], at)


def open_folder(folder: Path, control: ControlConfig = CONTROL, profile: str = "native") -> LatentFolder:
    encode(folder, folder / "latents")
    tracks = find_tracks(folder, sorted(path.name for path in folder.glob("*.mp4")), SHAPE.fps)
    poses = ClipPoses(
        tracks, control, profile=profile, size=SIZE, num_frames=9, clip_frames=9, seed=5, device=CPU
    )  # fmt: skip
    return dataset(folder / "latents", poses=poses)


def draw_all(data: LatentFolder, step: int = 0) -> Samples:
    return data.draw(SampleRngs(Rngs(0, step, CPU), range(len(data.clips))))


def first_greys(latents: Tensor) -> list[int]:
    """Number of the frame that each clip begins with."""
    return [round(float((clip[0, 0, 0, 0] + 1) * 32)) for clip in latents]


# fps of the video and of the keypoint file; which keypoints a clip that begins at frame n (of 16 per second) shows.
@pytest.mark.parametrize(("video_fps", "file_fps"), [(16, 16), (32, 32), (16, 8), (32, 16)])
def test_a_clip_has_the_skeletons_of_its_frames(video_fps: int, file_fps: int, tmp_path: Path):
    num_frames = 20 * video_fps // 16
    points = dance(20 * file_fps // 16)
    video(tmp_path, "a", num_frames, video_fps, points, file_fps)
    data = open_folder(tmp_path, replace(CONTROL, image_dropout=1))
    samples = draw_all(data)
    controls = samples.controls
    assert controls.drawings.shape == (2, 9, 3, *SIZE) and controls.drawings.dtype == torch.uint8
    starts = [first * 16 // video_fps for first in first_greys(samples.latents)]
    assert sorted(starts) == [0, 9] and controls.posed.tolist() == [0, 1] and not len(controls.imaged)
    for start, drawings in zip(starts, controls.drawings, strict=True):
        shown = [(start + n) * file_fps // 16 for n in range(9)]
        assert torch.equal(drawings, drawn(points[shown]))


def test_images_are_of_another_moment_with_its_skeleton(tmp_path: Path):
    points = dance(40)
    video(tmp_path, "a", 40, keypoints=points)
    controls, latents = (samples := draw_all(open_folder(tmp_path, profile="body"))).controls, samples.latents
    own, shown = first_greys(latents), first_greys(controls.references)
    assert len(own) == 4 and not controls.first_frame.any() and controls.reference_posed.all()
    assert all(a != b and b in own for a, b in zip(own, shown, strict=True))
    for start, drawing in zip(shown, controls.reference_drawings, strict=True):
        assert torch.equal(drawing, drawn(points[start][None], "body"))


def test_some_have_no_keypoints(tmp_path: Path, caplog):
    video(tmp_path, "a", 20)
    video(tmp_path, "b", 20, keypoints=dance(20))
    video(tmp_path, "c", 20, keypoints=dance(12))  # ends within the second clip
    video(tmp_path, "d", 20)
    (tmp_path / "d.npz").write_text("no keypoints")
    caplog.set_level("INFO")
    data = open_folder(tmp_path)
    assert "2 of 4 videos have keypoints; the others are learned without a pose" in caplog.text
    assert "learned without a pose: " in caplog.text and "d.npz cannot be read" in caplog.text
    rngs = SampleRngs(Rngs(0, 0, CPU), range(8))
    names = [(item.row["key"], n) for item, n in (data.clips[place] for place in data.sampler(rngs))]
    controls = data.draw(rngs).controls
    assert {names[place] for place in controls.posed} == {("b.mp4", 0), ("b.mp4", 1), ("c.mp4", 0)}
    first_frame = {name for name, own in zip(names, controls.first_frame, strict=True) if own}
    assert first_frame == {("a.mp4", 0), ("a.mp4", 1), ("d.mp4", 0), ("d.mp4", 1)}  # a reference must have a skeleton
    again = draw_all(open_folder(tmp_path)).controls
    assert all(torch.equal(value, getattr(again, name)) for name, value in vars(controls).items())


@pytest.mark.gpu
def test_a_gpu_draws_the_same():
    points = dance(12)
    ours = draw(points.cuda(), SOURCE, SIZE, "native").cpu().int()
    assert (ours - draw(points, SOURCE, SIZE, "native").int()).abs().max() <= 1  # smooth edges, rounded


def test_none_has(tmp_path: Path):
    video(tmp_path, "a", 9)
    with pytest.raises(
        ValueError, match=r"none of the 1 videos .* scripts/extract_pose.py .*, or set control.pose_dim: 0"
    ):
        find_tracks(tmp_path, ["a.mp4"], 16)
    (tmp_path / "a.npz").write_text("no keypoints")
    with pytest.raises(ValueError, match=r"a.npz cannot be read as an .npz file"):
        find_tracks(tmp_path, ["a.mp4"], 16, skip=False)
