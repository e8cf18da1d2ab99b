"""The curves as machine code, against double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dist_colorize.color import curves, lab
from dist_colorize.compiled import compiled


@compiled
def each(t, roots, f, srgb):
    for n in range(len(t)):
        roots[n], f[n], srgb[n] = curves.cube_root(t[n]), curves.cie_f(t[n]), curves.srgb_from_linear(t[n])


@pytest.fixture(scope="module")
def found():
    """t, and what the curves make of it: from the least normal number to 4, and around the places where they branch."""
    spread = np.geomspace(2.0**-126, 4, 400_000)
    knees = [knee * np.linspace(0.999, 1.001, 2001) for knee in (lab.EPSILON, 0.0031308)]
    t = np.concatenate([spread, *knees, np.linspace(0, 1, 65536)[1:]]).astype(np.float32)
    results = [np.empty_like(t) for _ in range(3)]
    each(t, *results)
    return t.astype(np.float64), *results


def test_cube_root(found):
    t, roots, _, _ = found
    assert np.abs(roots / np.cbrt(t) - 1).max() < 1e-6


def test_cie_f(found):
    t, _, f, _ = found
    expected = np.where(t > lab.EPSILON, np.cbrt(t), lab.SLOPE * t + lab.OFFSET)
    # at the branch itself float32 may decide otherwise: there the curves meet within 2e-6
    assert np.abs(f - expected).max() < 3e-6


def test_srgb_from_linear(found):
    t, _, _, srgb = found
    expected = lab.srgb_from_linear(torch.from_numpy(t)).numpy()
    assert np.abs(srgb - expected)[t <= 1].max() < 2e-6


def test_nothing_and_less_than_nothing_stay_on_the_line():
    t = np.array([0, -0.0, -1e-3, -0.5], np.float32)
    results = [np.empty_like(t) for _ in range(3)]
    each(t, *results)
    np.testing.assert_allclose(results[1], lab.SLOPE * t + lab.OFFSET, rtol=1e-6)
    np.testing.assert_allclose(results[2], 12.92 * t, rtol=1e-6)
