"""Lightness at full resolution + ab at the network's resolution -> sRGB pixels, tile by tile on the CPU.

Equals `lab_to_srgb(L, clamp_to_gamut(L, bilinear(ab)))` of color.lab, reordered for speed: whether a colour lies in the
gamut is decided in linear light, so the costly power of the sRGB curve is taken once for each channel.

Tiles hold at most TILE pixels and their rows are padded to whole vectors. torch then neither splits an operation among
threads nor ends it in the scalar tail loop, whose `pow` rounds differently. So a pixel's bits depend on the pixel
alone: a picture composed in strips equals, to the bit, the picture composed at once. And the tiles fit into the cache.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from dist_colorize.color import lab
from dist_colorize.postprocess.stages import bilinear_taps

TILE = 32768
"""Pixels in a tile: torch's own limit below which it keeps an elementwise operation on one thread."""
TILE_WIDTH = 2048
"""Widest tile: low, wide tiles would interpolate more cells along their rows than they need."""
VECTOR = 64
"""Rows of a tile are padded to a multiple of so many pixels; no processor's vectors are longer."""
TOLERANCE = 1e-4
"""How far a channel of sRGB (0..1) may leave the gamut before the colour is pulled towards neutral, as in color.lab."""

_LINEAR_FROM_XYZ = torch.linalg.inv(torch.tensor(lab.XYZ_FROM_RGB, dtype=torch.float64))
# Lab's f^-1 gives XYZ relative to white: the white point goes into the matrix.
_MATRIX: list[list[float]] = (_LINEAR_FROM_XYZ * torch.tensor(lab.WHITE, dtype=torch.float64)).tolist()
_LOWEST = -TOLERANCE / 12.92
_HIGHEST = ((1 + TOLERANCE + 0.055) / 1.055) ** 2.4


def compose(lightness: Tensor, ab: Tensor, size: tuple[int, int], row0: int, bits: int) -> Tensor:
    """See stages.Backend.compose: lightness [n, W], ab [2, h, w] -> sRGB [n, W, 3], uint8 or uint16."""
    rows, width = lightness.shape
    height = size[0]
    if width != size[1] or not 0 <= row0 <= height - rows or bits not in (8, 16):
        raise ValueError(f"rows {row0}+{rows} of width {width} with {bits} bits do not fit a picture of {size}")
    result = torch.empty(rows, width, 3, dtype=torch.uint8 if bits == 8 else torch.uint16, device=lightness.device)
    on_cpu = lightness.device.type == "cpu"
    columns = min(-(-width // VECTOR) * VECTOR, TILE_WIDTH) if on_cpu else width
    step = TILE // columns if on_cpu else rows
    inference = torch.is_inference_mode_enabled()  # a thread's own setting, which the pool's threads must share
    tiles = [(top, left) for left in range(0, width, columns) for top in range(0, rows, step)]

    def fill(tile: tuple[int, int]) -> None:
        top, left = tile
        here = (slice(top, top + step), slice(left, left + columns))
        level = lightness[here]
        count, used = level.shape
        padded = level.new_zeros(count, -(-used // VECTOR) * VECTOR)
        padded[:, :used] = level
        a, b = _upsample(ab, size, row0 + top, count, left, padded.shape[1])
        for channel, values in enumerate(_srgb(padded, a, b)):
            result[here][..., channel] = values.mul_(2**bits - 1).round_()[:, :used].to(result.dtype)

    if len(tiles) == 1:
        fill(tiles[0])
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(torch.inference_mode(inference)(fill), tiles))
    return result


def _upsample(ab: Tensor, size: tuple[int, int], top: int, rows: int, left: int, columns: int) -> tuple[Tensor, Tensor]:
    """Bilinear a and b, each [rows, columns], for the tile at (top, left) of a picture of `size`; ab is [2, h, w]."""
    vertical = bilinear_taps(ab.shape[1], size[0], top, rows)
    # Along the rows first, where there are few: a tile of many pixels spans few cells.
    first, last = vertical[0][0], vertical[1][-1]
    cells = ab[:, first : last + 1]
    upper, lower, down = (torch.from_numpy(taps).to(ab.device) for taps in vertical)
    horizontal = bilinear_taps(ab.shape[2], size[1], left, columns)
    before, after, along = (torch.from_numpy(taps).to(ab.device) for taps in horizontal)
    # [2, h', columns]
    start, end = cells.index_select(2, before), cells.index_select(2, after)
    lines = start + along * (end - start)
    # [2, rows, columns]
    start, end = lines.index_select(1, upper - int(first)), lines.index_select(1, lower - int(first))
    a, b = (start + down.view(1, -1, 1) * (end - start)).unbind(0)
    return a, b


def _srgb(level: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L*, a*, b* of any one shape -> sRGB channels in 0..1, colours outside the gamut pulled towards neutral."""
    linear = _linear(level, a, b)
    outside = _outside(linear)
    if outside.any():
        few = level[outside], a[outside], b[outside]
        inside, beyond = torch.zeros_like(few[0]), torch.ones_like(few[0])
        for _ in range(lab.GAMUT_STEPS):
            middle = (inside + beyond) / 2
            leaves = _outside(_linear(few[0], few[1] * middle, few[2] * middle))
            beyond = torch.where(leaves, middle, beyond)
            inside = torch.where(leaves, inside, middle)
        for channel, clamped in zip(linear, _linear(few[0], few[1] * inside, few[2] * inside), strict=True):
            channel[outside] = clamped
    red, green, blue = (lab.srgb_from_linear(channel).clamp_(0, 1) for channel in linear)
    return red, green, blue


def _linear(level: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L*, a*, b* -> linear sRGB channels, not clipped."""
    fy = (level + 16) / 116
    x, y, z = (
        torch.where(f > 0.2068966, f * f * f, (f - lab.OFFSET) / lab.SLOPE) for f in (fy + a / 500, fy, fy - b / 200)
    )
    red, green, blue = (x * row[0] + y * row[1] + z * row[2] for row in _MATRIX)
    return red, green, blue


def _outside(linear: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    red, green, blue = linear
    low, high = torch.minimum(torch.minimum(red, green), blue), torch.maximum(torch.maximum(red, green), blue)
    return (low < _LOWEST) | (high > _HIGHEST)
