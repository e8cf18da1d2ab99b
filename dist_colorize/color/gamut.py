"""The 313 bins of the ab plane (Zhang, Isola, Efros 2016), from first principles, and the labels they give.

The published table holds the nodes (10 i, 10 j) that lie in the convex hull of the sRGB gamut's ab values, widened by
the square [-10, 10]^2. The hull is spanned by the twelve edges of the RGB cube; bins are ordered by a, then by b.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dist_colorize.color.lab import srgb_to_lab

BINS = 313
"""Number of classes."""
STEP = 10
"""Distance between neighbouring nodes of the grid, in ab units."""
REACH = 12
"""Nodes run from -REACH * STEP to REACH * STEP: one more ring than any bin occupies."""
SIDE = 2 * REACH + 1


@lru_cache(maxsize=1)
def bin_centers() -> NDArray[np.float64]:
    """The (a, b) of every bin: float64 [313, 2], ordered by a, then b."""
    from scipy.spatial import ConvexHull  # slow to import, and needed once

    ramp = torch.linspace(0, 1, 1025, dtype=torch.float64)
    edges = []
    for axis, (u, v) in product(range(3), product((0.0, 1.0), repeat=2)):
        edge = torch.stack([torch.full_like(ramp, u), torch.full_like(ramp, v)])
        edges.append(torch.cat([edge[:axis], ramp[None], edge[axis:]]))
    # 12 edges of [3, 1025] -> [3, 12 * 1025, 1] -> ab [12 * 1025, 2]
    ab = srgb_to_lab(torch.cat(edges, dim=1)[..., None])[1:, :, 0].T.numpy()
    corners = np.array(list(product((-STEP, STEP), repeat=2)))
    # [n, 1, 2] + [1, 4, 2] -> [4 n, 2]: the hull of a Minkowski sum is the hull of the sums of the corners
    hull = ConvexHull((ab[:, None] + corners[None]).reshape(-1, 2))
    nodes = STEP * np.array(list(product(range(-REACH, REACH + 1), repeat=2)), dtype=np.float64)
    inside = (nodes @ hull.equations[:, :2].T + hull.equations[:, 2] <= 0).all(axis=1)
    centers: NDArray[np.float64] = nodes[inside]
    centers.setflags(write=False)
    return centers


def _table() -> NDArray[np.int32]:
    """Bin of every node of the SIDE x SIDE grid, row = a, column = b; -1 where the node is no bin."""
    table = np.full((SIDE, SIDE), -1, dtype=np.int32)
    a, b = (bin_centers() / STEP).astype(int).T + REACH
    table[a, b] = np.arange(BINS)
    return table


class Gamut(nn.Module):
    """Labels for colours. A module only so that its tables follow `.to(device)`; it has no state to save.

    Exact for every colour in the convex hull of the sRGB gamut, averages of such colours included: the nearest node of
    the grid is at most 5 away along each axis, so it lies in the hull widened by 10, and so it is a bin.
    """

    def __init__(self) -> None:
        super().__init__()
        centers, table = bin_centers(), _table()
        grid = STEP * (np.stack(np.meshgrid(*[np.arange(SIDE)] * 2, indexing="ij"), axis=-1) - REACH)
        # [SIDE, SIDE, 1, 2] - [313, 2] -> squared distances [SIDE, SIDE, 313]
        nearest = ((grid[:, :, None] - centers) ** 2).sum(axis=-1).argmin(axis=-1).astype(np.int32)
        # int32, as gloo broadcasts no int16
        self.register_buffer("centers", torch.tensor(centers, dtype=torch.float32), persistent=False)
        self.register_buffer("_bins", torch.tensor(table).flatten(), persistent=False)
        self.register_buffer("_nearest", torch.tensor(nearest).flatten(), persistent=False)
        self.centers: Tensor
        self._bins: Tensor
        self._nearest: Tensor

    def nearest(self, ab: Tensor) -> Tensor:
        """Hard labels: ab [B, 2, h, w] -> int16 [B, h, w] in 0..312, the bin with the nearest centre."""
        a, b = (ab / STEP).round().long().add_(REACH).clamp_(0, SIDE - 1).unbind(-3)
        return self._nearest[a * SIDE + b].short()

    def soft(self, ab: Tensor, neighbours: int = 5, sigma: float = 5.0) -> tuple[Tensor, Tensor]:
        """Soft targets: a Gaussian of width `sigma` (ab units) over the nearest bins, normalised to 1.

        ab [B, 2, h, w] -> labels int16 [B, K, h, w], nearest first, and weights [B, K, h, w] in ab's dtype. K = 5 in
        Zhang's paper and 10 in the released code; the candidates are the 3 x 3 or 5 x 5 nodes around the nearest.
        """
        if not 1 <= neighbours <= 10:
            raise ValueError(f"neighbours must be 1..10, got {neighbours}")
        reach = 1 if neighbours <= 5 else 2
        # [B, h, w, 2] -> node of the nearest bin, so that even a colour far from every bin has one
        a, b = (self.centers[self.nearest(ab).long()] / STEP).round().long().add_(REACH).unbind(-1)
        candidates, distances = [], []
        for da, db in product(range(-reach, reach + 1), repeat=2):
            row, column = (a + da).clamp(0, SIDE - 1), (b + db).clamp(0, SIDE - 1)
            label = self._bins[row * SIDE + column]
            # a node beyond the grid was clamped onto another one: it must not count twice
            real = (label >= 0) & (row == a + da) & (column == b + db)
            offset = torch.stack([STEP * (row - REACH), STEP * (column - REACH)], dim=-3).to(ab) - ab
            distances.append(torch.where(real, offset.square().sum(-3), torch.inf))
            candidates.append(label.clamp(min=0).short())  # weighs 0 where it is no bin
        # [B, 9 or 25, h, w] -> the K nearest of them
        nearest, order = torch.stack(distances, dim=-3).topk(neighbours, dim=-3, largest=False)
        labels = torch.stack(candidates, dim=-3).gather(-3, order)
        # softmax of -d^2 / (2 sigma^2) is the normalised Gaussian, and safe far from every bin
        return labels, torch.softmax(nearest / (-2 * sigma**2), dim=-3)
