"""sRGB <-> CIE Lab (D65, 2 degree observer) in torch: any device, any float dtype, differentiable.

The constants are those of IEC 61966-2-1 and CIE 15 as scikit-image writes them, so that its `rgb2lab` is the oracle.
Images have their channels at axis -3: [..., 3, H, W]. L is 0..100, a and b about -110..110, sRGB 0..1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

WHITE = (0.95047, 1.0, 1.08883)
"""XYZ of the D65 white point."""
XYZ_FROM_RGB = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
"""Linear sRGB -> XYZ."""
EPSILON, SLOPE, OFFSET = 0.008856, 7.787, 16.0 / 116.0
"""CIE's f(t) is the cube root above EPSILON and SLOPE * t + OFFSET below."""
AB_SCALE = 110.0
"""Networks that predict ab itself put out ab / AB_SCALE: about -1..1, and steps of the size that other weights take."""
_RGB_FROM_XYZ: list[list[float]] = np.linalg.inv(XYZ_FROM_RGB).tolist()
GAMUT_STEPS = 12
"""Bisection steps of `clamp_to_gamut`: chroma is right to 1 part in 4096, well below one 8-bit level."""


# Matrices are applied as Python numbers: a tensor made at each call would be copied to the GPU, and waits for it.


def _mix(planes: Iterable[Tensor], matrix: Sequence[Sequence[float]]) -> list[Tensor]:
    """Each row of the matrix times three planes of any shape."""
    x, y, z = planes
    return [row[0] * x + row[1] * y + row[2] * z for row in matrix]


def linear_from_srgb(rgb: Tensor) -> Tensor:
    """Undoes the sRGB transfer curve: same shape and dtype, 0..1."""
    return torch.where(rgb > 0.04045, ((rgb.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4, rgb / 12.92)


def srgb_from_linear(linear: Tensor) -> Tensor:
    """Applies the sRGB transfer curve: same shape and dtype; negative values stay on the linear part."""
    # the clamp keeps the gradient of the unused branch finite
    return torch.where(linear > 0.0031308, 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055, 12.92 * linear)


def _f(t: Tensor) -> Tensor:
    return torch.where(t > EPSILON, t.clamp(min=EPSILON) ** (1 / 3), SLOPE * t + OFFSET)


def _f_inverse(f: Tensor) -> Tensor:
    # scikit-image branches at f = 0.2068966 = EPSILON ** (1/3)
    return torch.where(f > 0.2068966, f**3, (f - OFFSET) / SLOPE)


def srgb_to_lab(rgb: Tensor) -> Tensor:
    """sRGB [..., 3, H, W] in 0..1 -> Lab [..., 3, H, W] (CIE 15:2004, 8.2.1)."""
    xyz = _mix(linear_from_srgb(rgb).unbind(-3), XYZ_FROM_RGB)
    x, y, z = (_f(plane / white) for plane, white in zip(xyz, WHITE, strict=True))
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-3)


def lab_to_srgb(lab: Tensor) -> Tensor:
    """Lab [..., 3, H, W] -> sRGB [..., 3, H, W], not clipped: outside 0..1 where the colour is outside the gamut."""
    return srgb_from_linear(torch.stack(linear_from_lab(*lab.unbind(-3)), dim=-3))


def linear_from_lab(lightness: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
    """Planes L*, a*, b* of any one shape -> planes of linear sRGB, not clipped."""
    y = (lightness + 16) / 116
    f = (y + a / 500, y, y - b / 200)
    return _mix((_f_inverse(plane) * white for plane, white in zip(f, WHITE, strict=True)), _RGB_FROM_XYZ)


def lightness(rgb: Tensor) -> Tensor:
    """L* of sRGB: [..., 3, H, W] in 0..1 -> [..., 1, H, W] in 0..100."""
    (luminance,) = _mix(linear_from_srgb(rgb).unbind(-3), XYZ_FROM_RGB[1:2])
    return 116 * _f(luminance.unsqueeze(-3)) - 16


def gray_from_lightness(lightness: Tensor) -> Tensor:
    """The sRGB gray level, 0..1, whose L* is `lightness` (0..100); any shape. What a gray photograph would hold."""
    return srgb_from_linear(_f_inverse((lightness + 16) / 116))


def _outside_gamut(lightness: Tensor, ab: Tensor, tolerance: float) -> Tensor:
    rgb = lab_to_srgb(torch.cat([lightness, ab], dim=-3))
    return ((rgb < -tolerance) | (rgb > 1 + tolerance)).any(dim=-3, keepdim=True)


def clamp_to_gamut(lightness: Tensor, ab: Tensor, tolerance: float = 1e-4) -> Tensor:
    """Pulls colours that sRGB cannot show towards neutral, at fixed L and hue, until it can.

    L [..., 1, H, W], ab [..., 2, H, W] -> ab [..., 2, H, W]. A colour is outside where a channel of sRGB leaves 0..1 by
    more than `tolerance`; all others are returned to the bit. Clipping RGB instead would shift L and hue, which shows
    as blocks of wrong colour. L is expected in 0..100: neutral is then always inside.
    """
    outside = _outside_gamut(lightness, ab, tolerance)
    if not outside.any():
        return ab
    # Few pixels are outside: bisect on these alone. [..., 2, H, W] -> [2, 1, n] and [1, 1, n]
    mask = outside.movedim(-3, 0)[0]
    colour = ab.movedim(-3, 0)[:, mask].unsqueeze(-2)
    level = lightness.movedim(-3, 0)[:, mask].unsqueeze(-2)
    inside, beyond = torch.zeros_like(level), torch.ones_like(level)
    for _ in range(GAMUT_STEPS):
        middle = (inside + beyond) / 2
        leaves = _outside_gamut(level, colour * middle, tolerance)
        beyond = torch.where(leaves, middle, beyond)
        inside = torch.where(leaves, inside, middle)
    clamped = ab.movedim(-3, 0).clone()
    clamped[:, mask] = (colour * inside).squeeze(-2)
    return clamped.movedim(0, -3)
