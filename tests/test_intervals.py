"""Bootstrap intervals against the normal theory of the mean, and their promises."""

from __future__ import annotations

import numpy as np
import pytest

from dist_colorize import intervals


def test_interval_of_many_values_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(3).normal(7, 2, 400)
    mean, low, high = intervals.mean_with_interval(values)
    half = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(mean - half, abs=0.1 * half) and high == pytest.approx(mean + half, abs=0.1 * half)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(4)
    hits = 0
    for _ in range(100):
        _, low, high = intervals.mean_with_interval(generator.exponential(1, 60))
        hits += low <= 1 <= high
    assert 86 <= hits <= 100


def test_weights_make_a_ratio_of_sums() -> None:
    values, weights = np.array([1.0, 5.0, 9.0]), np.array([2.0, 0.0, 0.0])
    mean, low, _ = intervals.mean_with_interval(values, weights)
    assert mean == 1 and low in (0, 1)  # a draw without the first has no weight at all
    same = intervals.mean_with_interval(values, np.full(3, 4.0))
    assert same == pytest.approx(intervals.mean_with_interval(values))


def test_draws_are_seeded_and_keep_the_number_of_photographs() -> None:
    first, again = (np.concatenate(list(intervals.draws(7, 250))) for _ in range(2))
    assert first.shape == (250, 7) and (first.sum(axis=1) == 7).all() and (first == again).all()
    assert intervals.mean_with_interval(np.array([3.0])) == (3, 3, 3)
