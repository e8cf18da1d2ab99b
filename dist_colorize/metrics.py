"""How far a picture is from the truth. Every metric is per picture, so that a mean over a set is a sum and a count."""

from __future__ import annotations

import torch
from torch import Tensor


def mse(picture: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error in 8-bit levels squared: uint8 [B, H, W, 3] twice -> float64 [B]."""
    return (picture.double() - truth.double()).square().flatten(1).mean(dim=1)


def psnr(picture: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB over 8-bit sRGB: uint8 [B, H, W, 3] twice -> float64 [B].

    10 log10(255^2 / mse). The error is taken as at least 1 / 12 (that of rounding to 8 bits), which limits PSNR to
    58.9 dB: one identical picture would otherwise make the mean infinite.
    """
    return 10 * torch.log10(255**2 / mse(picture, truth).clamp(min=1 / 12))


METRICS = {"psnr": psnr, "mse": mse}
"""Name in evaluation.json -> metric."""
