"""torch's flight recorder: the last NCCL collectives of each rank, written into the run folder when one of them fails.

    with FlightRecorder(rank, enabled=backend == "nccl") as recorder:   # before the process group is made
        recorder.write_into(RUN / "flight_recorder")                    # as soon as the run folder is known
        where = recorder.dump()                                         # RUN/flight_recorder/rank_0

`torchfrtrace RUN/flight_recorder` compares the files and shows the first collective in which the ranks differ. A rank
that was killed or frozen leaves none: with `--allow-incomplete-ranks -j` it lists what the others recorded.
torch writes the same files by itself when NCCL's watchdog finds a collective that failed or hangs.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from torch._C import _distributed_c10d

DEFAULTS = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
"""Environment variables that torch reads as the process group is made: collectives that are kept, and whether the
watchdog writes them."""
PREFIX = "TORCH_FR_DUMP_TEMP_FILE"
"""Environment variable with the path of a rank's file up to its number. torch reads it as it writes the first file."""
OLD_NAMES = {"TORCH_FR_BUFFER_SIZE": "TORCH_NCCL_TRACE_BUFFER_SIZE", PREFIX: "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"}
"""Names that torch falls back on where the variable is not set."""
DUMP_SECONDS = 10.0
"""How long a dump may take: torch queries an event of the GPU for each collective, which can block."""


class FlightRecorder:
    """Sets torch's environment variables where the user has not, from entering it as a context to leaving it."""

    def __init__(self, rank: int, enabled: bool) -> None:
        """`enabled`: False where there is no NCCL; all methods do nothing then."""
        self._rank, self._enabled = rank, enabled
        self._set: list[str] = []

    def __enter__(self) -> Self:
        for name, value in DEFAULTS.items():
            self._choose(name, value)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in self._set:
            os.environ.pop(name, None)

    def write_into(self, folder: Path) -> None:
        """Decides on the folder of the files, unless the user has, and makes it."""
        self._choose(PREFIX, str(folder / "rank_"))
        if self._enabled:
            with contextlib.suppress(OSError):  # a record is no reason to fail
                folder.mkdir(parents=True, exist_ok=True)

    def dump(self) -> Path | None:
        """Writes this rank's file within DUMP_SECONDS; returns its path, or None where there is none."""
        prefix = os.environ.get(PREFIX) or os.environ.get(OLD_NAMES[PREFIX])
        if not self._enabled or prefix is None:
            return None
        path, written = Path(f"{prefix}{self._rank}"), threading.Event()

        def write() -> None:
            with contextlib.suppress(OSError, RuntimeError):
                path.write_bytes(_distributed_c10d._dump_nccl_trace())  # type: ignore[attr-defined]
                written.set()

        thread = threading.Thread(target=write, name="flight recorder", daemon=True)
        thread.start()
        thread.join(DUMP_SECONDS)
        return path if written.is_set() else None

    def _choose(self, name: str, value: str) -> None:
        if self._enabled and name not in os.environ and OLD_NAMES.get(name, name) not in os.environ:
            os.environ[name] = value
            self._set.append(name)
