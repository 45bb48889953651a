"""Files on disk: what is written comes back, nothing half-written is left, any prompt has a file name."""

import sys

import pytest
import torch
from PIL import Image

from utils.video import (
    VideoWriter,
    contact_sheet,
    load_image,
    read_video,
    resize_cover,
    safe_name,
    to_uint8,
    video_clips,
    video_length,
    video_pieces,
    write_video,
)

COLOURS = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0.5], [0.9, 0.6, 0.2]])


def colour_video(height: int = 32, width: int = 48) -> torch.Tensor:
    return COLOURS[:, :, None, None].expand(-1, -1, height, width)


def test_colours_frames_and_speed_survive_the_file(tmp_path):
    path = write_video(tmp_path / "new folder" / "colours.mp4", colour_video(), fps=16)
    frames, fps = read_video(path)
    assert fps == 16
    assert frames.shape == (5, 3, 32, 48)
    assert (frames.mean((2, 3)) - COLOURS).abs().max() < 0.02


def test_a_few_frames_evenly_spaced(tmp_path):
    path = write_video(tmp_path / "colours.mp4", colour_video())
    frames, _ = read_video(path, num_frames=3)
    assert (frames.mean((2, 3)) - COLOURS[[0, 2, 4]]).abs().max() < 0.02
    assert len(read_video(path, num_frames=99)[0]) == 5


def test_blocks_and_a_whole_clip_are_the_same_video(tmp_path):
    video = colour_video()
    with VideoWriter(tmp_path / "whole.mp4") as whole:
        whole.append(video)
    with VideoWriter(tmp_path / "blocks.mp4") as blocks:
        for part in (video[:1], video[1:4].permute(0, 2, 3, 1), video[4:]):
            blocks.append(part)
    assert blocks.fingerprint == whole.fingerprint
    assert torch.equal(read_video(blocks.path)[0], read_video(whole.path)[0])


def test_floats_are_rounded_not_truncated():
    assert to_uint8(torch.full((1, 3, 2, 2), 0.999)).unique().tolist() == [255]


def test_an_error_leaves_the_old_file_and_no_other(tmp_path):
    path = write_video(tmp_path / "kept.mp4", colour_video())
    before = path.read_bytes()
    with pytest.raises(KeyError), VideoWriter(path) as writer:
        writer.append(colour_video())
        raise KeyError("stopped half-way")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_name_appears_only_when_the_file_is_complete(tmp_path):
    with VideoWriter(tmp_path / "late.mp4") as writer:
        writer.append(colour_video())
        assert not writer.path.exists()
    assert writer.path.exists()


@pytest.mark.parametrize(("height", "width"), [(31, 48), (32, 47)])
def test_odd_sizes_are_refused(tmp_path, height, width):
    with pytest.raises(ValueError, match=f"even sizes, got {height}x{width}"):
        write_video(tmp_path / "odd.mp4", colour_video(height, width))
    assert not list(tmp_path.iterdir())


def test_a_change_of_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match="64x64 after 32x48"):
        write_video(tmp_path / "x.mp4", iter([colour_video(), colour_video(64, 64)]))


def test_no_frames_no_file(tmp_path):
    with pytest.raises(ValueError, match="no frames"):
        write_video(tmp_path / "empty.mp4", iter([]))


def test_reading_what_is_no_video(tmp_path):
    with pytest.raises(FileNotFoundError, match="no video at"):
        read_video(tmp_path / "absent.mp4")
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(ValueError, match="cannot be read as a video"):
        read_video(tmp_path / "text.mp4")


def test_resize_cover_keeps_proportions_and_the_centre():
    frames = torch.zeros(1, 3, 40, 80)
    frames[..., 30:50] = 1  # a bar in the middle, a quarter of the width
    cut = resize_cover(frames, 20, 20)
    assert cut.shape == (1, 3, 20, 20)
    assert cut[0, 0, 10].round().int().tolist() == [0] * 5 + [1] * 10 + [0] * 5


