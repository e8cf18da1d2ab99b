"""How far a picture is from the truth. Every metric is per picture, so that a mean over a set is a sum and a count.

Pictures are uint8 sRGB: torch [B, H, W, 3] for what is computed in batches, numpy [H, W, 3] for what scikit-image
computes one by one; ab is float [B, 2, H, W] in CIE units. LPIPS is left out: its weights cannot be had offline.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LEAST_ERROR = 1 / 12
"""Least squared error that PSNR tells apart: that of rounding to whole levels. It limits PSNR to 58.9 dB, as one
identical picture would otherwise make the mean over a set infinite."""
AUC_RANGE = 150.0
"""Errors in ab up to which the area under the curve is taken, as in Zhang et al. 2016."""


@dataclass(frozen=True)
class Metric:
    label: str
    """What tables call it, with its unit."""
    better: int
    """1: more is better, -1: less is better, 0: neither."""
    meaning: str
    """How it is computed, for the protocol."""


METRICS = {
    "psnr": Metric("PSNR (dB)", 1, "dB over 8-bit sRGB, error at least 1/12 level^2"),
    "mse": Metric("MSE (levels^2)", -1, "8-bit sRGB levels squared"),
    "psnr_ab": Metric("PSNR of ab (dB)", 1, "dB over a and b, peak 255 (the span of 8-bit ab)"),
    "mse_ab": Metric("MSE of ab", -1, "CIE a and b units squared, prediction interpolated to the picture's size"),
    "ssim": Metric("SSIM", 1, "Wang et al. 2004 on 8-bit sRGB: Gaussian window, sigma 1.5; mean of the channels"),
    "ciede2000": Metric("CIEDE2000", -1, "mean colour difference of the 8-bit pictures, kL = kC = kH = 1"),
    "colourfulness": Metric("colourfulness", 0, "M3 of Hasler and Suesstrunk 2003 on 8-bit sRGB: sigma + 0.3 mu"),
    "colourfulness_difference": Metric("colourf. - truth's", 0, "colourfulness minus that of the photograph"),
    "auc": Metric("AuC (%)", 1, "Zhang et al. 2016: area under share of pixels with ab error <= t, t = 0..150"),
    "auc_rebalanced": Metric(
        "AuC rebalanced (%)", 1, "the same, pixels weighted by the rarity of their true bin in these photographs"
    ),
    "blob": Metric("BLOB (%)", -1, "sqrt(sum of squared areas of off-colour patches), % of the pixels; splotches.blob"),
    "xuce": Metric("xUCE", -1, "colour edges without reason, ab units per pixel; splotches.unexplained_edges"),
    "top1": Metric("top-1 bin (%)", 1, "cells whose likeliest bin is the true one"),
    "top5": Metric("top-5 bins (%)", 1, "cells whose true bin is among the five likeliest"),
    "ece": Metric("calibration error (%)", -1, "expected |confidence - accuracy| of the likeliest bin, 15 equal bins"),
}
"""Name in evaluation.json -> what it is. top1, top5 and ece describe a classifier; the others a stage's picture."""


def mse(picture: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error in 8-bit levels squared: uint8 [B, H, W, 3] twice -> float64 [B]."""
    return (picture.double() - truth.double()).square().flatten(1).mean(dim=1)


def mse_ab(ab: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error over a and b in CIE units squared: [B, 2, H, W] twice -> float64 [B]."""
    return (ab.double() - truth.double()).square().flatten(1).mean(dim=1)


def psnr(error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of a mean squared error at peak 255: 10 log10(255^2 / error)."""
    return 10 * torch.log10(255**2 / error.clamp(min=LEAST_ERROR))


def within(ab: Tensor, truth: Tensor) -> Tensor:
    """Each pixel's part of the AuC: the share of thresholds t in 0..150 with error <= t; -> float64 [B, H, W].

    The curve of the share of pixels within t, integrated over t and divided by 150, is the mean of this over pixels.
    """
    error = torch.linalg.vector_norm(ab.double() - truth.double(), dim=1)
    return (1 - error / AUC_RANGE).clamp(min=0)


def ssim(picture: NDArray[np.uint8], truth: NDArray[np.uint8]) -> float:
    """Structural similarity with the settings of Wang et al. 2004, per channel and averaged; sides of 11 and more."""
    from skimage.metrics import structural_similarity

    similarity = structural_similarity(
        picture,
        truth,
        channel_axis=2,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    return float(similarity)


def ciede2000(picture: NDArray[np.uint8], truth: NDArray[np.uint8]) -> float:
    """Mean CIEDE2000 colour difference."""
    from skimage.color import deltaE_ciede2000, rgb2lab

    return float(deltaE_ciede2000(rgb2lab(picture), rgb2lab(truth)).mean())


def colourfulness(picture: NDArray[np.uint8]) -> float:
    """M3 of Hasler and Suesstrunk 2003, their measure on sRGB: sigma_rgyb + 0.3 mu_rgyb over 8-bit levels.

    rg = R - G, yb = (R + G) / 2 - B; sigma and mu are the roots of the sums of their squared deviations and means.
    """
    red, green, blue = np.moveaxis(picture.astype(np.float64), -1, 0)
    opponents = red - green, (red + green) / 2 - blue
    sigma = np.hypot(*(channel.std() for channel in opponents))
    mu = np.hypot(*(channel.mean() for channel in opponents))
    return float(sigma + 0.3 * mu)


CALIBRATION_BINS = 15
"""Equal bins of the confidence for the expected calibration error (Guo et al. 2017)."""


def calibration(confidence: Tensor, right: Tensor) -> Tensor:
    """Per confidence bin: cells, sum of confidence, cells that are right. Both [n] -> float64 [15, 3]."""
    place = (confidence.double() * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    facts = torch.stack([torch.ones_like(confidence), confidence, right.to(confidence)], dim=1).double()
    return torch.zeros(CALIBRATION_BINS, 3, dtype=torch.float64, device=confidence.device).index_add_(0, place, facts)


def calibration_error(bins: NDArray[np.float64]) -> NDArray[np.float64]:
    """Expected calibration error of summed `calibration`s: [..., 15, 3] -> [...], 0..1."""
    cells, confidence, right = np.moveaxis(bins, -1, 0)
    error: NDArray[np.float64] = np.abs(confidence - right).sum(axis=-1) / cells.sum(axis=-1)
    return error
