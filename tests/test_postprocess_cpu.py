"""The CPU primitives against independent oracles (scipy, scikit-image, float64 loops), and law 7 as properties."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
from emulator.cupy_standin import DeviceMemory
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.color import lab2rgb

from dist_colorize.color.gamut import bin_centers
from dist_colorize.postprocess import expectation, merge
from dist_colorize.postprocess.cpu import TorchBackend, gaussian

BACKEND = TorchBackend()
PATIENT = settings(max_examples=60, deadline=None)


@st.composite
def fields(draw, largest: int = 12):
    """(ab [1, 2, h, w], confidence [1, h, w]) as stages meet them: any size from 1x1, odd confidences."""
    height, width = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ab = random.uniform(-110, 110, (1, 2, height, width)) * draw(st.sampled_from([0.0, 0.1, 1.0]))
    kind = draw(st.sampled_from(["noise", "none", "all", "one pixel", "half"]))
    confidence = {
        "noise": lambda: random.choice([0.0, 0.1, 0.15, 0.5, 1.0], (1, height, width)),
        "none": lambda: np.zeros((1, height, width)),
        "all": lambda: np.ones((1, height, width)),
        "one pixel": lambda: np.arange(height * width).reshape(1, height, width) == random.integers(height * width),
        "half": lambda: np.broadcast_to(np.arange(width) < width / 2, (1, height, width)),
    }[kind]()
    return torch.tensor(ab, dtype=torch.float32), torch.tensor(np.array(confidence), dtype=torch.float32)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return bool((left.view(torch.int32) == right.view(torch.int32)).all())


def decode_slowly(features, weight, bias, temperature):
    """softmax(logits / temperature) expectation in float64, a cell at a time."""
    batch, _, height, width = features.shape
    ab, confidence = np.zeros((batch, 2, height, width)), np.zeros((batch, height, width))
    for b, y, x in np.ndindex(batch, height, width):
        logits = (weight @ features[b, :, y, x] + bias) / temperature
        probability = np.exp(logits - logits.max())
        probability /= probability.sum()
        ab[b, :, y, x] = probability @ bin_centers()
        confidence[b, y, x] = probability.max()
    return ab, confidence


@pytest.fixture(params=["machine code", "torch"])
def way(request, monkeypatch):
    """decode as it is on a CPU, and as it is on a GPU that torch knows."""
    if request.param == "torch":
        monkeypatch.setattr(expectation, "on_cpu", expectation.in_torch)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("temperature", [0.05, 0.38, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decode_equals_a_float64_loop(temperature, dtype):
    torch.manual_seed(0)
    features = torch.randn(2, 64, 3, 5).to(dtype)
    weight, bias = torch.randn(313, 64) * 0.2, torch.randn(313)
    ab, confidence = BACKEND.decode(features, weight, bias, temperature)
    # float32 carries a logit of 10 / 0.05 to 1e-5, and a probability to as much, relative
    expected = decode_slowly(*(t.double().numpy() for t in (features, weight, bias)), temperature)
    np.testing.assert_allclose(ab.numpy(), expected[0], atol=2e-3)
    np.testing.assert_allclose(confidence.numpy(), expected[1], atol=2e-5)


@pytest.mark.usefixtures("way")
def test_decode_in_chunks_and_channels_last_is_the_same(monkeypatch):
    torch.manual_seed(0)
    features, weight, bias = torch.randn(1, 8, 9, 11), torch.randn(313, 8), torch.randn(313)
    whole = BACKEND.decode(features, weight, bias, 0.38)
    monkeypatch.setattr(expectation, "CPU_CELLS", 7)
    monkeypatch.setattr(expectation, "GPU_CELLS", 7)
    parts = BACKEND.decode(features.to(memory_format=torch.channels_last), weight, bias, 0.38)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=0)
    assert all(tensor.is_contiguous() for tensor in whole)


@pytest.mark.parametrize("poison", [float("nan"), -float("nan"), float("inf"), -float("inf"), 3e30, -3e30])
def test_exponents_beyond_the_limit_count_as_the_limit(poison):
    """Both ways against float64: some exponents of some cells, and all of one cell."""
    torch.manual_seed(2)
    exponents = torch.randn(5, 313) * 5
    exponents[0, [3, 200]] = poison
    exponents[1, :] = poison
    exponents[2, 0], exponents[2, 1] = 2e30, poison
    limit = 1e30
    clamped = exponents.double().nan_to_num(nan=-limit, posinf=limit, neginf=-limit).clamp(-limit, limit)
    p = torch.softmax((clamped - clamped.amax(dim=1, keepdim=True)) * np.log(2), dim=1)
    for cell in range(5):
        for way in (expectation.on_cpu, expectation.in_torch):
            ab, confidence = way(torch.zeros(1, 4), torch.zeros(313, 4), exponents[cell], limit)
            np.testing.assert_allclose(ab[0].numpy(), p[cell] @ torch.tensor(bin_centers()), atol=2e-4)
            np.testing.assert_allclose(confidence[0].item(), p[cell].max().item(), rtol=1e-5)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_decode_stays_finite_whatever_the_network_says(poison):
    features = torch.randn(1, 4, 3, 3)
    features[0, 1, 1, 1] = poison
    bias = torch.zeros(313)
    bias[7] = poison
    for case in (torch.zeros(313), bias):
        ab, confidence = BACKEND.decode(features, torch.randn(313, 4), case, 0.38)
        assert torch.isfinite(ab).all()
        assert ((confidence > 0) & (confidence <= 1)).all()
        assert ab.abs().max() <= 110


def test_decode_leaves_torchs_threads_alone():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        BACKEND.decode(torch.randn(1, 64, 80, 80), torch.randn(313, 64), torch.randn(313), 0.38)
        with ThreadPoolExecutor(1) as pool:
            assert [torch.get_num_threads(), pool.submit(torch.get_num_threads).result()] == [3, 3]
    finally:
        torch.set_num_threads(before)


@PATIENT
@given(fields(), st.floats(0.3, 6.0))
def test_gaussian_equals_scipy(field, sigma):
    ab, _ = field
    expected = ndimage.gaussian_filter(ab.double().numpy(), sigma, axes=(2, 3), mode="reflect", truncate=3.0)
    np.testing.assert_allclose(gaussian(ab, sigma).numpy(), expected, atol=2e-4)


@PATIENT
@given(fields(), st.floats(0.3, 4.0), st.sampled_from([(0.1, 0.6), (0.5, 0.5), (2.0, 2.0), (0.0, 0.0)]))
def test_blend_equals_its_formula_and_leaves_the_confident_alone(field, sigma, limits):
    ab, confidence = field
    low, high = limits
    before = ab.clone()
    result = BACKEND.blend(ab, confidence, sigma, low, high)
    c = confidence.double().numpy()[:, None]
    # the float32 confidence 0.1 is what the backend compares
    low, high = np.float32(low), np.float32(high)
    share = (c >= low) * 1.0 if low == high else np.clip((c - low) / (high - low), 0, 1)
    wide = ab.double().numpy()
    blurred = ndimage.gaussian_filter(wide, sigma, axes=(2, 3), mode="reflect", truncate=3.0)
    np.testing.assert_allclose(result.numpy(), share * wide + (1 - share) * blurred, atol=3e-4)
    kept = torch.from_numpy(share == 1).expand_as(ab)
    assert same_bits(result[kept], ab[kept])
    assert same_bits(ab, before)


@PATIENT
@given(fields(), st.sampled_from([0.0, 20.0]), st.floats(-180, 360), st.sampled_from([60.0, 180.0, 360.0]))
def test_scale_chroma_equals_polar_coordinates(field, min_chroma, hue, width):
    ab, confidence = field
    result = BACKEND.scale_chroma(ab, confidence, min_chroma, 0.4, hue, width, 0.25)
    colour = ab[0, 0].double().numpy() + 1j * ab[0, 1].double().numpy()
    chroma, angle = np.abs(colour), np.degrees(np.angle(colour))
    distance = np.abs((angle - hue + 180) % 360 - 180)
    mask = (chroma > min_chroma) & (confidence[0].numpy() < 0.4) & (distance <= width / 2)
    expected = np.where(mask, (min_chroma + (chroma - min_chroma) * 0.25) * np.exp(1j * np.angle(colour)), colour)
    # on the very edge of the range of hues or of chroma, float32 may decide otherwise
    sure = (np.abs(distance - width / 2) > 1e-3) & (np.abs(chroma - min_chroma) > 1e-4)
    np.testing.assert_allclose((result[0, 0].numpy() + 1j * result[0, 1].numpy())[sure], expected[sure], atol=1e-4)
    assert torch.isfinite(result).all()
    kept = torch.from_numpy(~mask & sure)
    assert same_bits(result[0, :, kept], ab[0, :, kept])


def repair_slowly(ab, confidence, min_chroma, max_confidence, radius, min_neighbours, sweeps, sigma):
    """The definition in stages.Backend.repair, cell by cell in float64."""
    chroma = np.hypot(ab[0, 0], ab[0, 1])
    suspect, trusted = (chroma >= min_chroma) & (confidence[0] < max_confidence), confidence[0] >= max_confidence
    current = ab[0].copy()
    for _ in range(sweeps):
        seen, helpful = current.copy(), trusted.copy()
        for y, x in np.argwhere(suspect):
            window = (slice(max(0, y - radius), y + radius + 1), slice(max(0, x - radius), x + radius + 1))
            if helpful[window].sum() >= min_neighbours:
                current[:, y, x] = seen[(slice(None), *window)][:, helpful[window]].mean(axis=1)
                trusted[y, x], suspect[y, x] = True, False
        if (trusted == helpful).all():
            break
    blurred = ndimage.gaussian_filter(ab[0], sigma, axes=(1, 2), mode="reflect", truncate=3.0)
    return np.where(suspect, blurred, current)[None], suspect


@PATIENT
@given(fields(), st.sampled_from([0.0, 40.0]), st.integers(1, 4), st.integers(1, 8), st.integers(0, 6))
def test_repair_equals_a_float64_loop_leaves_no_hole_and_touches_no_other_cell(field, chroma, radius, least, sweeps):
    ab, confidence = field
    arguments = (chroma, float(np.float32(0.15)), radius, least, sweeps, 2.0)
    result = BACKEND.repair(ab, confidence, *arguments)
    expected, _ = repair_slowly(ab.double().numpy(), confidence.double().numpy(), *arguments)
    near_edge = np.abs(np.hypot(*ab[0].double().numpy()) - chroma).min() < 1e-4 and chroma > 0
    if not near_edge:
        np.testing.assert_allclose(result.numpy(), expected, atol=3e-4)
    assert torch.isfinite(result).all()
    suspect = (torch.sqrt(ab[:, 0] ** 2 + ab[:, 1] ** 2) >= chroma) & (confidence < 0.15)
    kept = ~suspect.unsqueeze(1).expand_as(ab)
    assert same_bits(result[kept], ab[kept])


def test_untrusted_colours_never_reach_a_mean():
    """A huge colour that nobody trusts must leave no trace, not even a rounding error, in its neighbours' repair."""
    ab, confidence = torch.zeros(1, 2, 9, 9), torch.ones(1, 9, 9)
    ab[:] = 12.5
    ab[0, :, 4, 4], confidence[0, 4, 4] = 1e30, 0.0
    ab[0, :, 4, 5], confidence[0, 4, 5] = -90.0, 0.0
    result = BACKEND.repair(ab, confidence, 20.0, 0.5, 2, 3, 4, 2.0)
    assert (result == 12.5).all()


