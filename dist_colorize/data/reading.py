"""The encoded images of the batches to come, read while earlier batches are decoded.

On a network file system a read is some milliseconds of waiting, however small the file. So there are more threads than
cores, and they do not pause between two batches: the next ones are being read while the consumer works on one.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dist_colorize.data.columns import Photographs
from dist_colorize.data.plan import PADDING, Plan
from dist_colorize.errors import RunFailed

ATTEMPTS = 32
"""Substitutes tried for one slot. So many failures in a row mean that the data have gone, not that a file is bad."""
AHEAD = 2
"""Batches being read while an earlier one is decoded; more where they are too small to keep all threads busy."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replaced:
    """A photograph that could not be used although the index has it."""

    root: str
    """The folder that `name` is relative to."""
    name: str
    reason: str


@dataclass
class Job:
    """A batch to be decoded."""

    plan: Plan
    encoded: list[NDArray[np.uint8]] = field(init=False)
    """[B] encoded images, uint8 [bytes] each."""
    attempts: list[int] = field(init=False)
    """[B] substitutes tried so far."""

    def __post_init__(self) -> None:
        self.encoded = [BLANK] * len(self.plan.row)
        self.attempts = [0] * len(self.plan.row)


class Reader:
    """Reads what plans ask for; a photograph that cannot be used is reported once and makes room for a substitute.

    Args: photographs: what the plans' rows count in. threads: files read at the same time. replaced: takes the reports.
    """

    def __init__(self, photographs: Photographs, threads: int, replaced: list[Replaced]) -> None:
        self._photographs, self._threads, self._replaced = photographs, threads, replaced
        self.bad: dict[int, Replaced] = {}
        """The rows that could not be used at least once."""

    def jobs(self, plans: Iterator[Plan], size: int) -> Generator[Job, None, None]:
        """A job for each plan of `size` slots, in order. Raises RunFailed where too many files in a row are bad."""
        workers = ThreadPoolExecutor(self._threads, thread_name_prefix="read")
        ahead = max(AHEAD, math.ceil(self._threads / size))
        pending: deque[tuple[Job, Iterator[None]]] = deque()
        try:
            while True:
                while len(pending) <= ahead and (plan := next(plans, None)) is not None:
                    job = Job(plan)
                    pending.append((job, workers.map(partial(self._read, job), range(size))))
                if not pending:
                    return
                job, reading = pending.popleft()
                list(reading)
                yield job
        finally:
            workers.shutdown(cancel_futures=True)

    def replace(self, job: Job, slot: int, reason: str) -> None:
        """Put the next substitute that can be read into a slot, whose photograph cannot be used for `reason`."""
        self._substitute(job, slot, reason)
        self._read(job, slot)

    def _read(self, job: Job, slot: int) -> None:
        job.encoded[slot] = BLANK
        while (row := int(job.plan.row[slot])) != PADDING:
            try:
                job.encoded[slot] = np.frombuffer(self._photographs.read(row), dtype=np.uint8)
                return
            except OSError as error:
                self._substitute(job, slot, f"cannot be read: {error.strerror or error}")

    def _substitute(self, job: Job, slot: int, reason: str) -> None:
        row = int(job.plan.row[slot])
        self._report(row, reason)
        job.attempts[slot] += 1
        if job.attempts[slot] > ATTEMPTS:
            raise RunFailed(
                f"{self._photographs.root}: {ATTEMPTS} photographs in a row cannot be used, the last one "
                f"{self._photographs.name(row)!r}: {self.bad[row].reason}; are the data still there? "
                "If they changed, python -m dist_colorize.index ROOT --rebuild"
            )
        job.plan.substitute(slot, job.attempts[slot])

    def _report(self, row: int, reason: str) -> None:
        replaced = Replaced(self._photographs.root, self._photographs.name(row), reason)
        if self.bad.setdefault(row, replaced) is replaced:  # two threads may meet the same file
            self._replaced.append(replaced)
            _log.warning("%r %s; another photograph takes its place", replaced.name, reason)


def _blank() -> NDArray[np.uint8]:
    file = BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    return np.frombuffer(file.getvalue(), dtype=np.uint8)


BLANK = _blank()
"""The encoded image of a slot that holds no photograph: one pixel."""
