"""Regression of ab by its squared error: the mean of what is plausible, so unsure colours come out grayish."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_colorize.color.lab import AB_SCALE
from dist_colorize.models.network import OUTPUT_STRIDE
from dist_colorize.models.objectives.base import Objective, predicted_ab


class SquaredError(Objective):
    """Mean over a and b of the squared error of ab / AB_SCALE; every pixel weighs 1."""

    outputs: ClassVar[int] = 2

    def forward(self, features: Tensor, head: nn.Conv2d, lightness: Tensor, ab: Tensor) -> tuple[Tensor, Tensor]:
        target = F.avg_pool2d(ab, OUTPUT_STRIDE) / AB_SCALE
        predicted = predicted_ab(features, head)
        pixels = target.new_full((), target[:, 0].numel())
        return (predicted - target).square().sum(dtype=torch.float32) / 2, pixels
