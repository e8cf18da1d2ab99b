"""sRGB <-> Lab against scikit-image, and the gamut clamp against its own law."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.color
import skimage.data
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_colorize.color import lab


def channels_first(image: np.ndarray) -> torch.Tensor:
    # [H, W, C] -> [C, H, W]
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, 0)))


@pytest.mark.parametrize("photograph", ["astronaut", "chelsea", "coffee", "rocket"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_lab_equals_scikit_image(photograph: str, dtype: torch.dtype, tolerance: float) -> None:
    image = getattr(skimage.data, photograph)() / 255.0
    expected = channels_first(skimage.color.rgb2lab(image))
    found = lab.srgb_to_lab(channels_first(image).to(dtype))
    assert (found - expected).abs().max() < tolerance
    assert (lab.lightness(channels_first(image).to(dtype)) - expected[:1]).abs().max() < tolerance


def test_round_trip_is_exact_on_every_corner_and_face_of_the_cube() -> None:
    ramp = torch.linspace(0, 1, 18, dtype=torch.float64)
    cube = torch.stack(torch.meshgrid(ramp, ramp, ramp, indexing="ij")).flatten(2)
    assert (lab.lab_to_srgb(lab.srgb_to_lab(cube)) - cube).abs().max() < 1e-6


def test_gray_from_lightness_is_the_gray_photograph() -> None:
    gray = torch.arange(256, dtype=torch.float64).view(1, 1, 256) / 255
    lightness = lab.lightness(gray.expand(3, 1, 256))
    assert (lab.gray_from_lightness(lightness) - gray).abs().max() < 1e-6


def test_gradients_are_finite_everywhere() -> None:
    ramp = torch.linspace(0, 1, 9)
    rgb = torch.stack(torch.meshgrid(ramp, ramp, ramp, indexing="ij")).flatten(2).requires_grad_()
    lab.lab_to_srgb(lab.srgb_to_lab(rgb)).sum().backward()
    assert rgb.grad is not None and rgb.grad.isfinite().all()


@given(st.floats(0, 100), st.floats(-128, 127), st.floats(-128, 127))
def test_gamut_clamp_keeps_lightness_and_hue(level: float, a: float, b: float) -> None:
    lightness = torch.full((1, 1, 1), level, dtype=torch.float64)
    ab = torch.tensor([a, b], dtype=torch.float64).view(2, 1, 1)
    clamped = lab.clamp_to_gamut(lightness, ab)
    rgb = lab.lab_to_srgb(torch.cat([lightness, clamped]))
    assert (rgb > -2e-4).all() and (rgb < 1 + 2e-4).all()
    # same hue, never more chroma
    assert abs(a * clamped[1].item() - b * clamped[0].item()) < 1e-6
    assert clamped.norm() <= ab.norm() + 1e-12


def test_gamut_clamp_leaves_photographs_alone_and_goes_no_further_than_it_must() -> None:
    image = lab.srgb_to_lab(channels_first(skimage.data.astronaut() / 255.0))
    clamped = lab.clamp_to_gamut(image[:1], image[1:])
    assert torch.equal(clamped, image[1:])
    vivid = image[1:] * 4
    clamped = lab.clamp_to_gamut(image[:1], vivid)
    changed = (clamped != vivid).any(0)
    assert changed.float().mean() > 0.2
    rgb = lab.lab_to_srgb(torch.cat([image[:1], torch.where(changed, clamped * (1 + 3 / 4096) + 1e-3, clamped)]))
    slack = torch.minimum(rgb.amin(0), 1 - rgb.amax(0))
    # one bisection step further and most clamped colours would leave the gamut: they sit on its surface
    assert (slack[changed] < 0.01).float().mean() > 0.99
