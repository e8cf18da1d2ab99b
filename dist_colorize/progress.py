"""How far a run is and how fast it goes, for its user and for its log.

with Progress("train", world, total=1000, done=200) as progress:
    progress.update(images=64, loss=loss)
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from dist_colorize.distributed import World
from dist_colorize.profiling import span


class Progress:
    """How far the steps are: a bar on rank 0's terminal, a plain line now and then where stderr is none.

    A tensor as loss is looked at only when it is shown, so that a GPU need not finish its queue at every step.
    """

    TERMINAL_SECONDS = 0.5
    PLAIN_SECONDS = 10.0

    def __init__(self, label: str, world: World, total: int, done: int = 0) -> None:
        self.label = label
        self.total = total
        self.done = done
        self._shows = world.is_leader
        self._images = 0
        self._steps = 0
        self._since = time.monotonic()
        self._rate = 0.0
        self._seconds_per_step = 0.0
        self._losses: dict[str, Any] = {}
        self._bar: tqdm[Any] | None = None
        if self._shows and sys.stderr.isatty():
            form = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
            self._bar = tqdm(desc=label, total=total, initial=done, bar_format=form, dynamic_ncols=True, miniters=1)

    def update(self, images: int, **values: Any) -> None:
        """One step is done, with this many images on all ranks together; `values` are shown with it."""
        if not self._shows:
            return
        self.done += 1
        self._steps += 1
        self._images += images
        self._losses = values
        every = self.TERMINAL_SECONDS if self._bar is not None else self.PLAIN_SECONDS
        if time.monotonic() - self._since >= every or self.done == self.total:
            self._show()

    def close(self) -> None:
        """Leave the bar as it is and give the terminal back."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _show(self) -> None:
        now = time.monotonic()
        elapsed = max(now - self._since, 1e-9)
        # Mean over the interval, smoothed over the last few of them.
        share = 1.0 if self._rate == 0 else 0.3
        self._rate += share * (self._images / elapsed - self._rate)
        self._seconds_per_step += share * (elapsed / max(self._steps, 1) - self._seconds_per_step)
        self._since, self._images, self._steps = now, 0, 0
        left = timedelta(seconds=round((self.total - self.done) * self._seconds_per_step))
        values = [f"{name} {float(value):.4g}" for name, value in self._losses.items()]
        facts = ", ".join([*values, f"{self._rate:.4g} images/s", f"ETA {left}"])
        if self._bar is not None:
            self._bar.n = self.done
            self._bar.set_postfix_str(facts, refresh=True)
        else:
            print(f"{self.label} {self.done}/{self.total}  {facts}", file=sys.stderr, flush=True)


class Meter:
    """How fast training goes between two readings, and which share of the time it waits for data."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget what was counted: something else than training has taken time."""
        self._start, self._waited, self._images = time.monotonic(), 0.0, 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the moment that the next batch is taken."""
        start = time.monotonic()
        with span("data"):
            yield
        self._waited += time.monotonic() - start

    def count(self, images: int) -> None:
        """One step is done, with this many images on all ranks together."""
        self._images += images

    @property
    def data_wait(self) -> float:
        """Share of the time since the last reading that was spent waiting for data, 0..1."""
        return self._waited / max(time.monotonic() - self._start, 1e-9)

    def read(self) -> dict[str, float]:
        """`images_per_second` over all ranks and `data_wait` since the last reading."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        values = {"images_per_second": self._images / elapsed, "data_wait": self.data_wait}
        self.restart()
        return values
