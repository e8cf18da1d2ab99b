"""The splotch scores: what they see, what they must not see, and how well they tell the two apart."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from scipy import ndimage
from skimage import io
from skimage.color import rgb2lab
from skimage.transform import resize

from dist_colorize import splotches
from dist_colorize.data import sample_photographs

SIZE = 256


def photographs(size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(L [size, size], ab [2, size, size]) of the middle square of every sample photograph."""
    for path in sorted(sample_photographs().iterdir()):
        image = io.imread(path)[..., :3]
        height, width = image.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        lab = rgb2lab(resize(image[top : top + side, left : left + side] / 255.0, (size, size), anti_aliasing=True))
        yield lab[..., 0], lab[..., 1:].transpose(2, 0, 1)


def change(ab: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The whole picture paler, and rotated in hue."""
    z = (ab[0] + 1j * ab[1]) * generator.uniform(0.3, 1) * np.exp(1j * generator.uniform(-np.pi / 3, np.pi / 3))
    return np.stack([z.real, z.imag])


def blot(ab: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Two to five round patches of a colour that has no reason to be there."""
    result, size = ab.copy(), ab.shape[-1]
    rows, columns = np.mgrid[:size, :size]
    for _ in range(generator.integers(2, 6)):
        radius, angle = generator.uniform(0.03, 0.09) * size, generator.uniform(0, 2 * np.pi)
        distance = np.hypot(rows - generator.uniform(0, size), columns - generator.uniform(0, size))
        patch = 1 / (1 + np.exp((distance - radius) / (0.15 * radius)))
        result += patch * generator.uniform(25, 50) * np.array([np.cos(angle), np.sin(angle)])[:, None, None]
    return result


def predicted(ab: np.ndarray) -> np.ndarray:
    """As a network has it: on the half grid, interpolated back."""
    half = ab.shape[-1] // 2
    small = ab.reshape(2, half, 2, half, 2).mean((2, 4))
    return ndimage.zoom(small, (1, 2, 2), order=1, grid_mode=True, mode="nearest")


def auroc(positive: list[float], negative: list[float]) -> float:
    """Chance that a positive scores above a negative, ties counting half."""
    one, other = np.array(positive)[:, None], np.array(negative)[None]
    return float(((one > other) + 0.5 * (one == other)).mean())


@pytest.mark.slow
def test_scores_tell_splotches_from_changes_of_the_whole_picture() -> None:
    generator = np.random.default_rng(0)
    found: dict[str, tuple[list[float], list[float]]] = {"blob": ([], []), "xuce": ([], [])}
    for lightness, ab in photographs(SIZE):
        for _ in range(6):
            for side, colours in enumerate((blot(change(ab, generator), generator), change(ab, generator))):
                colours = predicted(colours)
                found["blob"][side].append(splotches.blob(colours, ab))
                found["xuce"][side].append(splotches.unexplained_edges(colours, ab, lightness))
    rates = {name: auroc(*sides) for name, sides in found.items()}
    assert min(rates.values()) >= 0.95, rates


def test_blob_measures_the_area_of_one_patch_and_ignores_linear_changes() -> None:
    generator = np.random.default_rng(1)
    truth = ndimage.gaussian_filter(generator.normal(0, 1, (2, 100, 100)), (0, 6, 6)) * 200
    assert splotches.blob(truth, truth) == 0
    turned = change(truth, generator) + np.array([12.0, -7.0])[:, None, None]
    assert splotches.blob(turned, truth) == 0
    patch = truth.copy()
    patch[0, 30:50, 40:60] += 60
    # 20 x 20 of 100 x 100; smoothing carries 1/6 of the step 1.45 pixels outwards on each side
    assert splotches.blob(patch, truth) == pytest.approx(0.229**2, rel=0.06)
    # the root of the sum of squares: one large patch is worse than as much area in small ones
    several = truth.copy()
    for y in (10, 40, 70):
        several[0, y : y + 11, 20:31] += 60
    assert splotches.blob(several, truth) < 0.9 * splotches.blob(patch, truth)


def test_edges_are_unexplained_only_where_the_photograph_has_none() -> None:
    flat, lightness = np.zeros((2, 96, 96)), np.full((96, 96), 50.0)
    colours = flat.copy()
    colours[1, :, 48:] = 40
    alone = splotches.unexplained_edges(colours, flat, lightness)
    assert alone > 1
    lightness[:, 48:] = 90
    assert splotches.unexplained_edges(colours, flat, lightness) == 0, "an edge in L explains it"
    assert splotches.unexplained_edges(colours, colours, np.full((96, 96), 50.0)) == 0, "so does one in the true colour"
    assert splotches.unexplained_edges(colours / 2, flat, np.full((96, 96), 50.0)) == pytest.approx(alone / 2)
