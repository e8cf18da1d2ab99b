"""Counting colours on a CPU."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dist_colorize.color.rebalance import EXTENT
from dist_colorize.compiled import compiled


@compiled
def add_cells(a: NDArray[np.float32], b: NDArray[np.float32], cells: NDArray[np.int64]) -> None:
    """count_cells on a CPU: 0.06 ms for 224 x 224 pixels instead of 1.2 ms, which was more than decoding them."""
    low, high = np.float32(-EXTENT), np.float32(EXTENT - 1)
    # From 2^23 to 2^24 float32 are the integers: the sum is rounded as by round(), and its lower bits are the number.
    rounder = np.float32((1 << 23) + (1 << 22) + EXTENT)
    cell = np.empty(len(a), np.uint16)
    for i in range(len(a)):
        row = np.float32(min(max(a[i], low), high) + rounder).view(np.int32) & (2 * EXTENT - 1)
        column = np.float32(min(max(b[i], low), high) + rounder).view(np.int32) & (2 * EXTENT - 1)
        cell[i] = row * (2 * EXTENT) + column
    for i in range(len(a)):
        cells[cell[i]] += 1
