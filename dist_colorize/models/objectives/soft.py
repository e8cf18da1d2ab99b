"""Class-rebalanced cross entropy against soft targets: a colour is shared out among the bins around it."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_colorize.color.gamut import Gamut
from dist_colorize.models.network import OUTPUT_STRIDE
from dist_colorize.models.objectives.base import Objective
from dist_colorize.models.objectives.classification import CHUNK

NEIGHBOURS = 5
"""Bins that share a colour: the nearest ones (Zhang et al. 2016; their released code took 10)."""
SIGMA = 5.0
"""Width of the Gaussian by which they share it, in ab units."""


class SoftTargets(Objective):
    """Zhang et al. 2016, eq. 2 with soft-encoded Z: weights follow the nearest bin, targets its 5-bin neighbourhood."""

    rebalances: ClassVar[bool] = True

    def __init__(self, class_weights: Tensor) -> None:
        super().__init__(class_weights)
        self.gamut = Gamut()
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.class_weights: Tensor

    def forward(self, features: Tensor, head: nn.Conv2d, lightness: Tensor, ab: Tensor) -> tuple[Tensor, Tensor]:
        assert head.bias is not None
        labels, shares = self.gamut.soft(F.avg_pool2d(ab, OUTPUT_STRIDE), NEIGHBOURS, SIGMA)
        # [B, 5, h, w] -> [B * h * w, 5]
        labels = labels.movedim(1, -1).reshape(-1, NEIGHBOURS).long()
        shares = shares.movedim(1, -1).reshape(-1, NEIGHBOURS)
        weights = self.class_weights[labels[:, 0]]
        # [B, 64, h, w] -> [B * h * w, 64]: a view, as the features lie channels last
        rows = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])
        # [313, 64, 1, 1] -> [313, 64]
        matrix, bias = head.weight.flatten(1), head.bias
        loss = rows.new_zeros((), dtype=torch.float32)
        size = CHUNK[rows.device.type]
        for part in zip(rows.split(size), labels.split(size), shares.split(size), weights.split(size), strict=True):
            # the logits of a chunk are computed again in the backward pass rather than kept
            loss = loss + checkpoint(_chunk, *part, matrix, bias, use_reentrant=False)
        return loss, weights.sum()


def _chunk(rows: Tensor, labels: Tensor, shares: Tensor, weights: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    """Sum over n pixels of weight * cross entropy: rows [n, 64], labels and shares [n, 5], weights [n]."""
    # linear under autocast may give half precision; the sums over bins and pixels are fp32
    logits = F.linear(rows, matrix.to(rows.dtype), bias.to(rows.dtype)).float()
    expected = (logits.gather(1, labels) * shares).sum(dim=1)
    return (weights * (logits.logsumexp(dim=1) - expected)).sum()
