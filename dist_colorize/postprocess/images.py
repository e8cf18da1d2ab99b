"""Reads any photograph into 8- or 16-bit gray or sRGB pixels, upright, and gives its lightness strip by strip.

    photograph = read(Path("scan.tif"))
    photograph.pixels               # [H, W, 1 or 3] uint8 or uint16: the file's own depth
    photograph.lightness(0, 512)    # L* of the first 512 rows, float32

libvips decodes (Pillow where it has no decoder: BMP). EXIF orientation is applied, ICC profiles and CMYK become sRGB,
palettes become colours, the first frame of an animation counts, and alpha is set aside untouched.
"""

from __future__ import annotations

import contextlib
import io
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyvips
import torch
from PIL import Image
from torch import Tensor

from dist_colorize.color import lab
from dist_colorize.errors import UserError

LOADERS = {"jpegload", "pngload", "tiffload", "webpload", "gifload", "heifload"}
"""libvips' decoders that read photographs; its others (SVG, raw bytes, text tables) are not for strangers' files."""
DEPTHS = {"uchar": 8, "ushort": 16}
COLORFUL = 12
"""A photograph is in colour where some pixel of its small version has channels further apart than this, of 255."""


class Unreadable(UserError):
    """A file that cannot be read as a photograph; the message is the reason alone, without the name."""


class Stored(NamedTuple):
    """A photograph that is no file by itself: a row of an index, which may lie inside a tar archive."""

    name: str
    read: Callable[[], bytes]
    """Its encoded bytes; OSError when they cannot be had."""


Source = Path | Stored


@dataclass(frozen=True)
class Photograph:
    """A decoded photograph."""

    pixels: np.ndarray
    """[H, W, 1] gray or [H, W, 3] sRGB, uint8 or uint16."""
    alpha: np.ndarray | None
    """[H, W] of the same dtype, or None."""
    metadata: tuple[tuple[int, str, Any], ...] = ()
    """(type, name, value) of the libvips fields that the result should carry: EXIF, IPTC, XMP; no orientation."""
    resolution: tuple[float, float] = (1.0, 1.0)
    """Horizontal and vertical, in pixels per millimetre."""

    @property
    def bits(self) -> int:
        return 8 * self.pixels.dtype.itemsize

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        return self.pixels.shape[0], self.pixels.shape[1]

    def lightness(self, start: int = 0, end: int | None = None) -> Tensor:
        """L* (0..100) of rows start .. end: float32 [rows, W]."""
        return lightness(self.pixels[start:end])

    def shrunk(self, height: int, width: int) -> np.ndarray:
        """The pixels at exactly this size, antialiased; same dtype and channels. May also enlarge."""
        if (height, width) == self.size:
            return self.pixels
        image = to_vips(self.pixels)
        # The kernel of the training pipeline's resize: triangular, widened where it shrinks.
        image = image.resize(width / image.width, vscale=height / image.height, kernel="linear")
        if (image.height, image.width) != (height, width):  # a scale that lands half a pixel off
            image = image.gravity("centre", width, height, extend="copy")
        return _to_numpy(image)

    def in_color(self) -> bool:
        """Whether this is a colour photograph, judged by its content: a gray scan may be stored as RGB."""
        small = self.shrunk(*(min(side, 128) for side in self.size)).astype(np.int64)
        return bool((small.max(axis=2) - small.min(axis=2)).max() > COLORFUL * (2**self.bits - 1) / 255)


def lightness(pixels: np.ndarray) -> Tensor:
    """L* (0..100) of [H, W, 1 or 3] uint8 or uint16 pixels: float32 [H, W]."""
    top = int(np.iinfo(pixels.dtype).max)
    if pixels.shape[2] == 1:
        return torch.from_numpy(_gray_table(top)[pixels[..., 0]])
    from dist_colorize.color import curves  # here, as numba takes long to import

    L = np.empty(pixels.shape[:2], np.float32)
    # [H, W, 3] -> [H * W, 3]
    curves.lightness(np.ascontiguousarray(pixels).reshape(-1, 3), _linear_table(top), L.reshape(-1))
    return torch.from_numpy(L)


@lru_cache(maxsize=2)
def _linear_table(top: int) -> np.ndarray:
    """Linear sRGB, 0..1, of every level 0..top."""
    return lab.linear_from_srgb(torch.linspace(0, 1, top + 1, dtype=torch.float64)).float().numpy()


@lru_cache(maxsize=2)
def _gray_table(top: int) -> np.ndarray:
    """L* of every gray level 0..top."""
    # levels -> [3, 1, levels]
    levels = torch.linspace(0, 1, top + 1, dtype=torch.float64).expand(3, 1, -1)
    return lab.lightness(levels).float().flatten().numpy()


def working_set(source: Source, results: int = 1) -> int:
    """Bytes that colorizing takes, judged by the header: pixels in, `results` pictures out. Raises Unreadable."""
    with _opened(source) as image:
        alpha = 4 if image.hasalpha() else 0
        return image.width * image.height * DEPTHS[image.format] // 8 * (image.bands + 3 * results + alpha)


def read(source: Source) -> Photograph:
    """Decodes a photograph. Raises Unreadable with the reason: missing, no image, cut short, an odd kind."""
    with _opened(source) as image:
        try:
            return _decode(image)
        except pyvips.Error as error:
            raise Unreadable(_reason(error)) from None


