"""Several processes on one set of photographs: who takes which, who speaks, who leaves when.

They need no process group: each takes every so-manyth photograph, by RANK and WORLD_SIZE, as torchrun and
launch/slurm.py set them. When one dies, its unfinished photographs are all that is lost.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from dist_colorize.errors import OK
from dist_colorize.heartbeat import Launcher, PeerLost
from dist_colorize.rendezvous import TORCHRUN_SECONDS, Rendezvous, environment_number
from dist_colorize.stopping import StopFlag

Item = TypeVar("Item")

POLL_SECONDS = 0.2
"""How often a rank that failed looks whether the others have finished."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the photographs."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        return cls(*(environment_number(name, default) for name, default in names.items()))

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    @property
    def name(self) -> str:
        """What this process' lines begin with."""
        return f"[rank {self.rank}] " if self.size > 1 else ""

    def own(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process' part; all parts together are the whole, each item in one."""
        return items[self.rank :: self.size]

    def leave(self, code: int, stop: StopFlag) -> int:
        """Gives `code` back when this process may end with it.

        torchrun ends all processes as soon as one leaves with another code than 0. So one whose photographs could not
        all be read waits for the others here.
        """
        launcher = Launcher()
        if self.size == 1 or not launcher.serves:
            return code
        try:
            store = Rendezvous(self.rank, self.size, TORCHRUN_SECONDS, launcher).store
            store.set(f"finished/{self.rank}", str(code))
            everyone = [f"finished/{rank}" for rank in range(self.size)]
            while code != OK and not stop.requested and not store.check(everyone):
                time.sleep(POLL_SECONDS)
        except (PeerLost, RuntimeError):  # the store has gone with torchrun: there is nobody left to wait for
            pass
        return code
