"""Lightness at full resolution + ab at the network's resolution -> sRGB pixels.

Equals `lab_to_srgb(L, clamp_to_gamut(L, bilinear(ab)))` of color.lab. Whether a color lies in the gamut is decided in
linear light, so the costly power of the sRGB curve is taken once for each channel.

`compose` runs on the CPU, in one pass over memory. Each row is made by itself: a picture composed in strips equals, to
the bit, the picture composed at once. `in_torch` runs on any device, for a batch.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_colorize.color import lab
from dist_colorize.color.curves import srgb_from_linear
from dist_colorize.compiled import compiled
from dist_colorize.postprocess.stages import bilinear_taps

WORTH_A_THREAD = 32768
"""With fewer pixels for each, threads take longer to start than they save."""
TOLERANCE = 1e-4
"""How far a channel of sRGB (0..1) may leave the gamut before the colour is pulled towards neutral, as in color.lab."""

_LINEAR_FROM_XYZ = np.linalg.inv(np.array(lab.XYZ_FROM_RGB))
# Lab's f^-1 gives XYZ relative to white: the white point goes into the matrix.
_MATRIX = (_LINEAR_FROM_XYZ * np.array(lab.WHITE)).astype(np.float32)
_LOWEST = np.float32(-TOLERANCE / 12.92)
_HIGHEST = np.float32(((1 + TOLERANCE + 0.055) / 1.055) ** 2.4)
_OFFSET, _SLOPE = np.float32(lab.OFFSET), np.float32(lab.SLOPE)

Floats = NDArray[np.float32]
Taps = tuple[NDArray[np.int64], NDArray[np.int64], Floats]


def compose(lightness: Tensor, ab: Tensor, size: tuple[int, int], row0: int, bits: int) -> Tensor:
    """See stages.Backend.compose: lightness [n, W], ab [2, h, w] -> sRGB [n, W, 3], uint8 or uint16; all on the CPU."""
    rows, width = lightness.shape
    _require_fit(rows, width, size, row0, bits)
    result = np.empty((rows, width, 3), np.uint8 if bits == 8 else np.uint16)
    levels, cells = np.ascontiguousarray(lightness.numpy()), np.ascontiguousarray(ab.numpy())
    upper, lower, down = bilinear_taps(ab.shape[1], size[0], row0, rows)
    along = bilinear_taps(ab.shape[2], width, 0, width)
    stretch = max(-(-rows // torch.get_num_threads()), -(-WORTH_A_THREAD // width))

    def fill(first: int) -> None:
        part = slice(first, first + stretch)
        _compose(levels[part], cells, (upper[part], lower[part], down[part]), along, result[part])

    if rows <= stretch:
        fill(0)
    else:
        with ThreadPoolExecutor() as pool:
            list(pool.map(fill, range(0, rows, stretch)))
    return torch.from_numpy(result)


def in_torch(lightness: Tensor, ab: Tensor, size: tuple[int, int], row0: int, bits: int) -> Tensor:
    """The same in torch's operations, for a batch on any device: [B, n, W], [B, 2, h, w] -> sRGB [B, n, W, 3] there.

    Within 1 level of `compose`. Nothing waits for the device: every pixel takes the bisection's steps, those inside the
    gamut in vain.
    """
    rows, width = lightness.shape[-2:]
    _require_fit(rows, width, size, row0, bits)
    upper, lower, down = _taps_on(ab.device, ab.shape[2], size[0], row0, rows)
    before, after, along = _taps_on(ab.device, ab.shape[3], width, 0, width)
    # [B, 2, h, w] -> [B, 2, n, w] -> [B, 2, n, W] -> a, b: [B, n, W]
    ab = ab[:, :, upper].lerp(ab[:, :, lower], down[:, None])
    a, b = ab[..., before].lerp(ab[..., after], along).unbind(1)
    inside, step = torch.zeros_like(lightness), 1.0
    for _ in range(lab.GAMUT_STEPS):
        step /= 2
        middle = inside + step
        inside = torch.where(_outside_in_torch(*lab.linear_from_lab(lightness, a * middle, b * middle)), inside, middle)
    share = torch.where(_outside_in_torch(*lab.linear_from_lab(lightness, a, b)), inside, 1.0)
    linear = torch.stack(lab.linear_from_lab(lightness, a * share, b * share), dim=-1)
    largest = 2**bits - 1
    # half a level is added for the rounding down that follows
    levels = lab.srgb_from_linear(linear).clamp(0, 1) * largest + 0.5
    return levels.to(torch.uint8 if bits == 8 else torch.uint16)


@lru_cache(maxsize=16)
def _taps_on(device: torch.device, small: int, large: int, start: int, count: int) -> tuple[Tensor, ...]:
    """bilinear_taps on a device; kept, as each copy to it waits."""
    return tuple(torch.from_numpy(tap).to(device) for tap in bilinear_taps(small, large, start, count))


def _require_fit(rows: int, width: int, size: tuple[int, int], row0: int, bits: int) -> None:
    if width != size[1] or not 0 <= row0 <= size[0] - rows or bits not in (8, 16):
        raise ValueError(f"rows {row0}+{rows} of width {width} with {bits} bits do not fit a picture of {size}")


def _outside_in_torch(red: Tensor, green: Tensor, blue: Tensor) -> Tensor:
    least, most = torch.minimum(torch.minimum(red, green), blue), torch.maximum(torch.maximum(red, green), blue)
    return (least < float(_LOWEST)) | (most > float(_HIGHEST))


@compiled
def _compose(level: Floats, ab: Floats, vertical: Taps, horizontal: Taps, out: NDArray[Any]) -> None:
    """Rows of pixels: level [n, W], ab [2, h, w], taps of n rows and of W columns -> out [n, W, 3]."""
    upper, lower, down = vertical
    rows, width = level.shape
    line = np.empty((2, ab.shape[2]), np.float32)
    a, b = np.empty(width, np.float32), np.empty(width, np.float32)
    rgb, few = np.empty((3, width), np.float32), np.empty((3, width), np.float32)
    inside, place = np.empty(width, np.float32), np.empty(width, np.int64)
    largest = np.float32(255 if out.itemsize == 1 else 65535)
    for row in range(rows):
        for channel in range(2):
            _mix(ab[channel, upper[row]], ab[channel, lower[row]], down[row], line[channel])
        _spread(line[0], horizontal, a)
        _spread(line[1], horizontal, b)
        _linear(level[row], a, b, rgb[0], rgb[1], rgb[2])
        count = 0
        for x in range(width):
            # written every time and counted where it is outside: no branch to mispredict
            place[count] = x
            count += _outside(rgb[0, x], rgb[1, x], rgb[2, x])
        if count:
            for n in range(count):
                few[0, n], few[1, n], few[2, n] = level[row, place[n]], a[place[n]], b[place[n]]
            _share_inside(few[0, :count], few[1, :count], few[2, :count], inside)
            for n in range(count):
                few[1, n] *= inside[n]
                few[2, n] *= inside[n]
            _linear(few[0, :count], few[1, :count], few[2, :count], few[0], few[1], few[2])
            for n in range(count):
                rgb[0, place[n]], rgb[1, place[n]], rgb[2, place[n]] = few[0, n], few[1, n], few[2, n]
        for channel in range(3):
            _levels(rgb[channel], largest)
            for x in range(width):
                out[row, x, channel] = np.int32(rgb[channel, x])


@compiled
def _mix(start: Floats, end: Floats, share: np.float32, out: Floats) -> None:
    for x in range(len(out)):
        out[x] = start[x] + share * (end[x] - start[x])


@compiled
def _spread(line: Floats, horizontal: Taps, out: Floats) -> None:
    before, after, along = horizontal
    for x in range(len(out)):
        start = line[before[x]]
        out[x] = start + along[x] * (line[after[x]] - start)


@compiled
def _linear(level: Floats, a: Floats, b: Floats, red: Floats, green: Floats, blue: Floats) -> None:
    """L*, a*, b* -> linear sRGB, not clipped; may be written in place."""
    for n in range(len(level)):
        red[n], green[n], blue[n] = _linear_of(level[n], a[n], b[n])


@compiled
def _linear_of(level: np.float32, a: np.float32, b: np.float32) -> tuple[np.float32, np.float32, np.float32]:
    fy = (level + np.float32(16)) * np.float32(1 / 116)
    x, y, z = _cube(fy + a * np.float32(1 / 500)), _cube(fy), _cube(fy - b * np.float32(1 / 200))
    return (
        x * _MATRIX[0, 0] + y * _MATRIX[0, 1] + z * _MATRIX[0, 2],
        x * _MATRIX[1, 0] + y * _MATRIX[1, 1] + z * _MATRIX[1, 2],
        x * _MATRIX[2, 0] + y * _MATRIX[2, 1] + z * _MATRIX[2, 2],
    )


@compiled
def _cube(f: np.float32) -> np.float32:
    """CIE's f^-1. scikit-image branches at f = 0.2068966 = EPSILON ** (1/3)."""
    return f * f * f if f > np.float32(0.2068966) else (f - _OFFSET) * (np.float32(1) / _SLOPE)


@compiled
def _outside(red: np.float32, green: np.float32, blue: np.float32) -> bool:
    return bool(min(min(red, green), blue) < _LOWEST) | bool(max(max(red, green), blue) > _HIGHEST)


@compiled
def _share_inside(level: Floats, a: Floats, b: Floats, inside: Floats) -> None:
    """By how much a and b can be multiplied, at most 1, until sRGB can show the colour: bisection."""
    inside[:] = 0
    step = np.float32(1)
    for _ in range(lab.GAMUT_STEPS):
        step *= np.float32(0.5)
        for n in range(len(level)):
            middle = inside[n] + step
            red, green, blue = _linear_of(level[n], a[n] * middle, b[n] * middle)
            # added, not chosen: a store that happens only sometimes is slow
            inside[n] += np.float32(0) if _outside(red, green, blue) else step


@compiled
def _levels(channel: Floats, largest: np.float32) -> None:
    """Linear sRGB -> levels 0..largest, in place; half a level is added for the rounding down that follows."""
    for x in range(len(channel)):
        value = srgb_from_linear(channel[x])
        channel[x] = min(max(value, np.float32(0)), np.float32(1)) * largest + np.float32(0.5)
