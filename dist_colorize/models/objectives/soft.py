"""Class-rebalanced cross entropy against soft targets: each color is shared among the bins around it."""

from __future__ import annotations

from torch import Tensor

from dist_colorize.models.objectives.classification import RebalancedCrossEntropy

NEIGHBORS = 5
"""Bins that share a color: the nearest ones (Zhang et al. 2016; their released code took 10)."""
SIGMA = 5.0
"""Standard deviation of the Gaussian that weighs the bins, in ab units."""


class SoftTargets(RebalancedCrossEntropy):
    """Zhang et al. 2016, eq. 2 with soft-encoded Z: weights follow the nearest bin, targets its 5-bin neighborhood."""

    def targets(self, ab: Tensor) -> tuple[Tensor, Tensor]:
        labels, shares = self.gamut.soft(ab, NEIGHBORS, SIGMA)
        return labels.long(), shares
