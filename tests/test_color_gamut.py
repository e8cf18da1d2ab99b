"""The 313 bins against the published table's digest, the labels against brute force in float64."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from dist_colorize.color.gamut import BINS, Gamut, bin_centers
from dist_colorize.color.lab import srgb_to_lab

PUBLISHED = "e74b520cf1929e90ad9f051db10931e8ac5d1534c6cedabd7bfeba7a78a96c89"
"""sha256 of pts_in_hull.npy of Zhang et al., its values as little-endian int16."""


def random_colours(dtype: torch.dtype, averages: bool = False) -> torch.Tensor:
    """ab [1, 2, 120, 500] of random sRGB colours, a third of them on the surface of the cube, where bins run out."""
    rgb = torch.from_numpy(np.random.default_rng(7).random((3, 120, 500)))
    rgb[:, :40] = (rgb[:, :40] > 0.5).double()
    rgb[0, :40] = torch.from_numpy(np.random.default_rng(8).random((40, 500)))
    ab = srgb_to_lab(rgb)[None, 1:]
    if averages:
        ab = (ab + ab.flip(-1)) / 2
    return ab.to(dtype)


def squared_distances(ab: torch.Tensor) -> np.ndarray:
    # [1, 2, h, w] -> [h * w, 1, 2] - [313, 2] -> [h * w, 313]
    return ((ab[0].flatten(1).T.double().numpy()[:, None] - bin_centers()) ** 2).sum(axis=-1)


def test_bins_equal_the_published_ones() -> None:
    centers = bin_centers()
    assert centers.shape == (BINS, 2)
    assert hashlib.sha256(centers.astype("<i2").tobytes()).hexdigest() == PUBLISHED


@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_bin_is_exact(dtype: torch.dtype, averages: bool) -> None:
    ab = random_colours(dtype, averages)
    labels = Gamut().nearest(ab)
    assert labels.dtype == torch.int16 and labels.shape == (1, 120, 500)
    distances = squared_distances(ab)
    chosen = distances[np.arange(len(distances)), labels.flatten().numpy()]
    # compared by distance: of two equally near bins either is right
    assert (chosen <= distances.min(axis=1) + 1e-9).all()


@pytest.mark.parametrize("neighbours", [1, 5, 10])
def test_soft_targets_are_exact(neighbours: int) -> None:
    ab = random_colours(torch.float64)
    labels, weights = Gamut().soft(ab, neighbours)
    distances = squared_distances(ab)
    order = np.argsort(distances, axis=1, kind="stable")[:, :neighbours]
    expected = np.exp(-np.take_along_axis(distances, order, axis=1) / (2 * 5.0**2))
    expected /= expected.sum(axis=1, keepdims=True)
    # [1, K, h, w] -> [h * w, K]
    assert (labels[0].flatten(1).T.numpy() == order).all()
    np.testing.assert_allclose(weights[0].flatten(1).T.numpy(), expected, atol=1e-12)


def test_colours_no_screen_can_show_still_get_a_label() -> None:
    wild = torch.tensor([[500.0, -500.0], [-500.0, 499.0]]).view(1, 2, 2, 1)
    gamut = Gamut()
    labels, weights = gamut.soft(wild)
    assert gamut.nearest(wild).min() >= 0 and weights.isfinite().all() and labels[:, 0].min() >= 0


def test_tables_are_not_saved_with_a_network() -> None:
    assert not Gamut().state_dict()
