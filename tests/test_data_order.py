"""Law 1: which sample and crop comes when is a pure function of (fingerprint, seed, position)."""

from __future__ import annotations

import math
import tracemalloc
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dist_colorize.data.order import UNIFORMS, Order, random_resized_crop


def stream(start: int, count: int) -> np.ndarray:
    return np.arange(start, start + count, dtype=np.uint64)


@settings(max_examples=80, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 2**40))
def test_every_epoch_shows_every_sample_once(size: int, seed: int, epoch: int) -> None:
    sample = Order(size, "photos", seed).draw(stream(epoch * size, size)).sample
    assert np.array_equal(np.sort(sample), np.arange(size))


@pytest.mark.parametrize("size", [2**20 - 1, 2**20, 2**20 + 1])
def test_large_epochs_are_permutations_too(size: int) -> None:
    sample = Order(size, "photos", 3).draw(stream(7 * size, size)).sample
    assert np.array_equal(np.bincount(sample, minlength=size), np.ones(size, dtype=np.int64))


def test_epochs_seeds_and_data_sets_have_different_orders() -> None:
    size = 1000
    orders = [
        Order(size, "photos", 0).draw(stream(0, size)).sample,
        Order(size, "photos", 0).draw(stream(size, size)).sample,
        Order(size, "photos", 1).draw(stream(0, size)).sample,
        Order(size, "other photos", 0).draw(stream(0, size)).sample,
    ]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert np.mean(one == other) < 0.01  # two random orders agree in one place of a thousand
            assert abs(stats.spearmanr(one, other).statistic) < 0.15


@pytest.mark.parametrize("size", [3, 4, 5, 6])
def test_all_orders_of_few_samples_come_equally_often(size: int) -> None:
    orders = math.factorial(size)
    epochs = 200 * orders
    drawn = Order(size, "photos", 0).draw(stream(0, size * epochs)).sample.reshape(epochs, size)
    codes = drawn @ size ** np.arange(size)
    counts = np.unique(codes, return_counts=True)[1]
    assert len(counts) == orders
    assert stats.chisquare(counts).pvalue > 1e-4


def test_neighbours_in_the_stream_are_unrelated() -> None:
    size = 10_000
    sample = Order(size, "photos", 0).draw(stream(0, size)).sample
    assert abs(np.corrcoef(sample[:-1], sample[1:])[0, 1]) < 0.04
    steps = np.bincount(np.diff(sample) % size, minlength=size)
    assert steps.max() < 12  # Poisson with mean 1: twelve of one kind among 10,000 has a chance below 1e-5


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 5000),
    world=st.integers(1, 16),
    local=st.integers(1, 8),
    step=st.integers(0, 10_000),
)
def test_ranks_together_draw_what_one_rank_would(size: int, world: int, local: int, step: int) -> None:
    order = Order(size, "photos", 5)
    total = world * local
    whole = order.draw(stream(step * total, total))
    parts = [order.draw(stream(step * total + rank * local, local)) for rank in range(world)]
    assert np.array_equal(whole.sample, np.concatenate([part.sample for part in parts]))
    assert np.array_equal(whole.uniforms, np.concatenate([part.uniforms for part in parts]))


def test_positions_may_come_in_any_order_and_length() -> None:
    order = Order(777, "photos", 5)
    whole = order.draw(stream(0, 50_000))
    shuffled = np.random.default_rng(0).permutation(50_000)
    again = order.draw(shuffled.astype(np.uint64))
    assert np.array_equal(again.sample, whole.sample[shuffled])
    assert np.array_equal(again.uniforms, whole.uniforms[shuffled])


def test_epoch_position_names_epoch_and_place() -> None:
    order = Order(10, "photos", 0)
    assert [order.epoch_position(p) for p in (0, 9, 10, 25)] == [(0, 0), (0, 9), (1, 0), (2, 5)]


def test_a_billion_samples_need_no_memory() -> None:
    size = 10**9
    tracemalloc.start()
    order = Order(size, "photos", 0)
    draw = order.draw(stream(123 * size + 999_999_000, 4096))  # straddles the end of an epoch
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20
    for epoch in (draw.sample[:1000], draw.sample[1000:]):
        assert len(np.unique(epoch)) == len(epoch)
        assert epoch.min() >= 0
        assert epoch.max() < size
        assert stats.kstest(epoch / size, "uniform").pvalue > 1e-4


