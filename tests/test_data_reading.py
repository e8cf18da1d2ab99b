"""Reading ahead: in order, by many threads at once, over the borders of batches, and no further than it should."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dist_colorize.data.catalog import build_index
from dist_colorize.data.columns import Photographs, open_index
from dist_colorize.data.config import DataConfig
from dist_colorize.data.loader import Loader
from dist_colorize.data.order import Order
from dist_colorize.data.plan import Plan, evaluation_plan
from dist_colorize.data.reading import Job, Reader

COUNT = 60


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Photographs:
    root = tmp_path_factory.mktemp("photographs")
    noise = np.random.default_rng(0).integers(0, 256, (COUNT, 4, 4, 3), dtype=np.uint8)
    for number, image in enumerate(noise):
        Image.fromarray(image).resize((32, 32)).save(root / f"{number}.jpg")
    return open_index(build_index(root, 32, tmp_path_factory.mktemp("index")))


def plans_of(photographs: Photographs, size: int, drawn: list[int]) -> Iterator[Plan]:
    for start in range(0, COUNT, size):
        drawn.append(start)
        yield evaluation_plan(photographs, np.arange(start, start + size))


def jobs_of(photographs: Photographs, threads: int, size: int, drawn: list[int]) -> Generator[Job, None, None]:
    return Reader(photographs, threads, []).jobs(plans_of(photographs, size, drawn), size)


class SlowFiles:
    """Stands in for Photographs.read: `wait(row)` before each; notes which rows are being read at the same time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, wait: Callable[[int], object]) -> None:
        self.now: list[int] = []
        self.most: list[int] = []
        self.total = 0
        self._lock, self._wait, self._read = threading.Lock(), wait, Photographs.read
        monkeypatch.setattr(Photographs, "read", lambda photographs, row: self.read(photographs, row))

    def read(self, photographs: Photographs, row: int) -> bytes:
        with self._lock:
            self.total += 1
            self.now.append(row)
            self.most = max(self.most, self.now.copy(), key=len)
        self._wait(row)
        with self._lock:
            self.now.remove(row)
        return self._read(photographs, row)


def test_jobs_come_in_order_however_long_each_file_takes(
    photographs: Photographs, monkeypatch: pytest.MonkeyPatch
) -> None:
    SlowFiles(monkeypatch, lambda row: time.sleep(0.002 * (row * 7 % 5)))
    rows = []
    for job in jobs_of(photographs, 8, 4, []):
        rows += job.plan.row.tolist()
        for row, encoded in zip(job.plan.row.tolist(), job.encoded, strict=True):
            assert encoded.tobytes() == Path(photographs.root, photographs.name(row)).read_bytes()
    assert rows == list(range(COUNT))


@pytest.mark.parametrize(("threads", "size", "batches"), [(16, 8, 2), (12, 4, 3), (6, 1, 6), (4, 20, 1)])
def test_all_threads_read_over_the_borders_of_batches(
    photographs: Photographs, monkeypatch: pytest.MonkeyPatch, threads: int, size: int, batches: int
) -> None:
    """Nothing is read to its end until as many files are being read as there are threads: more than one batch has."""
    together, met = threading.Barrier(threads), threading.Event()

    def wait(row: int) -> None:
        if not met.is_set():
            together.wait(20)
            met.set()

    files = SlowFiles(monkeypatch, wait)
    with closing(jobs_of(photographs, threads, size, [])) as jobs:
        next(jobs)
    assert len(files.most) == threads
    assert {row // size for row in files.most} == set(range(batches))


@pytest.mark.parametrize(("threads", "size", "ahead"), [(4, 4, 2), (4, 20, 2), (16, 4, 4), (4, 1, 4)])
def test_two_batches_are_read_ahead_or_as_many_as_keep_the_threads_busy(
    photographs: Photographs, threads: int, size: int, ahead: int
) -> None:
    drawn: list[int] = []
    with closing(jobs_of(photographs, threads, size, drawn)) as jobs:
        for taken in (1, 2):
            next(jobs)
            assert len(drawn) == min(taken + ahead, COUNT // size)


def test_closing_does_not_wait_for_what_nobody_reads(photographs: Photographs, monkeypatch: pytest.MonkeyPatch) -> None:
    files = SlowFiles(monkeypatch, lambda row: time.sleep(0.01))
    jobs = jobs_of(photographs, 2, 20, [])
    next(jobs)
    begun = files.total
    jobs.close()
    assert files.total <= begun + 2  # one that each thread may have taken up meanwhile
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read")]


def test_a_slow_file_system_is_waited_for_by_all_readers_at_once(
    photographs: Photographs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 ms a file: one batch of 8 at a time would be 160 files/s at most, 16 readers can have 320."""
    SlowFiles(monkeypatch, lambda row: time.sleep(0.05))
    world = SimpleNamespace(rank=0, size=1, local_size=1, device=torch.device("cpu"))
    order = Order(COUNT, photographs.fingerprint, 0)
    with Loader(photographs, DataConfig(crop=16, threads=1, readers=16), order, world, 8) as loader:
        batches = loader.batches()
        for _ in range(8):  # what is ready ahead does not count
            next(batches)
        start = time.perf_counter()
        for _ in range(30):
            next(batches)
        assert 30 * 8 / (time.perf_counter() - start) > 200
