"""Writes finished pictures, whole or not at all: in the photograph's own format if that can be written, or as PNG."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyvips

from dist_colorize.errors import UserError
from dist_colorize.files import replacing
from dist_colorize.postprocess.images import Photograph, to_vips

JPEG_QUALITY = WEBP_QUALITY = 95
SAVERS: dict[str, dict[str, Any]] = {
    # no optimize_coding: libjpeg would hold all coefficients, 12 bytes a pixel, to save 2 % of the file
    "jpeg": {"Q": JPEG_QUALITY},
    # level 3 takes a seventh of the time of level 6, for 3 % more bytes
    "png": {"compression": 3},
    "tiff": {"compression": "deflate", "predictor": "horizontal", "level": 3},
    "webp": {"Q": WEBP_QUALITY, "alpha_q": 100},
}
"""libvips' options for each format that is written."""
FORMATS = {".jpg": "jpeg", ".jpeg": "jpeg", ".jpe": "jpeg", ".jfif": "jpeg", ".png": "png"} | {
    ".tif": "tiff",
    ".tiff": "tiff",
    ".webp": "webp",
}
"""Suffix -> format. What else is read (GIF, BMP, AVIF, HEIC, names without a suffix) is written as PNG."""
DEEP, TRANSPARENT = {"png", "tiff"}, {"png", "tiff", "webp"}
"""Formats that hold 16 bits, and alpha."""
PLAIN_TIFF_BYTES = 2**31
"""Above this, BigTIFF: plain TIFF ends at 4 GiB, which would be noticed only there."""
DISK_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
"""What befalls every further file too."""


class DiskError(UserError):
    """The output folder cannot be written to, for this file or any other."""


def output_name(name: str) -> str:
    """The name of the result: the input's own where its format can be written, else with .png appended."""
    return name if Path(name).suffix.lower() in FORMATS else f"{name}.png"


def write_picture(path: Path, pixels: np.ndarray, like: Photograph | None = None) -> None:
    """Writes [H, W, 1 or 3] uint8 or uint16 pixels to `path`, with alpha and metadata of `like`.

    The folder is made when missing. Raises UserError when the format cannot hold the pixels, DiskError when the disk is
    full, read-only or forbidden.
    """
    form = FORMATS[path.suffix.lower()]
    options = dict(SAVERS[form])
    if pixels.dtype == np.uint16 and form not in DEEP:
        raise UserError(f"holds 16-bit pixels, which {path.suffix} cannot: give the input its true suffix (.png, .tif)")
    if like is not None and like.alpha is not None:
        if form not in TRANSPARENT:
            raise UserError(f"holds transparency, which {path.suffix} cannot: give the input its true suffix")
        pixels = np.concatenate([pixels, like.alpha[..., None]], axis=2)
    if form == "tiff" and pixels.nbytes > PLAIN_TIFF_BYTES:
        options["bigtiff"] = True
    image = to_vips(pixels)
    if like is not None:
        image = _described(image, like)
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            descriptor = os.open(temporary, os.O_RDWR)
            try:
                target = pyvips.Target.new_to_descriptor(descriptor)
                getattr(image, f"{form}save_target")(target, **options)
            finally:
                os.close(descriptor)


def _described(image: pyvips.Image, like: Photograph) -> pyvips.Image:
    copy = image.copy(xres=like.resolution[0], yres=like.resolution[1])
    for kind, name, value in like.metadata:
        copy.set_type(kind, name, value)
    if like.metadata:  # EXIF's bytes still hold the old orientation; libvips puts this one in its place
        copy.set_type(pyvips.GValue.gint_type, "orientation", 1)
    return copy


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turns what the disk refuses into a DiskError, with the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_TROUBLE:
            raise DiskError(_disk_message(path, error.strerror)) from None
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    except pyvips.Error as error:
        for number in DISK_TROUBLE:
            if os.strerror(number) in str(error):
                raise DiskError(_disk_message(path, os.strerror(number))) from None
        raise UserError(f"cannot write {path}: {' '.join(str(error).split())}") from None


def _disk_message(path: Path, reason: str | None) -> str:
    return (
        f"cannot write {path}: {reason}. Free or unlock the disk, or give another --output; "
        "what was finished stays, and the same command goes on from there"
    )
