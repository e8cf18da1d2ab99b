"""Class weights against a float64 computation by brute force, and the laws they must keep."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_colorize.color.gamut import BINS, bin_centers
from dist_colorize.color.rebalance import CELLS, EXTENT, LossConfig, class_weights, count_cells, prior


def some_ab(seed: int, pixels: int = 4096) -> torch.Tensor:
    """ab [2, 2, 64, 32] around neutral, as photographs have it."""
    values = np.random.default_rng(seed).normal(0, 14, (2, 2, pixels // 64, 32)).clip(-40, 40)
    return torch.from_numpy(values.astype(np.float32))


def test_cells_count_every_pixel_once() -> None:
    ab = some_ab(0)
    cells = count_cells(ab)
    assert cells.dtype == torch.int64 and cells.shape == (CELLS,) and cells.sum() == ab.numel() // 2
    one = torch.tensor([3.4, -7.6]).view(1, 2, 1, 1)
    assert count_cells(one).nonzero().item() == (3 + EXTENT) * 2 * EXTENT + (-8 + EXTENT)


@pytest.mark.bits
def test_counting_in_parts_gives_the_same_weights_to_the_bit() -> None:
    parts = [some_ab(seed) for seed in range(6)]
    whole = count_cells(torch.cat(parts))
    split = sum(count_cells(part) for part in parts[::-1])
    assert isinstance(split, torch.Tensor) and torch.equal(whole, split)
    weights = [class_weights(prior(cells, LossConfig()), 0.5) for cells in (whole, split)]
    assert torch.equal(*weights)


def test_prior_is_the_mean_soft_target_of_the_pixels() -> None:
    ab = some_ab(3)
    found = prior(count_cells(ab), LossConfig()).numpy()
    pixels = ab.permute(0, 2, 3, 1).reshape(-1, 2).round().double().numpy()
    distances = ((pixels[:, None] - bin_centers()) ** 2).sum(axis=-1)
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :5]
    mass = np.exp(-np.take_along_axis(distances, nearest, axis=1) / 50)
    mass /= mass.sum(axis=1, keepdims=True)
    expected = np.zeros(BINS)
    np.add.at(expected, nearest, mass)
    # cells of one unit leave ties between neighbours at equal distance: these shift mass between two far bins only
    np.testing.assert_allclose(found, expected / len(pixels), atol=2e-3)
    assert found.sum() == pytest.approx(1)


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 1))
def test_weights_have_expectation_one_and_favour_the_rare(seed: int, rebalance: float) -> None:
    p = torch.from_numpy(np.random.default_rng(seed).dirichlet(np.full(BINS, 0.2)))
    weights = class_weights(p, rebalance)
    assert weights.dtype == torch.float32 and weights.isfinite().all() and (weights > 0).all()
    assert (p * weights).sum().item() == pytest.approx(1, abs=1e-5)
    order = p.argsort()
    assert (weights[order].diff() <= 0).all()


def test_lambda_one_turns_rebalancing_off() -> None:
    p = torch.from_numpy(np.random.default_rng(1).dirichlet(np.ones(BINS)))
    assert torch.allclose(class_weights(p, 1.0), torch.ones(BINS))


def test_nothing_counted_is_an_error() -> None:
    with pytest.raises(ValueError, match="no pixel"):
        prior(torch.zeros(CELLS, dtype=torch.int64), LossConfig())
