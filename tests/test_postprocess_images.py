"""Reading and writing photographs, checked with Pillow and with numbers known beforehand."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import numpy as np
import pytest
import pyvips
from PIL import Image, ImageCms
from skimage.color import rgb2lab

from dist_colorize.errors import UserError
from dist_colorize.postprocess.encode import DiskError, output_name, write_picture
from dist_colorize.postprocess.images import Photograph, Stored, Unreadable, read, to_vips, working_set

RANDOM = np.random.default_rng(0)


def smooth(height: int, width: int, channels: int) -> np.ndarray:
    """A picture without noise, which JPEG keeps to a few levels."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [127 + 90 * np.sin(3 * x + 2 * y + phase) for phase in range(channels)]
    return np.stack(waves, axis=2).round().astype(np.uint8)


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    to_vips(pixels).write_to_file(str(path), **options)
    return path


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_depth_channels_and_alpha_survive_a_round_trip(tmp_path, suffix, dtype, channels):
    pixels = RANDOM.integers(0, np.iinfo(dtype).max, (13, 17, channels), dtype, endpoint=True)
    photograph = read(save(tmp_path / f"in{suffix}", pixels))
    colours = 1 if channels < 3 else 3
    assert (photograph.pixels == pixels[..., :colours]).all()
    assert photograph.bits == dtype().itemsize * 8
    assert (photograph.alpha is None) == (channels in (1, 3))
    write_picture(tmp_path / f"out{suffix}", photograph.pixels, photograph)
    again = read(tmp_path / f"out{suffix}")
    assert (again.pixels == photograph.pixels).all()
    assert again.pixels.dtype == dtype
    if photograph.alpha is not None:
        assert (photograph.alpha == pixels[..., -1]).all()
        assert (again.alpha == pixels[..., -1]).all()


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_lossy_formats_are_near(tmp_path, suffix):
    pixels = smooth(40, 60, 3)
    write_picture(tmp_path / f"out{suffix}", pixels)
    with Image.open(tmp_path / f"out{suffix}") as image:
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - pixels).max() <= 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(tmp_path, orientation):
    upright = smooth(32, 48, 3)
    upright[:8, :8] = 255  # a corner to tell the turns apart
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright.transpose(1, 0, 2), 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112], exif[0x013B] = orientation, "A. Photographer"
    Image.fromarray(np.ascontiguousarray(turned)).save(tmp_path / "in.jpg", quality=100, subsampling=0, exif=exif)
    photograph = read(tmp_path / "in.jpg")
    assert photograph.size == (32, 48)
    assert np.abs(photograph.pixels.astype(int) - upright).mean() < 2
    write_picture(tmp_path / "out.jpg", photograph.pixels, photograph)
    with Image.open(tmp_path / "out.jpg") as image:
        assert image.getexif().get(0x0112, 1) == 1
        assert image.getexif()[0x013B].startswith("A. Photographer")
        assert image.size == (48, 32)


