"""Watching submitted jobs: their state by the cluster, and what rank 0 prints, until the end."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dist_colorize.errors import RunFailed

POLL_SECONDS = 2.0
SILENT_SECONDS = 900.0
"""A controller that restarts, or fails over to another host, answers again within minutes."""
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
ENDED |= {"REVOKED", "TIMEOUT", "GONE"}


@dataclass(frozen=True)
class State:
    """What the cluster says of a job."""

    name: str
    """SLURM's word for it; GONE when the cluster does not know the job any more."""
    reason: str = ""
    """Why it waits or has ended, where SLURM says."""
    starts: int = 0
    """How often it has been requeued."""
    requeued: bool = False
    """It has ended for now and will be queued again."""

    @property
    def ended(self) -> bool:
        return self.name in ENDED and not self.requeued

    def __str__(self) -> str:
        more = [self.reason] if self.reason not in ("", "None") else []
        more += [f"came back {self.starts} times"] if self.starts else []
        return self.name + (f" ({', '.join(more)})" if more else "")


def state_of(job: str) -> State | None:
    """The state of one job, from scontrol, else from the accounting; None where the cluster does not answer."""
    answered, words = _ask("scontrol", "show", "job", "--oneliner", job)
    if answered:
        fields = dict(re.findall(r"(\w+)=(\S*)", words.splitlines()[0]))
        name = fields.get("JobState", "UNKNOWN")
        return State(name, fields.get("Reason", ""), int(fields.get("Restarts", "0")), name == "REQUEUED")
    if "Invalid job id" not in words:
        return None
    answered, words = _ask("sacct", "--noheader", "--allocations", "--parsable2", "--format=State", f"--jobs={job}")
    return State(words.split()[0] if answered and words else "GONE")


def alive(jobs: list[str]) -> list[str]:
    """Those of `jobs` that still wait or run, with their state: "123 (PENDING)"."""
    found = []
    for job in jobs:
        answered, words = _ask("squeue", "--noheader", f"--jobs={job}", "--format=%T")
        if answered and words:
            found.append(f"{job} ({words.split()[0]})")
    return found


def follow(logs: Mapping[str, Path], write: Callable[[str], object] = sys.stdout.write) -> dict[str, State]:
    """Print each change of state, and what a single job's rank 0 prints, until all jobs have ended; their last states.

    Ctrl-C ends the watching (KeyboardInterrupt), never the jobs. Raises RunFailed when the cluster stays silent.
    """
    last: dict[str, State] = {}
    single = next(iter(logs.values())) if len(logs) == 1 else None
    position, answered = 0, time.monotonic()
    while True:
        for job in logs:
            before = last.get(job)
            if before is not None and before.ended:
                continue
            now = state_of(job)
            if now is None:
                continue
            last[job], answered = now, time.monotonic()
            if now.ended and single is not None:
                position = _tail(single, position, write)
            if before is None or str(now) != str(before):
                write(f"job {job}: {now}\n")
        if single is not None:
            position = _tail(single, position, write)
        sys.stdout.flush()
        if len(last) == len(logs) and all(state.ended for state in last.values()):
            return last
        if time.monotonic() - answered > SILENT_SECONDS:
            raise RunFailed(
                f"the cluster has not answered for {SILENT_SECONDS / 60:.0f} minutes; the job may go on without being "
                f"watched: squeue -j {','.join(logs)}"
            )
        time.sleep(POLL_SECONDS)


def _tail(path: Path, position: int, write: Callable[[str], object]) -> int:
    """Write what has been appended since `position`, whole lines only; returns where to go on."""
    try:
        with open(path, "rb") as file:
            file.seek(position)
            fresh = file.read()
    except OSError:  # not there before the job starts
        return position
    whole = fresh[: fresh.rfind(b"\n") + 1]
    if whole:
        write(whole.decode("utf-8", "replace"))
    return position + len(whole)


def _ask(*command: str) -> tuple[bool, str]:
    """Whether a command of SLURM's succeeded, and what it said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    return (True, done.stdout.strip()) if done.returncode == 0 else (False, done.stderr.strip())
