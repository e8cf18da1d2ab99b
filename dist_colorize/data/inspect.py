"""Is this file a photograph to learn colour from? If not, why not?

Every image is decoded once, JPEG at an eighth of its size, so that what passes here will not stop a training run later.
Pillow does it because it was 4 to 8 times faster than libvips on small files (8,000 against 1,000 JPEG/s on two cores).
"""

from __future__ import annotations

from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WebP", "TIFF", "BMP")
"""What DALI decodes on the CPU and the GPU; the index stores the place in this tuple."""

USABLE_SUFFIXES = frozenset([".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".dib"])
OTHER_SUFFIXES = frozenset([".gif", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".ppm", ".tga", ".psd", ".exr"])
"""Files called like this are images too: the report names them, where it only counts captions and licences."""

MAX_RATIO = 10
_GRAY_SPREAD = 4
"""An image is gray when R, G and B differ by at most this much (of 255) everywhere in a thumbnail: scans of black-and-
white prints carry a little noise, and the faintest of colours spreads further."""
_THUMBNAIL = 64  # pixels
_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 lie on their side

_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "BigTIFF"),
    (b"MM\0+", "BigTIFF"),
    (b"BM", "BMP"),
    (b"GIF8", "GIF"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"8BPS", "Photoshop"),
)
_REMEDY = "is not supported: convert it to JPEG, PNG, WebP, TIFF or BMP"


class Facts(NamedTuple):
    """What the index keeps of a usable photograph."""

    width: int
    """Pixels, as displayed: after the rotation that EXIF asks for."""
    height: int
    format: int
    """Place in FORMATS."""


class Rejected(Exception):
    """The file cannot be used; the message says why."""


def sniff(head: bytes) -> str | None:
    """Name of the image format that the first bytes of a file show, None when it is no image."""
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1", b"hevc"):
        return "AVIF" if head[8:10] == b"av" else "HEIC"
    return None


def inspect(data: bytes, min_side: int) -> Facts:
    """Facts of an encoded image; Rejected with the reason when it cannot be used."""
    if not data:
        raise Rejected("empty: zero bytes")
    name = sniff(data[:16])
    if name is None:
        raise Rejected("not an image")
    if name not in FORMATS:
        raise Rejected(f"{name} {_REMEDY}")
    try:
        with Image.open(BytesIO(data), formats=[name.upper()]) as image:
            facts = _measure(image, name, min_side)
            _require_colour(image)
    except (Rejected, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise Rejected("cannot be decoded: a damaged header, or an unusual kind of " + name) from error
    except Image.DecompressionBombError as error:
        raise Rejected("too large: more than 178 megapixels") from error
    except Exception as error:  # Pillow's plugins raise whatever their parsers stumble over
        raise Rejected(f"cannot be decoded: {_one_line(error)}") from error
    return facts


def _measure(image: Image.Image, name: str, min_side: int) -> Facts:
    """Check the header, then decode; the size must be read before, for a JPEG is decoded at a smaller one."""
    if name == "WebP" and getattr(image, "is_animated", False):
        raise Rejected(f"animated WebP {_REMEDY}")
    width, height = image.size
    short, long = sorted((width, height))
    if short < min_side:
        raise Rejected(f"too small: {width}x{height}, the shorter side must have at least {min_side} pixels")
    if long > MAX_RATIO * short:
        raise Rejected(f"too elongated: {width}x{height}, more than {MAX_RATIO}:1")
    if image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;"):
        raise Rejected("grayscale: one channel")
    image.draft("RGB", (1, 1))  # a JPEG at an eighth: all of it is read, and its colours can still be told
    image.load()
    # Only the EXIF block counts, as for DALI; Pillow's getexif() also looks into XMP. Its TIFF reader turns by itself.
    exif = Image.Exif()
    if name != "TIFF" and "exif" in image.info:
        exif.load(image.info["exif"])
    if exif.get(_ORIENTATION) in (5, 6, 7, 8):
        width, height = height, width
    return Facts(width, height, FORMATS.index(name))


def _require_colour(image: Image.Image) -> None:
    thumbnail = image if image.mode == "RGB" else image.convert("RGB")
    factor = min(image.size) // _THUMBNAIL
    if factor > 1:
        thumbnail = thumbnail.reduce(factor)
    # Most photographs show their colours in the mean: some pixel has no less than it, but for half a level of rounding.
    mean = thumbnail.reduce(thumbnail.size).tobytes()
    if max(mean) - min(mean) > _GRAY_SPREAD + 1:
        return
    rgb = np.asarray(thumbnail)
    if (rgb.max(axis=-1) - rgb.min(axis=-1)).max() <= _GRAY_SPREAD:
        raise Rejected("grayscale: no pixel has colour")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
