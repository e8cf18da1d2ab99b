"""How blotchy predicted colours are. PSNR and colourfulness cannot see splotches; these two scores can.

Both look for colour that varies where the photograph gives no reason to, and both ignore changes of the whole picture:
a prediction that is paler than the truth, or rotated in hue, scores as the truth itself does. Validated in
tests/test_splotches.py by synthetic splotches on the sample photographs.

Arrays are numpy, for one photograph: ab [2, H, W] in CIE units, L [H, W] in 0..100, at the same resolution.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[np.floating]

BLOB_SIGMA = 1.5
"""Smoothing of the residual, in pixels."""
BLOB_THRESHOLD = 10.0
"""Least smoothed residual that belongs to a blob, in ab units."""
BLOB_OPENING = np.ones((3, 3), dtype=bool)
"""What is thinner than this is no blob but an edge that is a little off."""
UCE_SIGMAS = (1.5, 3.0)
"""Scales at which colour edges are looked for, in pixels."""
UCE_SUPPORT = 0.35
"""A colour edge is unexplained where the photograph's own edges nearby have less than this share of its strength."""


def blob(predicted: Array, true: Array) -> float:
    """sqrt(sum of squared blob areas) / N, 0..1: how large the patches are whose colour is off by itself.

    With ab as complex numbers, predicted ~ A * true + b is fitted (least squares): A takes up a change of saturation
    and hue, b a cast. A blob is a connected patch where the smoothed size of what remains exceeds 10 units.
    """
    z, truth = _complex(predicted), _complex(true)
    centred = truth - truth.mean()
    spread = np.vdot(centred, centred).real
    factor = np.vdot(centred, z - z.mean()) / spread if spread > 0 else 0.0
    residual = np.abs(z - z.mean() - factor * centred)
    mask = ndimage.gaussian_filter(residual, BLOB_SIGMA) > BLOB_THRESHOLD
    labels, count = ndimage.label(ndimage.binary_opening(mask, BLOB_OPENING))
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:].astype(np.float64)
    return float(np.sqrt((areas**2).sum()) / mask.size)


def unexplained_edges(predicted: Array, true: Array, lightness: Array) -> float:
    """xUCE, in ab units per pixel: strength of colour edges where neither L nor the true colour has one nearby.

    For s in UCE_SIGMAS: g = |gradient of the predicted ab, smoothed by s|; support = largest max(0.5 |grad_s L|,
    |grad_s true ab|) in a window of 2 ceil(3 s) + 1 pixels; the mean over all pixels of g where support < 0.35 g, else
    0. The root of the mean square of it, averaged over the scales.
    """
    total = 0.0
    for sigma in UCE_SIGMAS:
        edge = _gradient(predicted, sigma)
        support = np.maximum(0.5 * _gradient(lightness[None], sigma), _gradient(true, sigma))
        support = ndimage.maximum_filter(support, 2 * int(np.ceil(3 * sigma)) + 1)
        unexplained = np.where(support < UCE_SUPPORT * edge, edge, 0.0)
        total += float(np.sqrt(np.mean(unexplained**2)))
    return total / len(UCE_SIGMAS)


def _complex(ab: Array) -> NDArray[np.complex128]:
    return ab[0].astype(np.float64) + 1j * ab[1]


def _gradient(channels: Array, sigma: float) -> Array:
    """Size of the gradient of [C, H, W] at scale sigma, over all channels: [H, W], per pixel."""
    squares = [
        ndimage.gaussian_filter(channel.astype(np.float64), sigma, order=order) ** 2
        for channel in channels
        for order in ((0, 1), (1, 0))
    ]
    gradient: Array = np.sqrt(sum(squares))
    return gradient
