"""The last stretch on a CPU: a decoded crop becomes L and ab in one pass, resized, mirrored and converted to Lab.

DALI's operators do the same on a GPU (data/pipeline.py). On a CPU each of them walks through memory once more, and
resizing and Lab took three quarters of the time to make a batch: see `python -m benchmarks.input_path`.

The result is made in strips of rows, whose intermediates stay in the second-level cache:

    rows        the weighted sum of the crop's rows, for each row of the strip        vectorised along the row
    transpose   so that the rows of the strip lie beside each other
    columns     the weighted sum of neighbouring columns                              vectorised along the strip
    levels      rounded to 8 bits, looked up on the sRGB curve, transposed back
    Lab         without divisions and branches                                        vectorised along the row
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_colorize.color.curves import cie_f
from dist_colorize.color.lab import OFFSET, WHITE, XYZ_FROM_RGB, linear_from_srgb
from dist_colorize.compiled import compiled

STRIP = 32
"""Rows made at a time: with fewer the short loops cost more than they do, with more the strip leaves the cache."""

Floats = NDArray[np.float32]
LINEAR = linear_from_srgb(torch.arange(256, dtype=torch.float64) / 255).float().numpy()
"""What each of the 256 levels stands for, 0..1."""
_MATRIX = (np.array(XYZ_FROM_RGB) / np.array(WHITE)[:, None]).astype(np.float32)
"""Linear sRGB -> X / Xn, Y / Yn, Z / Zn."""
_OFFSET = np.float32(OFFSET)


def finish_batch(
    crops: Sequence[NDArray[np.uint8]], mirrored: NDArray[np.bool_], size: int, workers: Executor, tasks: int
) -> tuple[Tensor, Tensor]:
    """`finish` for a batch, shared out to `tasks` of the workers: L [B, 1, size, size] and ab [B, 2, size, size]."""
    L, ab = torch.empty(len(crops), 1, size, size), torch.empty(len(crops), 2, size, size)
    into = list(zip(crops, mirrored, L.numpy(), ab.numpy(), strict=True))

    def work(task: int) -> None:
        for crop, flip, lightness, colour in into[task::tasks]:
            finish(crop, flip, lightness[0], colour)

    list(workers.map(work, range(tasks)))
    return L, ab


@compiled
def finish(crop: NDArray[np.uint8], mirrored: bool, L: Floats, ab: Floats) -> None:
    """crop uint8 sRGB [h, w, 3] -> L float32 [S, S] and ab float32 [2, S, S], which are written in place.

    The filter is a triangle as wide as a pixel of the smaller image (linear interpolation, or no aliasing), as in DALI
    and Pillow. Lab is within 5e-4 of scikit-image's rgb2lab for the resized image in 8 bits.
    """
    height, width = crop.shape[:2]
    size = len(L)
    row_first, row_count, row_weight = _triangles(height, size)
    column_first, column_count, column_weight = _triangles(width, size)
    # [h, w, 3] -> [h, 3 w]
    lines = crop.reshape(height, 3 * width)
    rows = np.empty((STRIP, 3 * width), np.float32)
    turned = np.empty((3 * width, STRIP), np.float32)
    # [3 w, STRIP] -> [w, 3 STRIP]
    columns = turned.reshape(width, 3 * STRIP)
    column, level = np.empty(3 * STRIP, np.float32), np.empty(3 * STRIP, np.uint8)
    red, green, blue = (
        np.empty((STRIP, size), np.float32),
        np.empty((STRIP, size), np.float32),
        np.empty((STRIP, size), np.float32),
    )
    for top in range(0, size, STRIP):
        for n in range(STRIP):
            y = min(top + n, size - 1)
            _add(rows[n], lines[row_first[y] :], row_weight[y], row_count[y])
        for j in range(3 * width):
            for n in range(STRIP):
                turned[j, n] = rows[n, j]
        for x in range(size):
            _add(column, columns[column_first[x] :], column_weight[x], column_count[x])
            for n in range(3 * STRIP):
                level[n] = np.uint8(column[n] + np.float32(0.5))
            at = size - 1 - x if mirrored else x
            for n in range(STRIP):
                red[n, at] = LINEAR[level[n]]
                green[n, at] = LINEAR[level[STRIP + n]]
                blue[n, at] = LINEAR[level[2 * STRIP + n]]
        for n in range(min(STRIP, size - top)):
            lab_of_row(red[n], green[n], blue[n], L[top + n], ab[0, top + n], ab[1, top + n])


@compiled
def _triangles(length: int, size: int) -> tuple[NDArray[np.int32], NDArray[np.int32], Floats]:
    """The pixels of a side of `length` that make each of `size`: first [size], count [size], weight [size, most]."""
    scale = length / size
    reach = max(scale, 1.0)
    first, count = np.empty(size, np.int32), np.empty(size, np.int32)
    weight = np.zeros((size, int(2 * reach) + 2), np.float32)
    for i in range(size):
        centre = (i + 0.5) * scale
        first[i] = max(int(centre - reach + 0.5), 0)
        count[i] = min(int(centre + reach + 0.5), length) - first[i]
        total = 0.0
        for j in range(count[i]):
            total += 1 - abs(first[i] + j + 0.5 - centre) / reach
        for j in range(count[i]):
            weight[i, j] = (1 - abs(first[i] + j + 0.5 - centre) / reach) / total
    return first, count, weight


@compiled
def _add(out: Floats, rows: NDArray[Any], weight: Floats, count: int) -> None:
    """out = the weighted sum of the first `count` rows."""
    row, factor = rows[0], weight[0]
    for j in range(len(out)):
        out[j] = factor * np.float32(row[j])
    for t in range(1, count):
        row, factor = rows[t], weight[t]
        for j in range(len(out)):
            out[j] += factor * np.float32(row[j])


@compiled
def lab_of_row(red: Floats, green: Floats, blue: Floats, L: Floats, a: Floats, b: Floats) -> None:
    """A row of linear sRGB to Lab (CIE 15:2004), in place of L, a and b."""
    for x in range(len(L)):
        fx = cie_f(_MATRIX[0, 0] * red[x] + _MATRIX[0, 1] * green[x] + _MATRIX[0, 2] * blue[x])
        fy = cie_f(_MATRIX[1, 0] * red[x] + _MATRIX[1, 1] * green[x] + _MATRIX[1, 2] * blue[x])
        fz = cie_f(_MATRIX[2, 0] * red[x] + _MATRIX[2, 1] * green[x] + _MATRIX[2, 2] * blue[x])
        L[x] = np.float32(116) * (fy - _OFFSET)
        a[x] = np.float32(500) * (fx - fy)
        b[x] = np.float32(200) * (fy - fz)