def test_repair_works_inwards_from_the_edge_of_a_large_hole():
    ab, confidence = torch.full((1, 2, 15, 15), 30.0), torch.ones(1, 15, 15)
    ab[0, :, 3:12, 3:12], confidence[0, 3:12, 3:12] = -60.0, 0.0
    assert torch.allclose(BACKEND.repair(ab, confidence, 20.0, 0.5, 1, 3, 20, 2.0), torch.tensor(30.0))
    # one sweep reaches only the rim; the middle takes the blur
    once = BACKEND.repair(ab, confidence, 20.0, 0.5, 1, 3, 1, 2.0)
    assert once[0, 0, 3, 3] == 30
    assert once[0, 0, 7, 7] < 0


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("size", [(1, 1), (5, 700), (97, 33), (20, 2100)])
def test_compose_equals_scikit_image(size, bits):
    torch.manual_seed(1)
    lightness = torch.rand(*size) * 100
    # small chroma: scikit-image clips RGB where we keep L and hue
    ab = (torch.rand(2, 6, 9) - 0.5) * 8
    result = BACKEND.compose(lightness, ab, size, 0, bits).numpy()
    assert result.dtype == (np.uint8 if bits == 8 else np.uint16)
    large = torch.nn.functional.interpolate(ab[None].double(), size=size, mode="bilinear", align_corners=False)[0]
    lab = np.concatenate([lightness[None].double().numpy(), large.numpy()]).transpose(1, 2, 0)
    exact = lab2rgb(lab) * (2**bits - 1)
    inside = (lightness.numpy() > 4) & (lightness.numpy() < 96)
    assert np.abs(result - exact)[inside].max(initial=0) <= (0.51 if bits == 8 else 1.0)