def to_vips(pixels: np.ndarray) -> pyvips.Image:
    """[H, W, C] uint8 or uint16 as a libvips image, without a copy where the array is contiguous."""
    height, width, bands = pixels.shape
    form = "uchar" if pixels.dtype == np.uint8 else "ushort"
    space = {("uchar", 1): "b-w", ("uchar", 2): "b-w", ("ushort", 1): "grey16", ("ushort", 2): "grey16"}
    image = pyvips.Image.new_from_memory(np.ascontiguousarray(pixels).data, width, height, bands, form)
    return image.copy(interpretation=space.get((form, bands), "srgb" if form == "uchar" else "rgb16"))


def _to_numpy(image: pyvips.Image) -> np.ndarray:
    dtype = np.uint8 if image.format == "uchar" else np.uint16
    return np.frombuffer(image.write_to_memory(), dtype).reshape(image.height, image.width, image.bands)


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[pyvips.Image]:
    """The image with its header read and its pixels still to come."""
    try:
        if isinstance(source, Stored):
            stored = source.read()
            yield _header(lambda: pyvips.Source.new_from_memory(stored), io.BytesIO(stored))
            return
        # A FIFO would block for ever: look before opening.
        if not stat.S_ISREG(source.stat().st_mode):
            raise Unreadable("not a regular file")
        file = source.open("rb")
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from None
    with file:
        # By descriptor, since libvips takes neither names that are no UTF-8 nor names that end in [...]
        yield _header(lambda: pyvips.Source.new_from_descriptor(file.fileno()), file)


def _header(source: Callable[[], Any], file: BinaryIO) -> pyvips.Image:
    magic = file.read(2)
    file.seek(0)
    if not magic:
        raise Unreadable("empty file")
    if magic == b"BM":
        return _bitmap(file)
    try:
        image = pyvips.Image.new_from_source(source(), "", access="sequential", fail_on="error")
        if image.get("vips-loader").removesuffix("_source") not in LOADERS:
            raise Unreadable("not a photograph in a format that is read here")
        if image.get_typeof("orientation") and image.get("orientation") > 1:
            # Turning reads the lines out of order.
            image = pyvips.Image.new_from_source(source(), "", access="random", fail_on="error")
    except pyvips.Error as error:
        raise Unreadable(_reason(error)) from None
    if image.format not in DEPTHS:
        raise Unreadable(f"{image.format} pixels: only 8- and 16-bit whole numbers are read; convert it first")
    return image


def _bitmap(file: BinaryIO) -> pyvips.Image:
    """BMP, which libvips does not read, by Pillow."""
    try:
        with Image.open(file, formats=["BMP"]) as image:
            mode = "L" if image.mode in ("1", "L") else "RGBA" if image.mode == "RGBA" else "RGB"
            pixels = np.asarray(image.convert(mode))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Unreadable(f"broken BMP: {error}") from None
    return to_vips(pixels if pixels.ndim == 3 else pixels[..., None])


def _decode(image: pyvips.Image) -> Photograph:
    depth = DEPTHS[image.format]
    metadata, resolution = tuple(_metadata(image)), (image.xres, image.yres)
    image = image.autorot()
    alpha = None
    if image.hasalpha():
        image, alpha = image[: image.bands - 1], image[image.bands - 1]
    image = _to_srgb(image, depth)
    channels = image.bands
    pixels = _to_numpy(image if alpha is None else image.bandjoin(alpha))
    if alpha is None:
        return Photograph(pixels, None, metadata, resolution)
    return Photograph(pixels[..., :channels], pixels[..., channels], metadata, resolution)


def _to_srgb(image: pyvips.Image, depth: int) -> pyvips.Image:
    """Gray or sRGB of the same depth: through the embedded profile, or through libvips' own for CMYK without one."""
    gray, cmyk = image.bands == 1, image.interpretation == "cmyk"
    if not (gray or image.bands == 3 or (cmyk and image.bands == 4)):
        raise Unreadable(f"{image.bands} channels ({image.interpretation}): neither gray, RGB nor CMYK")
    if image.get_typeof("icc-profile-data") or cmyk:
        try:
            image = image.icc_transform("srgb", embedded=True, input_profile="cmyk" if cmyk else "srgb", depth=depth)
        except (
            pyvips.Error
        ):  # a broken profile, or one for other pixels than these: no reason to give up the photograph
            image = image.colourspace("srgb") if cmyk else image
        if gray and image.bands == 3:  # three equal channels
            image = image[1]
    return image


def _metadata(image: pyvips.Image) -> Iterator[tuple[int, str, Any]]:
    """What the result keeps of EXIF, IPTC and XMP: not the orientation, now in the pixels, nor the gray thumbnail."""
    for name in image.get_fields():
        if name.startswith("exif-ifd1") or name == "exif-ifd0-Orientation":
            continue
        if name.startswith("exif-") or name in ("iptc-data", "xmp-data"):
            value = image.get(name)
            if name != "xmp-data" or b"Orientation" not in bytes(value):
                yield image.get_typeof(name), name, value


def _reason(error: pyvips.Error) -> str:
    """libvips' message in one line, without its repetitions."""
    lines = [line.split(": ", 1)[-1].strip() for line in error.detail.splitlines() if line.strip()]
    if any("not in a known format" in line for line in lines):
        return "not a photograph in a format that is read here"
    return "; ".join(dict.fromkeys(lines)) or error.message