def test_palette_one_bit_and_animation(tmp_path):
    colours = Image.fromarray(smooth(20, 30, 3)).quantize(16)
    colours.save(tmp_path / "palette.png")
    assert (read(tmp_path / "palette.png").pixels == np.asarray(colours.convert("RGB"))).all()

    bits = Image.fromarray(RANDOM.random((9, 11)) > 0.5)
    bits.save(tmp_path / "bits.tif")
    assert (read(tmp_path / "bits.tif").pixels[..., 0] == np.asarray(bits) * 255).all()

    frames = [Image.new("RGB", (12, 10), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    photograph = read(tmp_path / "moving.gif")
    assert photograph.size == (10, 12)
    assert (photograph.pixels == [255, 0, 0]).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_bitmaps(tmp_path, mode):
    image = Image.fromarray(smooth(15, 21, 3)).convert(mode)
    image.save(tmp_path / "in.bmp")
    expected = np.asarray(image.convert("L" if mode in ("1", "L") else "RGB")).reshape(15, 21, -1)
    assert (read(tmp_path / "in.bmp").pixels == expected).all()
    assert working_set(tmp_path / "in.bmp") > 0


def test_cmyk_without_and_with_a_profile(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "plain.tif")
    photograph = read(tmp_path / "plain.tif")
    red, green, blue = photograph.pixels[0, 0].tolist()
    assert red > 200
    assert max(green, blue) < 80
    profile = pyvips.Image.profile_load("cmyk")
    inks = Image.fromarray(smooth(20, 30, 4), "CMYK")
    for suffix in (".tif", ".jpg"):
        inks.save(tmp_path / f"profile{suffix}", icc_profile=profile, quality=100)
        photograph = read(tmp_path / f"profile{suffix}")
        with Image.open(tmp_path / f"profile{suffix}") as image:
            srgb = ImageCms.createProfile("sRGB")
            intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
            expected = ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, intent, outputMode="RGB")
        assert np.abs(photograph.pixels.astype(int) - np.asarray(expected)).max() <= 3


def test_profiles_become_srgb_in_both_depths(tmp_path):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(smooth(20, 20, 3)).save(tmp_path / "srgb.png", icc_profile=lab)
    assert np.abs(read(tmp_path / "srgb.png").pixels.astype(int) - smooth(20, 20, 3)).max() <= 1
    # P3's pure green is a more saturated green than sRGB has: (0, 200, 0) in P3 must not stay (0, 200, 0)
    image = to_vips(np.full((8, 8, 3), (40, 200, 40), np.uint8))
    wide = image.icc_transform("p3", input_profile="srgb", depth=16)
    wide.write_to_file(str(tmp_path / "p3.png"))
    assert not (wide.numpy()[0, 0] // 257 == (40, 200, 40)).all()
    photograph = read(tmp_path / "p3.png")
    assert photograph.bits == 16
    assert np.abs(photograph.pixels[0, 0] / 257 - (40, 200, 40)).max() < 1.5


def test_a_broken_profile_is_no_reason_to_give_up(tmp_path):
    Image.fromarray(smooth(20, 20, 3)).save(tmp_path / "in.png", icc_profile=b"no profile at all" * 20)
    assert (read(tmp_path / "in.png").pixels == smooth(20, 20, 3)).all()


def test_lightness_equals_scikit_image():
    for dtype, top in ((np.uint8, 255), (np.uint16, 65535)):
        colour = RANDOM.integers(0, top, (20, 30, 3), dtype, endpoint=True)
        expected = rgb2lab(colour / top)[..., 0]
        np.testing.assert_allclose(Photograph(colour, None).lightness().numpy(), expected, atol=1e-3)
        gray = np.repeat(colour[..., :1], 3, axis=2)
        both = [Photograph(pixels, None).lightness(5, 9).numpy() for pixels in (gray, gray[..., :1])]
        np.testing.assert_allclose(both[0], both[1], atol=1e-4)
        assert both[0].shape == (4, 30)


SHAPES = [((300, 200), (64, 48)), ((1, 1), (16, 64)), ((1, 5000), (32, 128)), ((37, 53), (53, 37))]


@pytest.mark.parametrize(("size", "target"), SHAPES)
def test_shrunk_has_exactly_the_size_and_keeps_the_mean(size, target):
    pixels = np.round(smooth(*size, 3) / 255.0 * 65535).astype(np.uint16)
    small = Photograph(pixels, None).shrunk(*target)
    assert small.shape == (*target, 3)
    assert small.dtype == np.uint16
    assert abs(small.mean() - pixels.mean()) < 65535 * 0.02


def test_shrunk_is_antialiased():
    board = np.indices((256, 256)).sum(axis=0) % 2 * 255
    small = Photograph(board.astype(np.uint8)[..., None], None).shrunk(64, 64)
    assert np.abs(small.astype(int) - 127).max() <= 3


def test_in_color_judges_by_content():
    gray = np.repeat(smooth(50, 50, 1), 3, axis=2)
    assert not Photograph(gray, None).in_color()
    assert not Photograph(gray[..., :1], None).in_color()
    assert Photograph(smooth(50, 50, 3), None).in_color()


def test_what_cannot_be_read_says_why(tmp_path):
    good = tmp_path / "good.jpg"
    Image.fromarray(smooth(200, 300, 3)).save(good)
    half = tmp_path / "half.jpg"
    half.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no photograph")
    (tmp_path / "drawing.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
    (tmp_path / "broken.bmp").write_bytes(b"BM" + b"\0" * 20)
    os.mkfifo(tmp_path / "pipe.jpg")
    Image.new("F", (4, 4), 0.5).save(tmp_path / "float.tif")
    reasons = {
        "half.jpg": "premature end",
        "empty.jpg": "empty",
        "text.jpg": "not a photograph",
        "drawing.svg": "not a photograph",
        "broken.bmp": "BMP",
        "pipe.jpg": "not a regular file",
        "float.tif": "float",
        "missing.jpg": "No such file",
        ".": "not a regular file",
    }
    for name, reason in reasons.items():
        with pytest.raises(Unreadable, match=reason) as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_names_that_libvips_would_stumble_over(tmp_path):
    for name in ("a b.png", "line\nbreak.png", "näme.png", "odd[1].png", "options[Q=3]", os.fsdecode(b"\xff\xfe.png")):
        path = tmp_path / name
        target = tmp_path / "out" / output_name(name)
        target.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            Image.fromarray(smooth(9, 9, 3)).save(file, "PNG")
        photograph = read(path)
        write_picture(target, photograph.pixels, photograph)
        assert (read(target).pixels == smooth(9, 9, 3)).all()


def test_a_stored_photograph_is_read_like_a_file(tmp_path):
    file = save(tmp_path / "in.png", smooth(9, 9, 3))
    assert (read(Stored("in.png", file.read_bytes)).pixels == smooth(9, 9, 3)).all()
    with pytest.raises(Unreadable, match="No such file"):
        read(Stored("gone.png", (tmp_path / "gone.png").read_bytes))


def test_a_format_that_cannot_hold_the_pixels_says_so(tmp_path):
    deep, clear = np.zeros((4, 4, 3), np.uint16), Photograph(smooth(4, 4, 3), np.zeros((4, 4), np.uint8))
    with pytest.raises(UserError, match="16-bit"):
        write_picture(tmp_path / "a.jpg", deep)
    with pytest.raises(UserError, match="transparency"):
        write_picture(tmp_path / "a.jpg", clear.pixels, clear)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "a.png"
    target.write_bytes(b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(DiskError, match="No space left"):
        write_picture(target, smooth(9, 9, 3))
    assert target.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".webp"])
def test_a_full_disk_is_told_from_other_troubles(suffix, monkeypatch, tmp_path):
    """/dev/full answers every write with ENOSPC, as a full disk does; libvips wraps it in words of its own."""
    import contextlib

    @contextlib.contextmanager
    def full(path):
        yield Path("/dev/full")

    monkeypatch.setattr("dist_colorize.postprocess.encode.replacing", full)
    noise = RANDOM.integers(0, 255, (600, 600, 3), np.uint8)
    with pytest.raises(DiskError, match="No space left"):
        write_picture(tmp_path / f"a{suffix}", noise)


def test_output_names():
    kept = ["a.jpg", "a.JPEG", "a.png", "a.Tif", "a.tiff", "a.webp"]
    assert [output_name(name) for name in kept] == kept
    assert output_name("a.gif") == "a.gif.png"
    assert output_name("scan0001") == "scan0001.png"
