"""Cross entropy over the 313 bins of the ab plane, plain and rebalanced. The logits never exist all at once."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_colorize.color.gamut import Gamut
from dist_colorize.models.network import OUTPUT_STRIDE
from dist_colorize.models.objectives.base import Objective
from dist_colorize.models.objectives.linear_cross_entropy import linear_cross_entropy


class CrossEntropy(Objective):
    """Cross entropy with the nearest bin as label; every pixel weighs the same."""

    def __init__(self, class_weights: Tensor) -> None:
        super().__init__(class_weights)
        self.gamut = Gamut()
        # saved as a checkpoint field of its own, so not a second time with the module
        weights = class_weights if self.rebalances else torch.ones_like(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)
        self.class_weights: Tensor

    def targets(self, ab: Tensor) -> tuple[Tensor, Tensor]:
        """ab [B, 2, h, w] -> labels int64 [B, S, h, w], the nearest bin first, and their shares fp32, of sum 1."""
        labels = self.gamut.nearest(ab).long().unsqueeze(1)
        return labels, torch.ones_like(labels, dtype=torch.float32)

    def forward(self, features: Tensor, head: nn.Conv2d, lightness: Tensor, ab: Tensor) -> tuple[Tensor, Tensor]:
        assert head.bias is not None
        # [B, C, h, w] -> [B * h * w, C] each: a view of the features where they lie channels last
        rows, labels, shares = (
            tensor.movedim(1, -1).reshape(-1, tensor.shape[1])
            for tensor in (features, *self.targets(F.avg_pool2d(ab, OUTPUT_STRIDE)))
        )
        weights = self.class_weights[labels[:, 0]]
        # head: [313, 64, 1, 1] -> [313, 64]
        loss = linear_cross_entropy(rows, head.weight.flatten(1), head.bias, labels, shares, weights)
        return loss, weights.sum()


class RebalancedCrossEntropy(CrossEntropy):
    """Each pixel weighted by its true bin's class weight (Zhang et al. 2016, eq. 2): rare colors count more."""

    rebalances: ClassVar[bool] = True