def test_gray_comes_back():
    """ab = 0 gives every 8-bit gray level back, and every 16-bit one but for the white point's own rounding.

    scikit-image's matrix and its white differ in the fifth digit: its neutral is up to 2 of 65535 levels off neutral.
    """
    from dist_colorize.color.lab import lightness

    for bits in (8, 16):
        levels = torch.arange(2**bits, dtype=torch.float32) / (2**bits - 1)
        row = lightness(levels.view(1, 1, -1).expand(3, 1, -1))[0]
        result = BACKEND.compose(row, torch.zeros(2, 1, 1), tuple(row.shape), 0, bits).to(torch.int64)
        assert (result - torch.arange(2**bits).view(1, -1, 1)).abs().max() <= (0 if bits == 8 else 2)


@PATIENT
@given(st.integers(1, 40), st.integers(1, 90), st.data())
@pytest.mark.bits
def test_strips_have_the_bits_of_the_whole(height, width, data):
    cuts = sorted({0, height, *data.draw(st.lists(st.integers(0, height), max_size=4))})
    generator = torch.Generator().manual_seed(height * 100 + width)
    lightness = torch.rand(height, width, generator=generator) * 100
    ab = (torch.rand(2, 5, 7, generator=generator) - 0.5) * 150
    for bits in (8, 16):
        whole = BACKEND.compose(lightness, ab, (height, width), 0, bits)
        strips = [
            BACKEND.compose(lightness[start:end], ab, (height, width), start, bits) for start, end in pairwise(cuts)
        ]
        assert (torch.cat([s.to(torch.int32) for s in strips]) == whole.to(torch.int32)).all()


