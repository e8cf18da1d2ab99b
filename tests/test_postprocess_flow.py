"""Overlap: all of it, once, in bounded memory, with every error where it belongs."""

from __future__ import annotations

import threading
import time

import pytest

from dist_colorize.errors import UserError
from dist_colorize.postprocess.flow import IN_FLIGHT, Flow
from dist_colorize.postprocess.memory import free_memory, require_memory


def flow(threads=3, total=1600, stop=lambda: False, **parts):
    steps = {
        "measure": lambda _: 1,
        "load": lambda n: n,
        "alike": lambda _: (None, 1),
        "compute": lambda loaded: loaded,
        "store": lambda *_: None,
    }
    return Flow(**(steps | parts), threads=threads, bytes_at_once=total, stop=stop)


def test_every_work_once():
    stored = []
    results = list(
        flow(compute=lambda loaded: [n * 10 for n in loaded], store=lambda n, done: stored.append((n, done))).run(
            range(100)
        )
    )
    assert sorted(results) == [(n, None) for n in range(100)]
    assert sorted(stored) == [(n, n * 10) for n in range(100)]


@pytest.mark.parametrize("step", ["measure", "load", "compute", "store"])
def test_one_bad_work_does_not_stop_the_others(step):
    def bad(n, *_):
        if n in (7, [7]):
            raise UserError("seven")
        return n if step != "measure" else 1

    results = dict(flow(**{step: bad}).run(range(20)))
    assert str(results.pop(7)) == "seven"
    assert results == {n: None for n in range(20) if n != 7}


def loaded_at_once(count, **parts):
    """A flow whose works are all loaded before the first is computed."""
    gate = threading.Barrier(count)

    def load(n):
        gate.wait()
        time.sleep(0.05 * (n == 0))  # the first event comes when the others are on their way
        return n

    return flow(threads=count, load=load, **parts)


def test_works_that_are_alike_are_computed_together():
    batches = []

    def compute(loaded):
        time.sleep(0.2 * (not batches))  # as the first is computed, all others arrive
        batches.append(sorted(loaded))
        return loaded

    works = loaded_at_once(12, alike=lambda n: (n % 2, 4), compute=compute)
    assert sorted(works.run(range(12))) == [(n, None) for n in range(12)]
    assert sorted(n for batch in batches for n in batch) == list(range(12))
    assert all(len({n % 2 for n in batch}) == 1 and len(batch) <= 4 for batch in batches)
    assert len(batches) <= 6


def test_what_fails_together_is_tried_alone():
    tried = []

    def compute(loaded):
        time.sleep(0.2 * (not tried))
        tried.append(list(loaded))
        if len(loaded) > 1 or loaded == [3]:
            raise UserError("too much")
        return loaded

    results = dict(loaded_at_once(8, alike=lambda _: (None, 8), compute=compute).run(range(8)))
    assert str(results.pop(3)) == "too much"
    assert results == {n: None for n in range(8) if n != 3}
    assert max(map(len, tried)) > 1


@pytest.mark.parametrize("step", ["measure", "load", "compute", "store"])
def test_a_bug_is_raised(step):
    def bad(*_):
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        list(flow(**{step: bad}).run(range(5)))


def test_memory_is_bounded_and_a_giant_goes_alone():
    lock, held, most, alone = threading.Lock(), [], [], []

    def load(n):
        with lock:
            held.append(n)
            most.append(sum(held))
            if n == 5000:
                alone.append(list(held))
        return n

    def store(n, _):
        time.sleep(0.002)
        with lock:
            held.remove(n)

    sizes = [300] * 20 + [5000] + [700] * 10
    assert len(list(flow(measure=lambda n: n, load=load, store=store, total=1000).run(sizes))) == 31
    assert max(most) <= 5000
    assert alone == [[5000]]
    assert sorted(most)[-2] <= 1000


def test_many_small_ones_are_bounded_in_number():
    lock, now, most = threading.Lock(), [0], [0]

    def load(n):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        return n

    def store(*_):
        time.sleep(0.001)
        with lock:
            now[0] -= 1

    list(flow(threads=8, load=load, store=store).run(range(200)))
    assert most[0] <= IN_FLIGHT


def test_decoding_computing_and_encoding_overlap():
    def slow(n, *_):
        time.sleep(0.02)
        return n

    start = time.monotonic()
    list(flow(load=slow, compute=slow, store=slow).run(range(20)))
    # one after the other would take 1.2 s, the caller's thread alone takes 0.4 s
    assert time.monotonic() - start < 0.9


def test_stop_finishes_what_has_begun():
    stored, asked = [], []

    def stop():
        asked.append(1)
        return len(asked) > 10

    results = list(flow(stop=stop, store=lambda n, _: stored.append(n)).run(range(1000)))
    assert len(results) == 10
    assert sorted(stored) == sorted(n for n, _ in results)


def test_leaving_early_begins_nothing_new():
    loaded = []
    for _ in flow(load=lambda n: loaded.append(n) or n).run(range(1000)):
        break
    time.sleep(0.1)
    count = len(loaded)
    time.sleep(0.1)
    assert len(loaded) == count < 1000


def test_more_memory_than_there_is_is_refused():
    free = free_memory()
    assert free is not None
    assert free > 2**20
    require_memory(1)
    with pytest.raises(UserError, match="GiB of memory"):
        require_memory(2**60)