def test_uniforms_are_uniform_and_independent() -> None:
    u = Order(1000, "photos", 0).draw(stream(0, 100_000)).uniforms
    assert u.shape == (100_000, UNIFORMS)
    assert u.min() >= 0
    assert u.max() < 1
    for column in u.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4
        assert abs(np.corrcoef(column[:-1], column[1:])[0, 1]) < 0.015
    assert np.abs(np.corrcoef(u.T) - np.eye(UNIFORMS)).max() < 0.015


def test_substitutes_are_pure_in_range_and_differ_by_attempt() -> None:
    order = Order(1000, "photos", 0)
    drawn = np.array([[order.substitute(p, attempt) for attempt in range(1, 6)] for p in range(2000)])
    again = np.array(
        [[Order(1000, "photos", 0).substitute(p, attempt) for attempt in range(1, 6)] for p in range(2000)]
    )
    assert np.array_equal(drawn, again)
    assert stats.chisquare(np.bincount(drawn.ravel(), minlength=1000)).pvalue > 1e-4
    assert np.mean(drawn[:, 0] == drawn[:, 1]) < 0.01


@pytest.mark.parametrize("size", [0, -1, 2**62 + 1])
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="between 1 and"):
        Order(size, "photos", 0)


def test_the_order_never_changes_by_accident() -> None:
    """A run that resumes under a newer version must see the same samples: change the golden value only on purpose."""
    digest = sha256()
    for size in (1, 7, 8, 1000, 10**9, 2**62):
        order = Order(size, "golden", 42)
        draw = order.draw(stream(2**40, 1000))
        digest.update(draw.sample.astype("<i8").tobytes())
        digest.update(draw.uniforms.astype("<f8").tobytes())
        digest.update(str([order.substitute(p, 1) for p in range(10)]).encode())
    assert digest.hexdigest() == "60a79d3e9e45a64b2cdc56a876b936c0f808e288476ddd3394de0bb2a6def2bd"


sides = st.integers(1, 5000)


@settings(max_examples=200, deadline=None)
@given(
    width=sides,
    height=sides,
    u=st.lists(st.floats(0, 1, exclude_max=True), min_size=UNIFORMS, max_size=UNIFORMS),
    least=st.floats(0.01, 1.0),
    narrowest=st.floats(0.1, 2.0),
)
def test_crops_lie_inside_their_image(width: int, height: int, u: list[float], least: float, narrowest: float) -> None:
    crops = random_resized_crop(
        np.array([u]), np.array([width]), np.array([height]), (least, 1.0), (narrowest, narrowest * 2), flip=True
    )
    assert 1 <= crops.width[0] <= width - crops.x[0]
    assert 1 <= crops.height[0] <= height - crops.y[0]
    assert crops.x[0] >= 0
    assert crops.y[0] >= 0
    assert crops.flip[0] == (u[4] < 0.5)


def test_crops_have_the_distribution_of_the_definition() -> None:
    n = 40_000
    u = Order(1000, "photos", 0).draw(stream(0, n)).uniforms
    width, height = np.full(n, 3000), np.full(n, 2000)
    # With areas of at most 40 %, any ratio of 3/4 to 4/3 fits into 3:2, so nothing is clamped.
    crops = random_resized_crop(u, width, height, (0.2, 0.4), (3 / 4, 4 / 3), flip=True)
    w, h = crops.width.astype(float), crops.height.astype(float)
    assert stats.kstest(w * h / 6e6, "uniform", args=(0.2, 0.2)).pvalue > 1e-4
    assert stats.kstest(np.log(w / h), "uniform", args=(np.log(3 / 4), 2 * np.log(4 / 3))).pvalue > 1e-4
    assert stats.kstest((crops.x + 0.5) / (3000 - w + 1), "uniform").pvalue > 1e-4
    assert stats.kstest((crops.y + 0.5) / (2000 - h + 1), "uniform").pvalue > 1e-4
    assert abs(crops.flip.mean() - 0.5) < 0.015


def test_a_crop_that_cannot_fit_keeps_its_area_when_another_ratio_does() -> None:
    n = 1000
    u = Order(1000, "photos", 0).draw(stream(0, n)).uniforms
    crops = random_resized_crop(u, np.full(n, 400), np.full(n, 300), (0.9, 0.9), (0.5, 2.0), flip=False)
    area = crops.width * crops.height / (400 * 300)
    assert np.abs(area - 0.9).max() < 0.01
    assert not crops.flip.any()


def test_a_panorama_gives_the_whole_height() -> None:
    u = Order(1000, "photos", 0).draw(stream(0, 100)).uniforms
    crops = random_resized_crop(u, np.full(100, 5000), np.full(100, 50), (0.5, 1.0), (3 / 4, 4 / 3), flip=True)
    assert (crops.height == 50).all()
    assert (crops.width < 5000).all()