def test_out_of_gamut_colours_keep_lightness_and_hue():
    from skimage.color import rgb2lab

    lightness = torch.linspace(5, 95, 64).repeat(64, 1)
    angle = torch.linspace(0, 2 * np.pi, 64).view(-1, 1).expand(64, 64)
    ab = 200 * torch.stack([angle.cos(), angle.sin()])
    rgb = BACKEND.compose(lightness, ab, (64, 64), 0, 16).numpy()
    lab = rgb2lab(rgb / 65535.0)
    assert np.abs(lab[..., 0] - lightness.numpy()).max() < 0.1
    strong = np.hypot(lab[..., 1], lab[..., 2]) > 5
    turn = np.angle(np.exp(1j * (np.arctan2(lab[..., 2], lab[..., 1]) - angle.numpy())))
    assert np.abs(turn[strong]).max() < 0.02
    # and as much chroma as the gamut allows: the next 2 % would leave it
    from dist_colorize.color.lab import lab_to_srgb

    further = torch.from_numpy(lab).permute(2, 0, 1).clone()
    further[1:] *= 1.02
    outside = (lab_to_srgb(further) > 1) | (lab_to_srgb(further) < 0)
    assert outside.any(dim=0).numpy()[strong].all()


def test_compose_agrees_with_color_lab_where_colours_are_clamped():
    from dist_colorize.color import lab

    torch.manual_seed(3)
    lightness, ab = torch.rand(50, 60) * 100, (torch.rand(2, 50, 60) - 0.5) * 200
    reference = lab.lab_to_srgb(torch.cat([lightness[None], lab.clamp_to_gamut(lightness[None], ab)]))
    expected = (reference.clamp(0, 1) * 255).permute(1, 2, 0)
    result = BACKEND.compose(lightness, ab, (50, 60), 0, 8).float()
    assert (result - expected).abs().max() < 1.01
    assert ((result - expected).abs() < 0.51).float().mean() > 0.999