def test_images_become_plus_minus_one(tmp_path):
    Image.new("RGBA", (30, 20), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    image = load_image(tmp_path / "clear.png", 16, 32)
    assert image.shape == (3, 16, 32)
    assert image.min() == 1  # transparency is laid on white
    Image.new("L", (64, 64), 0).save(tmp_path / "black.jpg")
    assert load_image(tmp_path / "black.jpg", 16, 16).unique().tolist() == [-1]
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        load_image(tmp_path / "text.png", 16, 16)


def test_a_contact_sheet_has_a_row_per_video(tmp_path):
    one = contact_sheet(tmp_path / "one.png", [colour_video()], ["words"])
    two = contact_sheet(tmp_path / "two.png", [colour_video(), colour_video(32, 32)[:1]], ["words " * 99, "日本語\n"])
    with Image.open(one) as first, Image.open(two) as second:
        assert second.width == first.width
        assert second.height > 1.9 * first.height
    with pytest.raises(ValueError, match="1 videos and 0 captions"):
        contact_sheet(tmp_path / "none.png", [colour_video()], [])


PROMPTS = [
    "a red puppet waves",
    "a red puppet waves!",
    "A red puppet waves",
    "../../etc/passwd",
    'a/b\\c:d*e?f"g<h>i|j',
    "日本語の人形が手を振る" * 20,
    "कठपुतली नाचती है",
    "دمية حمراء تلوح",
    "🎭🎬",
    "CON",
    "-rf",
    "line\nbreak\0null",
    "word " * 400,
    "word " * 400 + "x",
]


def test_any_prompt_has_a_safe_name_of_its_own(tmp_path):
    names = [safe_name(prompt) for prompt in PROMPTS]
    assert len({name.lower() for name in names}) == len(PROMPTS)
    for name in names:
        assert len(name.encode()) <= 100
        assert not set(name) & set('/\\:*?"<>|\n\0. ') and not name.startswith(("-", "_"))
        (tmp_path / f"{name}.mp4").touch()
    assert names[0].startswith("a_red_puppet_waves-")
    assert safe_name("words", key="other") != safe_name("words") == safe_name("words")


def test_clips_of_a_video_lying_on_its_side_stand_upright(tmp_path):
    """Telephones write portraits as landscapes and a rotation matrix in the track header."""
    picture = torch.zeros(4, 3, 32, 64)
    picture[:, 0, :, :32] = 1.0  # the left half is red
    path = write_video(tmp_path / "lying.mp4", picture, fps=16)
    upright = next(video_clips(path, 16, 4, 32, 64))
    assert upright[0, 0, :, :24].mean() > 0.9 and upright[0, 0, :, 40:].mean() < 0.1

    def matrix(*numbers: int) -> bytes:
        return b"".join(number.to_bytes(4, "big", signed=True) for number in numbers)

    one, end = 1 << 16, 1 << 30
    raw, plain = path.read_bytes(), matrix(one, 0, 0, 0, one, 0, 0, 0, end)
    track = raw.index(plain, raw.index(b"tkhd"))
    turned = matrix(0, one, 0, -one, 0, 0, 0, 0, end)  # show it turned a quarter clockwise
    path.write_bytes(raw[:track] + turned + raw[track + len(turned) :])
    standing = next(video_clips(path, 16, 4, 64, 32))
    assert standing[0, 0, :24].mean() > 0.9 and standing[0, 0, 40:].mean() < 0.1  # left has become top


def half_red_half_blue(mode: str = "RGB") -> Image.Image:
    """Red on the left, blue on the right, 32x16."""
    image = Image.new("RGB", (32, 16), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 16, 16))
    return image.convert(mode)


def colours(path, height=16, width=32) -> list[list[int]]:
    """Rounded RGB in [-1, 1] at the middle of the left and of the right half."""
    image = load_image(path, height, width)
    return [image[:, height // 2, width * i // 4].round().int().tolist() for i in (1, 3)]


RED, BLUE, WHITE = [1, -1, -1], [-1, -1, 1], [1, 1, 1]


@pytest.mark.parametrize(
    "name, mode", [("a.png", "RGB"), ("a.jpg", "CMYK"), ("a.tif", "CMYK"), ("a.png", "P"), ("a.webp", "RGB")]
)
def test_any_colour_mode_becomes_rgb(tmp_path, name, mode):
    half_red_half_blue(mode).save(tmp_path / name, quality=95)
    assert colours(tmp_path / name) == [RED, BLUE]


def test_sixteen_bit_grey_keeps_its_steps(tmp_path):
    Image.new("I;16", (16, 16), 32768).save(tmp_path / "grey.png")
    assert abs(load_image(tmp_path / "grey.png", 16, 16).mean()) < 0.01


def test_transparent_parts_are_white(tmp_path):
    image = half_red_half_blue("RGBA")
    image.putalpha(half_red_half_blue().getchannel("R"))
    image.save(tmp_path / "a.png")
    assert colours(tmp_path / "a.png") == [RED, WHITE]


def test_a_photo_is_turned_upright(tmp_path):
    tag = Image.Exif()
    tag[0x0112] = 6  # to be shown turned by 90 degrees clockwise: what lies left of the file is up
    half_red_half_blue().save(tmp_path / "a.jpg", exif=tag, quality=95)
    image = load_image(tmp_path / "a.jpg", 32, 16)
    assert image[:, 8, 8].round().int().tolist() == RED and image[:, 24, 8].round().int().tolist() == BLUE


def test_another_aspect_is_cut_around_the_centre(tmp_path):
    half_red_half_blue().save(tmp_path / "a.png")
    assert colours(tmp_path / "a.png", 16, 16) == [RED, BLUE]
    image = load_image(tmp_path / "a.png", 64, 16)  # a strip around the border between the colours
    assert image[:, 32, 2].round().int().tolist() == RED and image[:, 32, 13].round().int().tolist() == BLUE


def test_heic_without_a_decoder_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "photo.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(16))  # the name says nothing
    with pytest.raises(ValueError, match="HEIC photo and no decoder is installed: pip install pillow-heif"):
        load_image(tmp_path / "photo.jpg", 16, 16)


def test_a_torn_and_a_monstrous_image_are_sentences(tmp_path, monkeypatch):
    half_red_half_blue().resize((200, 200)).save(tmp_path / "a.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "a.png").read_bytes()[:150])
    with pytest.raises(ValueError, match=r"torn.png cannot be read as an image"):
        load_image(tmp_path / "torn.png", 16, 16)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="cannot be read as an image"):
        load_image(tmp_path / "a.png", 16, 16)


def test_pieces_of_a_video_are_the_video(tmp_path):
    write_video(tmp_path / "a.mp4", torch.rand(30, 3, 32, 32))
    pieces = list(video_pieces(tmp_path / "a.mp4", 16, 16, 32))
    assert [len(piece) for piece in pieces] == [12, 12, 6]
    assert pieces[0].shape[1:] == (3, 16, 32) and -1 <= pieces[0].min() < -0.2 < 0.2 < pieces[0].max() <= 1
    assert video_length(tmp_path / "a.mp4", 16) == 30 and video_length(tmp_path / "a.mp4", 8) == 15
    with pytest.raises(FileNotFoundError, match="no video at"):
        video_length(tmp_path / "b.mp4", 16)
