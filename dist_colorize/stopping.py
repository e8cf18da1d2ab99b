"""The wish to stop, as a signal brings it: noted at once, followed between two steps."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any, Self

from dist_colorize.errors import INTERRUPTED

SECOND_SIGNAL_SECONDS = 2.0
"""A signal this long after the first one is a second wish. Launchers repeat one: `scancel` reaches torchrun and its
ranks alike, and torchrun then tells the ranks again."""


class StopFlag:
    """Set by SIGTERM, SIGINT, SIGUSR1 or SIGUSR2; a second signal (seconds later) leaves the process at once.

    The handler only sets the flag: the loops that poll it save and leave in order, all ranks at the same step.
    Used as a context. After it the earlier handlers are back, unless a signal came: the process is about to end then.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.requested = False
        self._first: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        # A launcher may have held signals back until now (slurm/hold_signals.py); one that came meanwhile is seen here.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After a signal the launcher's echo of it may still come, and must not end us halfway out.
        if self._first is None:
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def request(self) -> None:
        """Set the flag without a signal: another rank was told to stop."""
        self.requested = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        now = time.monotonic()
        if self._first is None:
            self._first = now
        elif now - self._first >= SECOND_SIGNAL_SECONDS:
            os._exit(INTERRUPTED)