@pytest.mark.bits
def test_compose_in_threads_is_the_same_and_works_in_inference_mode(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    generator = torch.Generator().manual_seed(5)
    lightness, ab = torch.rand(64, 3000, generator=generator) * 100, torch.randn(2, 4, 4, generator=generator) * 60
    rows = [BACKEND.compose(lightness[row : row + 1], ab, (64, 3000), row, 8) for row in range(64)]
    with torch.inference_mode():
        assert (BACKEND.compose(lightness, ab, (64, 3000), 0, 8) == torch.cat(rows)).all()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("size", [(1, 1), (1, 3001), (33, 61), (224, 224), (500, 333)])
def test_composing_in_torch_agrees_with_composing_by_rows(device, size, bits):
    generator = torch.Generator().manual_seed(6)
    lightness = 100 * torch.rand(3, *size, generator=generator)
    ab = 40 * torch.randn(3, 2, -(-size[0] // 2), -(-size[1] // 2), generator=generator)
    found = merge.in_torch(lightness.to(device), ab.to(device), size, 0, bits).cpu()
    expected = torch.stack([merge.compose(*one, size, 0, bits) for one in zip(lightness, ab, strict=True)])
    assert found.dtype == expected.dtype
    # out of gamut a step of the bisection may fall on either side: 1 part in 4096 of the chroma
    apart = (found.int() - expected.int()).abs()
    assert (apart <= 1).double().mean() >= 0.999 and apart.max() <= 1 * 257 ** (bits == 16)
    backend = TorchBackend(device)
    if bits == 8:
        whole = backend.pictures(lightness[:, None].to(device), ab.to(device)).cpu()
        assert whole.shape == (3, *size, 3) and torch.equal(whole, expected if device.type == "cpu" else found)
    first = size[0] // 3
    strip = backend.compose(lightness[0, first:].to(device), ab[0].to(device), size, first, bits).cpu()
    assert torch.equal(strip, expected[0, first:] if device.type == "cpu" else found[0, first:])


def test_composing_in_torch_waits_for_nothing():
    with DeviceMemory(host_copies=False):
        merge.in_torch(torch.full((1, 9, 9), 50.0), torch.zeros(1, 2, 5, 5), (9, 9), 0, 8)


@pytest.mark.parametrize(("size", "row0", "bits"), [((9, 8), 0, 8), ((9, 9), 1, 8), ((9, 9), -1, 8), ((9, 9), 0, 12)])
def test_rows_that_do_not_fit_the_picture_are_refused(size, row0, bits):
    for compose in (BACKEND.compose, lambda L, ab, *rest: merge.in_torch(L[None], ab[None], *rest)):
        with pytest.raises(ValueError, match="do not fit"):
            compose(torch.zeros(9, 9), torch.zeros(2, 5, 5), size, row0, bits)
