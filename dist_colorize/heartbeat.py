"""Signs of life of each rank, so that those who lose one can say which, and when it was last seen.

    with Heartbeat(store, rank, size, launcher) as heartbeat:
        try:
            ...                                     # collectives; heartbeat.reached += 1 at each
        except RuntimeError as error:
            raise PeerLost(heartbeat.explain(error))

A thread writes a line into the process group's store every second. Nobody reads it until a collective has failed.
It also watches one collective that runs beside the main thread, and reports its failure where that thread is blocked by
a GPU.
Under torchrun the thread also looks whether torchrun still lives: killed, it leaves its ranks behind, and they would go
on beside those that it starts next time. They are told to stop instead, as by SIGTERM.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from datetime import datetime
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from dist_colorize.errors import RunFailed

SECONDS = 1.0
"""Time between two signs of life."""
SILENT_SECONDS = 3.0
"""Silence after which a rank counts as gone; it has to outlast a pause of the machine."""
STUCK_SECONDS = 30.0
"""For how long a failed collective may go unnoticed by the main thread before the heartbeat's thread reports it."""


class PeerLost(RunFailed):
    """Another rank has died, left, or does not answer."""


@dataclass(frozen=True)
class Sign:
    """What a rank says of itself."""

    count: int
    """Signs given so far: two readings with the same count are a silence, whatever the clocks say."""
    reached: int
    """Collectives it has entered."""
    time: float
    """Its own clock, in seconds since 1970."""
    who: str
    left: str | None
    """Why it left; None where it did not say so."""
    met: str | None
    """How a collective failed here; None where none did."""


class Launcher:
    """torchrun, where it started this process; else nothing, which never goes."""

    def __init__(self) -> None:
        self.exists = "TORCHELASTIC_RUN_ID" in os.environ
        self.serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        """Whether it serves the store in which the ranks meet, which then outlives them; else rank 0 does."""
        self._pid = os.getppid()

    @property
    def has_gone(self) -> bool:
        return self.exists and os.getppid() != self._pid


class Heartbeat:
    """Gives this rank's signs of life in a thread, from entering it as a context to leaving it.

    `store` is a connection that nobody else uses: one that waits for a key is held.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, launcher: Launcher) -> None:
        self._store, self._rank, self.size, self._launcher = store, rank, size, launcher
        self.reached = 0
        """Collectives that this rank has entered; the owner counts."""
        self.watched: dist.Work | None = None
        """A collective that goes on while the main thread does something else; the owner replaces it."""
        self.when_stuck: Callable[[RuntimeError], None] = lambda error: None
        """Called in the thread, with its error, when `watched` failed STUCK_SECONDS ago and has not been replaced."""
        self._count = 0
        self._left: str | None = None
        self._met: str | None = None
        self._alone = False
        self._unnoticed = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self.size > 1 or self._launcher.exists:
            self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.size > 1:
            self._left = f"{type(error).__name__}: {error}"
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._left is not None:
            self._say()
            if self._rank == 0:
                self._see_the_others_off()

    def explain(self, error: BaseException) -> str:
        """Why a collective failed with `error`, as far as the other ranks' signs tell. Takes a few seconds."""
        self._met = _reason(error)
        self._say()
        first = self._read()
        if first is None:
            return f"rank 0 and the store of the process group are gone ({self._met}); {_ADVICE}"
        time.sleep(SILENT_SECONDS)
        second = self._read() or first
        others = [rank for rank in range(self.size) if rank != self._rank]
        failed = [r for r in others if (sign := second.get(r)) and sign.left and not sign.left.startswith("PeerLost")]
        here = [r for r in others if r in second and not second[r].left and not second[r].met]  # and know of no loss
        silent = [r for r in here if r in first and second[r].count == first[r].count]
        silent += [r for r in others if r not in second]
        behind = [r for r in here if second[r].reached < self.reached]
        if failed:
            told = "; ".join(f"{_name(r, second.get(r))} left with {second[r].left}" for r in failed)
        elif silent:
            told = "; ".join(f"{_name(r, second.get(r))} vanished, last seen {_seen(second.get(r))}" for r in silent)
        elif behind:
            told = "; ".join(f"{_name(r, second.get(r))} is alive but does not answer" for r in behind)
            told += "; where it does long work between steps, raise distributed.timeout"
        else:
            told = "no rank is missing, so the network between them failed"
        # A rank whose time is up closes its connections: others, whose clocks run a little later, meet that alone.
        met = [self._met, *(sign.met or "" for sign in second.values())]
        reason = next((text for text in met if text.startswith(_TIME_IS_UP)), self._met)
        return f"{told} ({reason}); {_ADVICE}"

    def _beat(self) -> None:
        heard = True
        while True:
            heard = heard and self._say()  # no more once the store has gone: collectives will fail, and say why
            if self._stop.wait(SECONDS):
                return
            self._look_for_the_launcher()
            self._look_at_the_watched()

    def _look_for_the_launcher(self) -> None:
        if self._launcher.has_gone and not self._alone:
            self._alone = True
            print("torchrun has gone; stopping", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)

    def _look_at_the_watched(self) -> None:
        work = self.watched
        if work is None or not work.is_completed():
            return
        try:
            work.wait()
        except RuntimeError as error:
            self._unnoticed += SECONDS
            if self._unnoticed >= STUCK_SECONDS:
                self.when_stuck(error)
        else:
            self._unnoticed = 0.0

    def _say(self) -> bool:
        self._count += 1
        who = f"{socket.gethostname()}, pid {os.getpid()}"
        sign = Sign(self._count, self.reached, time.time(), who, self._left, self._met)
        try:
            self._store.set(f"heartbeat/{self._rank}", json.dumps(astuple(sign)))
        except RuntimeError:
            return False
        return True

    def _read(self) -> dict[int, Sign] | None:
        """The last sign of each rank that gave one; None where the store has gone."""
        signs = {}
        try:
            for rank in range(self.size):
                if self._store.check([f"heartbeat/{rank}"]):
                    values: list[Any] = json.loads(self._store.get(f"heartbeat/{rank}"))
                    signs[rank] = Sign(*values)
        except RuntimeError:
            return None
        return signs

    def _see_the_others_off(self) -> None:
        """Rank 0 may serve the store that the others still read: wait a little until those alive have left."""
        if self._launcher.serves:
            return
        end = time.monotonic() + 2 * SILENT_SECONDS
        while time.monotonic() < end and not all(sign.left for sign in (self._read() or {}).values()):
            time.sleep(0.1)


_TIME_IS_UP = "Timed out"
_ADVICE = "the same command with run.dir=RUN goes on from the last checkpoint"


def _reason(error: BaseException) -> str:
    text = str(error)
    if "Application timeout" in text:  # gloo's word for a collective that ended as another one, beside it, timed out
        return f"{_TIME_IS_UP} in a collective"
    # gloo says: [path of its source:line] Connection closed by peer [address]. This is typically caused ...
    return re.sub(r"^\[[^]]*\] ", "", text).partition(". This is")[0].partition("\n")[0]


def _name(rank: int, sign: Sign | None) -> str:
    return f"rank {rank}" if sign is None else f"rank {rank} ({sign.who})"


def _seen(sign: Sign | None) -> str:
    if sign is None:
        return "never"
    return f"{datetime.fromtimestamp(sign.time):%Y-%m-%d %H:%M:%S}, {max(0.0, time.time() - sign.time):.0f} s ago"
