"""How much memory there is: a picture that does not fit is refused by name instead of ending the process."""

from __future__ import annotations

import contextlib
from pathlib import Path

from dist_colorize.errors import UserError

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
FULL = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
"""What torch's errors say: of CUDA's memory, of a library's own on the GPU, of the machine's."""


def require_memory(needed: int) -> None:
    """UserError when `needed` bytes are more than this process can have; nothing where that cannot be told."""
    free = free_memory()
    if free is not None and needed > free:
        raise UserError(f"needs {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free")


def is_full(error: RuntimeError) -> bool:
    """Whether torch failed because a memory is full: torch.OutOfMemoryError is only one of the ways it says so."""
    return any(words in str(error) for words in FULL)


def free_memory() -> int | None:
    """Bytes that can still be had on this machine and in this container (cgroup v2); None where Linux does not say."""
    limits = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        line = next(line for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:"))
        limits.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        limits.append(int((CGROUP / "memory.max").read_text()) - int((CGROUP / "memory.current").read_text()))
    return min(limits, default=None)
