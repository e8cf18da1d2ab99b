"""How the ranks of a run find each other: one store that all reach, in which each tells the others about itself.

    meeting = Rendezvous(rank, size, seconds, launcher)
    hosts = meeting.exchange("host", socket.gethostname())

torch's own rendezvous keeps a rank for more than twice its time-out where nobody serves the store, and ends in a
traceback. Here a rank gives up after its time-out and says who is missing, or within a moment when torchrun is killed.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch.distributed as dist

from dist_colorize.errors import RunFailed, UserError
from dist_colorize.heartbeat import Launcher, PeerLost

POLL_SECONDS = 0.05
"""How often a rank looks whether the others are there."""
CONNECT_SECONDS = 10.0
"""For which a rank tries to connect to a store that has just answered."""
TORCHRUN_SECONDS = 30.0
"""For which a rank looks for torchrun's store, which was there before torchrun started any rank."""
NCCL_HAS_FAILED = "exception_dump"
"""Key under which NCCL's watchdog tells all ranks of a failed collective, past the prefixes of the store."""


def environment_number(name: str, default: int | None = None) -> int:
    """A whole number that torchrun, or whoever starts the ranks, sets; UserError for anything else."""
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdigit():
        raise UserError(f'the environment variable {name} must be a whole number, got "{text}"; start with torchrun')
    return int(text)


class Rendezvous:
    """The store at MASTER_ADDR and MASTER_PORT, which torchrun serves, or else rank 0; `seconds` bounds every wait.

    Raises PeerLost where nobody serves it, RunFailed where rank 0 cannot, UserError for an address that is none.
    """

    def __init__(self, rank: int, size: int, seconds: float, launcher: Launcher) -> None:
        self._rank, self._size, self._seconds, self._launcher = rank, size, seconds, launcher
        # A rank alone asks torchrun too: one that was killed before this rank could know it does not answer.
        store = self._store() if size > 1 or launcher.serves else dist.HashStore()
        # Workers that torchrun starts again meet in the store of the first attempt: what is written there is outdated.
        prefix = f"attempt {environment_number('TORCHELASTIC_RESTART_COUNT', 0)} of {size}"
        with _telling_of_a_lost_store():
            if rank == 0:  # before the others can have its text: a watchdog that finds the key ends its process
                store.delete_key(NCCL_HAS_FAILED)
            second = store.clone() if size > 1 else store
            store.set_timeout(timedelta(seconds=seconds))
        self.store = dist.PrefixStore(prefix, store)
        self.second_store = dist.PrefixStore(prefix, second)
        """The same through a connection of its own, for a thread: the first is held while it waits for a key."""

    def exchange(self, what: str, text: str) -> list[str]:
        """The text of every rank, by rank. Raises PeerLost with the ranks that did not come."""
        keys = [f"{what}/{rank}" for rank in range(self._size)]
        everyone = f"{what}/everyone"
        with _telling_of_a_lost_store():
            self.store.set(keys[self._rank], text)
            if self.store.add(f"{what}/count", 1) == self._size:
                self.store.set(everyone, "")  # one key to look for, however many ranks there are
            if not self._wait(lambda: self.store.check([everyone]), self._seconds):
                missing = [str(rank) for rank, key in enumerate(keys) if not self.store.check([key])]
                raise PeerLost(
                    f"of {self._size} ranks these did not come within {self._seconds:.0f} s: {', '.join(missing)}; see "
                    "what they printed, and raise distributed.timeout where they need longer"
                )
            return [said.decode() for said in self.store.multi_get(keys)]

    def _store(self) -> dist.Store:
        host, port = os.environ.get("MASTER_ADDR", ""), environment_number("MASTER_PORT")
        if not host:
            raise UserError("the environment variable MASTER_ADDR is not set; start with torchrun")
        if not 0 < port < 1 << 16:
            raise UserError(f"the environment variable MASTER_PORT must be 1 to 65535, got {port}; start with torchrun")
        return self._serve(host, port) if self._rank == 0 and not self._launcher.serves else self._connect(host, port)

    def _serve(self, host: str, port: int) -> dist.Store:
        try:
            return dist.TCPStore(host, port, self._size, True, timedelta(seconds=self._seconds), wait_for_workers=False)
        except dist.DistError as error:
            reason = str(error).partition("\n")[0]
            raise RunFailed(f"rank 0 cannot serve port {port} ({reason}); set another MASTER_PORT") from None

    def _connect(self, host: str, port: int) -> dist.Store:
        refusal: OSError | None = None

        def answers() -> bool:
            nonlocal refusal
            try:
                with socket.create_connection((host, port), timeout=CONNECT_SECONDS) as connection:
                    # Where nobody listens yet, the system may give this very port to our end, which then meets itself.
                    return bool(connection.getsockname() != connection.getpeername())
            except OSError as error:
                refusal = error
                return False

        server, seconds = "rank 0", self._seconds
        if self._launcher.serves:
            server, seconds = "torchrun", min(seconds, TORCHRUN_SECONDS)
        if not self._wait(answers, seconds):
            raise PeerLost(
                f"{server} did not answer at {host}:{port} for {seconds:.0f} s ({refusal}); "
                "see whether it runs, and whether this node reaches that address"
            )
        with _telling_of_a_lost_store():
            limit = timedelta(seconds=CONNECT_SECONDS)
            return dist.TCPStore(host, port, self._size, False, limit, wait_for_workers=False)

    def _wait(self, done: Callable[[], bool], seconds: float) -> bool:
        """Whether `done` comes true in time. Raises PeerLost when torchrun goes meanwhile."""
        deadline = time.monotonic() + seconds
        while not done():
            if self._launcher.has_gone:
                raise PeerLost("torchrun has gone before the ranks had met; start it again")
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True


@contextlib.contextmanager
def _telling_of_a_lost_store() -> Iterator[None]:
    try:
        yield
    except dist.DistError:
        raise PeerLost("the store of the process group has gone before the ranks had met; start them again") from None
