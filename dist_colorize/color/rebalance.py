"""Class rebalancing (Zhang, Isola, Efros 2016, section 2.2): rare colours count more, so that skies do not drown them.

Counting is exact: every rank counts its pixels into integer cells of one ab unit, the counts are summed once over all
ranks, and only then does floating point begin, in float64, on every rank alike. So the weights are the same to the bit
at any world size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_colorize.color.gamut import BINS, Gamut

EXTENT = 128
"""Cells cover a and b from -EXTENT to EXTENT - 1: more than sRGB needs."""
CELLS = (2 * EXTENT) ** 2


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    rebalance: float = 0.5
    """Share of the uniform distribution mixed into the prior (lambda of the paper): 0 full rebalancing, 1 none."""
    sigma: float = 5.0
    """Width of the Gaussian that smooths the prior in the ab plane, in ab units."""
    neighbours: int = 5
    """Bins that share the mass of one pixel when the prior is smoothed: 1..10."""
    sample: float = 1.0
    """Share of the training photographs that is counted, 0..1; below 1 they are the first of the data order."""

    def __post_init__(self) -> None:
        if not 0 <= self.rebalance <= 1:
            raise ValueError(f"rebalance must be within 0..1, got {self.rebalance}")
        if self.sigma <= 0:
            raise ValueError(f"sigma must be above 0 ab units, got {self.sigma}")
        if not 1 <= self.neighbours <= 10:
            raise ValueError(f"neighbours must be within 1..10, got {self.neighbours}")
        if not 0 < self.sample <= 1:
            raise ValueError(f"sample must be above 0 and at most 1, got {self.sample}")


def count_cells(ab: Tensor) -> Tensor:
    """Histogram of colours over cells of one ab unit: ab [B, 2, h, w] -> int64 [CELLS], on ab's device."""
    a, b = ab.round().long().add_(EXTENT).clamp_(0, 2 * EXTENT - 1).unbind(1)
    # [B, h, w] -> [B * h * w]
    return torch.bincount((a * 2 * EXTENT + b).flatten(), minlength=CELLS)


def prior(cells: Tensor, config: LossConfig) -> Tensor:
    """Share of each bin among the counted pixels, smoothed in ab: int64 [CELLS] -> float64 [313], sum 1, on the CPU."""
    cells = cells.cpu()
    seen = cells.nonzero().squeeze(1)
    if not len(seen):
        raise ValueError("no pixel was counted: there is no prior")
    # the ab value at the centre of each occupied cell, [n, 2] -> [1, 2, n, 1]
    centers = torch.stack([seen // (2 * EXTENT), seen % (2 * EXTENT)], dim=1).double() - EXTENT
    labels, shares = Gamut().soft(centers.T[None, :, :, None], config.neighbours, config.sigma)
    # counts stay below 2^53, so their float64 is exact; [1, K, n, 1] -> [K, n]
    mass = shares[0, :, :, 0] * cells[seen].double()
    total = torch.zeros(BINS, dtype=torch.float64).index_add_(0, labels.flatten().long(), mass.flatten())
    return total / total.sum()


def class_weights(prior: Tensor, rebalance: float) -> Tensor:
    """w ~ 1 / ((1 - lambda) p + lambda / 313), scaled to expectation 1 under p: float64 [313] -> float32 [313]."""
    weights = 1 / ((1 - rebalance) * prior + rebalance / len(prior)).clamp(min=torch.finfo(torch.float64).tiny)
    return (weights / (prior * weights).sum()).float()
