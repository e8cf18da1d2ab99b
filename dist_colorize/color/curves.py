"""The curves of Lab and sRGB as arithmetic that a processor does for several numbers at once; color.lab in torch."""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from dist_colorize.color.lab import EPSILON, OFFSET, SLOPE, XYZ_FROM_RGB
from dist_colorize.compiled import compiled

Floats = NDArray[np.float32]

_SERIES = tuple(np.float32(prod((3 * k + 2) / (3 * k + 3) for k in range(n))) for n in range(6))
"""(1 - d)^(-2/3) = 1 + 2/3 d + 5/9 d^2 + ...: the binomial series."""
_KNEE = np.float32(0.0031308)
_EPSILON, _SLOPE, _OFFSET = np.float32(EPSILON), np.float32(SLOPE), np.float32(OFFSET)
_LUMINANCE = tuple(np.float32(share) for share in XYZ_FROM_RGB[1])


@compiled
def cube_root(t: np.float32) -> np.float32:
    """Of t > 0, within 1e-6 of it."""
    # The bits of a float, read as an integer, are roughly its logarithm: a third of them gives y = t^(-1/3) within 4 %.
    # With d = 1 - t y^3, which is at most 0.11, the root is t y^2 (1 - d)^(-2/3).
    bits = np.int32(np.float32(np.float32(t).view(np.int32)) * np.float32(1 / 3))
    y = np.int32(np.int32(0x54A23A8C) - bits).view(np.float32)
    d = np.float32(1) - t * y * (y * y)
    c = _SERIES
    return t * (y * y) * (c[0] + d * (c[1] + d * (c[2] + d * (c[3] + d * (c[4] + d * c[5])))))


@compiled
def cie_f(t: np.float32) -> np.float32:
    """CIE's f: the cube root, and a line below EPSILON."""
    root = cube_root(t)
    return root if t > _EPSILON else _SLOPE * t + _OFFSET


@compiled
def srgb_from_linear(linear: np.float32) -> np.float32:
    """color.lab.srgb_from_linear of one number, within 2e-6 of it in 0..1."""
    root = cube_root(max(linear, _KNEE))
    # t^(1/2.4) = t^(1/3) t^(1/12)
    curved = np.float32(1.055) * root * np.sqrt(np.sqrt(root)) - np.float32(0.055)
    return curved if linear > _KNEE else np.float32(12.92) * linear


@compiled
def lightness(pixels: NDArray[np.uint8] | NDArray[np.uint16], linear: Floats, L: Floats) -> None:
    """L* (0..100) of sRGB pixels [n, 3], written into L [n]; `linear` is what each level stands for, 0..1."""
    for n in range(len(pixels)):
        red, green, blue = linear[pixels[n, 0]], linear[pixels[n, 1]], linear[pixels[n, 2]]
        y = _LUMINANCE[0] * red + _LUMINANCE[1] * green + _LUMINANCE[2] * blue
        L[n] = np.float32(116) * cie_f(y) - np.float32(16)
