"""What all benchmarks share: what they ran on, contestants in turn on the same work, medians, a table.

A machine's speed drifts within minutes. So contestants take turns, A B C A B C ..., each round in another order, and
a ratio is the median of the rounds' own ratios: both of its sides saw the same minute.
"""

from __future__ import annotations

import gc
import os
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

ROUNDS = 5
"""Timed turns of each contestant, after one that is not counted."""


@dataclass(frozen=True)
class Times:
    """Seconds of each contestant's turns, round by round."""

    seconds: Mapping[str, Sequence[float]]

    def of(self, name: str) -> float:
        """The median of a contestant's turns."""
        return median(self.seconds[name])

    def ratio(self, name: str, peer: str) -> float:
        """How many times faster `name` is than `peer`: the median of the rounds' ratios."""
        return median(theirs / ours for ours, theirs in zip(self.seconds[name], self.seconds[peer], strict=True))


def wall_seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def take_turns(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int = ROUNDS,
    clock: Callable[[Callable[[], object]], float] = wall_seconds,
) -> Times:
    """Runs each contestant once uncounted, then `rounds` times in turn; clock: runs it and tells the seconds."""
    shuffled = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    for _ in range(rounds):
        for name in shuffled.sample(list(contestants), len(contestants)):
            gc.collect()
            seconds[name].append(clock(contestants[name]))
    return Times(seconds)


def resident(which: str = "VmRSS") -> int:
    """Bytes of this process in memory now, or at most so far ("VmHWM", since `forget_peak`)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{which}:")[1].split()[0]) * 1024


def forget_peak() -> None:
    """Lets VmHWM start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table. Numbers are rounded to three digits."""
    cells = [[_cell(value) for value in row] for row in [head, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def verdict(measured: float, goal: float, at_most: bool = False) -> str:
    """`measured` against a goal, in words for a table."""
    reached = measured <= goal if at_most else measured >= goal
    return f"{'at most' if at_most else 'at least'} {goal:g}: {'reached' if reached else 'MISSED'}"


def machine(*packages: str) -> str:
    """One line: processor, cores, memory, load, and the versions of what takes part."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [
        f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, load {os.getloadavg()[0]:.1f}",
        f"Python {platform.python_version()}",
        *(f"{package} {version_of(package)}" for package in packages),
    ]
    return "; ".join(parts)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = {flag for line in lines if line.startswith("flags") for flag in line.split()}
    widest = next((name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags), "no AVX2")
    return f"{named[0] if named else platform.machine()} ({widest})"


def version_of(package: str) -> str:
    """The version of an installed distribution, or "missing"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
