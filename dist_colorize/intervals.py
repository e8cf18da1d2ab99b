"""Bootstrap intervals: how much a mean over photographs would move with other photographs of the same kind.

Photographs are drawn with replacement, all values of a photograph together (percentile bootstrap, Efron 1979). The
draws are seeded, so a table can be reproduced; few photographs (below about 20) give intervals that are too narrow.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RESAMPLES = 2000
"""Times the photographs are drawn anew."""
COVERAGE = 95.0
"""Per cent."""
CHUNK = 100
"""Draws at a time: their counts take CHUNK * N * 8 bytes."""


def draws(count: int, resamples: int = RESAMPLES, seed: int = 0) -> Iterator[Array]:
    """How often each of `count` photographs is drawn: float64 [at most CHUNK, count], `resamples` rows in all."""
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, CHUNK):
        rows = min(CHUNK, resamples - start)
        yield generator.multinomial(count, np.full(count, 1 / count), size=rows).astype(np.float64)


def resampled_means(values: Array, weights: Array | None = None) -> Array:
    """Weighted means of resampled photographs: values [N, K], weights [N, K] (all 1 when None) -> [RESAMPLES, K]."""
    if weights is None:
        weights = np.ones_like(values)
    means = [(times @ (weights * values)) / np.maximum(times @ weights, 1e-300) for times in draws(len(values))]
    return np.concatenate(means)


def interval(resampled: Array) -> tuple[Array, Array]:
    """Lower and upper end of the 95 % interval: [RESAMPLES, ...] -> [...] twice."""
    tail = (100 - COVERAGE) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail], axis=0)
    return low, high


def mean_with_interval(values: Array, weights: Array | None = None) -> tuple[float, float, float]:
    """Mean of one value per photograph [N], weighted by [N], with its 95 % interval: (mean, low, high).

    For a paired comparison give the differences of the same photographs.
    """
    weights = np.ones_like(values) if weights is None else weights
    low, high = interval(resampled_means(values[:, None], weights[:, None]))
    return float((values * weights).sum() / weights.sum()), float(low[0]), float(high[0])
