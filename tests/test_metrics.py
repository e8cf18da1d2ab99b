"""Metrics against scikit-image, scipy, published values and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.metrics import peak_signal_noise_ratio

from dist_colorize import metrics

# Sharma, Wu, Dalal: The CIEDE2000 color-difference formula (2005), table 1: L1 a1 b1 L2 a2 b2 and the difference
SHARMA = """
50 2.6772 -79.7751 50 0 -82.7485 2.0425
50 3.1571 -77.2803 50 0 -82.7485 2.8615
50 2.8361 -74.0200 50 0 -82.7485 3.4412
50 -1.3802 -84.2814 50 0 -82.7485 1.0000
50 -1.1848 -84.8006 50 0 -82.7485 1.0000
50 -0.9009 -85.5211 50 0 -82.7485 1.0000
50 0 0 50 -1 2 2.3669
50 -1 2 50 0 0 2.3669
50 2.4900 -0.0010 50 -2.4900 0.0009 7.1792
50 2.4900 -0.0010 50 -2.4900 0.0010 7.1792
50 2.4900 -0.0010 50 -2.4900 0.0011 7.2195
50 2.4900 -0.0010 50 -2.4900 0.0012 7.2195
50 -0.0010 2.4900 50 0.0009 -2.4900 4.8045
50 -0.0010 2.4900 50 0.0010 -2.4900 4.8045
50 -0.0010 2.4900 50 0.0011 -2.4900 4.7461
50 2.5 0 50 0 -2.5 4.3065
50 2.5 0 73 25 -18 27.1492
50 2.5 0 61 -5 29 22.8977
50 2.5 0 56 -27 -3 31.9030
50 2.5 0 58 24 15 19.4535
50 2.5 0 50 3.1736 0.5854 1.0000
50 2.5 0 50 3.2972 0 1.0000
50 2.5 0 50 1.8634 0.5757 1.0000
50 2.5 0 50 3.2592 0.3350 1.0000
60.2574 -34.0099 36.2677 60.4626 -34.1751 39.4387 1.2644
63.0109 -31.0961 -5.8663 62.8187 -29.7946 -4.0864 1.2630
61.2901 3.7196 -5.3901 61.4292 2.2480 -4.9620 1.8731
35.0831 -44.1164 3.7933 35.0232 -40.0716 1.5901 1.8645
22.7233 20.0904 -46.6940 23.0331 14.9730 -42.5619 2.0373
36.4612 47.8580 18.3852 36.2715 50.5065 21.2231 1.4146
90.8027 -2.0831 1.4410 91.1528 -1.6435 0.0447 1.4441
90.9257 -0.5406 -0.9208 88.6381 -0.8985 -0.7239 1.5381
6.7747 -0.2908 -2.4247 5.8714 -0.0985 -2.2286 0.6377
2.0776 0.0795 -1.1350 0.9033 -0.0636 -0.5514 0.9082
"""


def pictures(seed: int, size: int = 24) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, 256, (size, size, 3))
    picture = np.clip(truth + generator.normal(0, 20, truth.shape), 0, 255)
    return picture.astype(np.uint8), truth.astype(np.uint8)


def test_ciede2000_gives_sharmas_published_differences() -> None:
    table = np.array([[float(x) for x in line.split()] for line in SHARMA.split("\n") if line])
    assert len(table) == 34
    np.testing.assert_allclose(deltaE_ciede2000(table[:, :3], table[:, 3:6]), table[:, 6], atol=1e-4)


def test_ciede2000_of_pictures_is_the_mean_over_their_pixels() -> None:
    picture, truth = pictures(0, 12)
    each = [
        deltaE_ciede2000(rgb2lab(picture[y, x][None, None]), rgb2lab(truth[y, x][None, None]))[0, 0]
        for y in range(12)
        for x in range(12)
    ]
    assert metrics.ciede2000(picture, truth) == pytest.approx(np.mean(each), rel=1e-9)
    assert metrics.ciede2000(truth, truth) == 0


def test_psnr_and_mse_agree_with_scikit_image() -> None:
    pairs = [pictures(seed) for seed in range(3)]
    error = metrics.mse(*(torch.tensor(np.stack(part)) for part in zip(*pairs, strict=True)))
    for (picture, truth), one, psnr in zip(pairs, error, metrics.psnr(error), strict=True):
        assert one.item() == pytest.approx(np.mean((picture.astype(float) - truth) ** 2), rel=1e-12)
        assert psnr.item() == pytest.approx(peak_signal_noise_ratio(truth, picture), rel=1e-12)
    assert metrics.psnr(torch.zeros(1, dtype=torch.float64)).item() == pytest.approx(58.9, abs=0.05)


def test_ssim_equals_the_published_formula() -> None:
    """Wang et al. 2004 in float64 with scipy: 11 x 11 Gaussian of sigma 1.5, borders left out."""
    picture, truth = pictures(1, 40)
    values = []
    for channel in range(3):
        x, y = picture[..., channel].astype(float), truth[..., channel].astype(float)

        def mean(image: np.ndarray) -> np.ndarray:
            return ndimage.gaussian_filter(image, 1.5, truncate=3.5)[5:-5, 5:-5]

        mx, my = mean(x), mean(y)
        vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        values.append(np.mean((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))))
    assert metrics.ssim(picture, truth) == pytest.approx(np.mean(values), abs=1e-9)
    assert metrics.ssim(truth, truth) == pytest.approx(1)


def test_colourfulness_by_hand() -> None:
    """Half red, half blue: rg = 255, 0; yb = 127.5, -255. Deviations 127.5, 191.25, means 127.5, -63.75."""
    picture = np.zeros((2, 2, 3), dtype=np.uint8)
    picture[0, :, 0] = 255
    picture[1, :, 2] = 255
    expected = np.hypot(127.5, 191.25) + 0.3 * np.hypot(127.5, 63.75)
    assert metrics.colourfulness(picture) == pytest.approx(expected)
    assert metrics.colourfulness(np.full((4, 4, 3), 77, dtype=np.uint8)) == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1, 120))
def test_auc_is_the_area_under_the_curve_of_thresholds(seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    ab, truth = (torch.randn(1, 2, 9, 9, generator=generator) * size for _ in range(2))
    error = (ab - truth).double().square().sum(1).sqrt().numpy()
    thresholds = np.linspace(0, 150, 3001)
    curve = (error.reshape(1, -1) <= thresholds[:, None]).mean(axis=1)
    assert metrics.within(ab, truth).mean().item() == pytest.approx(np.trapezoid(curve, thresholds) / 150, abs=2e-4)


def test_calibration_error_by_hand() -> None:
    """Ten cells at confidence 0.9 of which 6 are right, ten at 0.1 of which 1 is: (10 * 0.3 + 10 * 0) / 20."""
    confidence = torch.tensor([0.9] * 10 + [0.1] * 10)
    right = torch.tensor([True] * 6 + [False] * 4 + [True] + [False] * 9)
    facts = metrics.calibration(confidence, right).numpy()
    assert facts.shape == (15, 3) and facts[:, 0].sum() == 20
    assert metrics.calibration_error(facts) == pytest.approx(0.15, abs=1e-6)
    # confidence 1 falls into the last bin, and sums of two halves are the whole
    assert metrics.calibration(torch.ones(1), torch.tensor([True]))[14, 0] == 1
    halves = metrics.calibration(confidence[:10], right[:10]) + metrics.calibration(confidence[10:], right[10:])
    np.testing.assert_allclose(halves.numpy(), facts)
