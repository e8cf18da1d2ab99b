"""Runs steps, each in a process of its own with a time limit, and writes down what came of them: used by .ci/gpu.

A step is a command of this Python. What it has found it prints on lines that these functions mark:

    fact(images_per_second=812.0)                           # a value for the table
    cannot("data.device=gpu: needs a GPU")                  # a part that this machine cannot do
    section("### A table\n\n| ... |")                       # Markdown, below the table

Nothing that a step does reaches the next one. A crash is the name of a signal. Past its limit a step dies with all that
it has started, whatever session or parent those processes have by then: they carry a mark in their environment.

The runner writes into a folder, as steps end: results.jsonl, a line each; logs.txt, their output one after another; and
table.md at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.harness import table

CHECKOUT = Path(__file__).resolve().parent.parent
SLOWER = 5
"""How many times its limit a step may take in a dry run: limits are for a large machine with a GPU."""
GONE_SECONDS = 10.0
"""For which a killed process is waited for. One that the GPU's driver holds may never go."""

Facts = dict[str, Any]
State = Literal["ok", "failed", "timed out", "cannot run here", "skipped"]


# ---------------------------------------------------------------- what a step's process says


def fact(**values: object) -> None:
    """Values for the table, and for `facts` in results.jsonl."""
    _say("fact", values)


def cannot(what: str) -> None:
    """A part of the step that this machine cannot do, and why."""
    _say("cannot", what)


def section(markdown: str) -> None:
    """Text below the table; of several lines, to be read in the log as well."""
    print(f"::section\n{markdown}\n::end", flush=True)


def _say(mark: str, value: object) -> None:
    print(f"::{mark} {json.dumps(value)}", flush=True)


def _heard(log: str, mark: str) -> list[Any]:
    return [json.loads(value) for value in re.findall(rf"^::{mark} (.*)$", log, re.MULTILINE)]


def _sections(log: str) -> list[str]:
    return re.findall(r"^::section\n(.*?)\n::end$", log, re.MULTILINE | re.DOTALL)


# ---------------------------------------------------------------- steps and their results


@dataclass(frozen=True)
class Place:
    """Where steps work, and how much they do."""

    work: Path
    """Pictures, caches, runs, logs."""
    dry: bool
    """Whether everything is to be small, and without a GPU."""


def place_parser(description: str | None) -> argparse.ArgumentParser:
    """Of a module whose functions are steps: with the two options that make a Place."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of pictures, caches and runs")
    parser.add_argument("--dry", action="store_true", help="small, and without a GPU")
    return parser


@dataclass(frozen=True)
class Step:
    name: str
    shows: str
    """What it shows, in words for the table."""
    limit: float
    """Seconds on an H100 with 16 cores."""
    command: Callable[[Place], Sequence[str]]
    """The words after the name of the Python interpreter."""
    needs_gpu: bool = False
    """Whether nothing of it can be done without a GPU."""
    needs: tuple[str, ...] = ()
    """Earlier steps that must have gone well."""
    modules: tuple[str, ...] = ()
    """Python modules without which it cannot begin."""
    alone: bool = False
    """Whether nothing else may run beside it, as it measures time or is needed by others."""
    read: Callable[[str], Facts] | None = None
    """Facts from the log of a command that does not know `fact`."""


@dataclass(frozen=True)
class Result:
    """What came of a step: a line of results.jsonl."""

    step: str
    state: State
    seconds: float = 0.0
    exit: int | str | None = None
    """Exit code, or the name of the signal that ended the process; None where none was started."""
    reason: str = ""
    """Why it is not ok."""
    facts: Facts = field(default_factory=dict)
    cannot: list[str] = field(default_factory=list)
    """Parts that this machine cannot do."""
    sections: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        words = [self.reason, *(f"{name}: {_short(value)}" for name, value in self.facts.items())]
        words += [f"cannot run here: {what}" for what in self.cannot]
        return "; ".join(word for word in words if word)


class Runner:
    """Runs steps one after another, those that need not be alone side by side, and keeps their results.

    Args: place: for the steps. out: folder for results.jsonl, logs.txt, table.md. minutes: for all steps together; what
    has not begun by then is skipped, what runs is cut off. beside: steps that may run at a time. environment: for the
    steps' processes, on top of this one's.
    """

    def __init__(
        self, place: Place, out: Path, minutes: float, beside: int = 1, environment: Mapping[str, str] | None = None
    ) -> None:
        self.place, self.out, self.beside = place, out, beside
        self.minutes, self.deadline = minutes, time.monotonic() + 60 * minutes
        self.gpu = False
        """Whether there is one; the first step may find out."""
        self.results: dict[str, Result] = {}
        self.steps: dict[str, Step] = {}
        self._environment = {**os.environ, **(environment or {})}
        self._mark = f"GPU_STEP_{uuid.uuid4().hex}"
        self._lock = threading.Lock()
        self._logs = place.work / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        for name in ("results.jsonl", "logs.txt", "table.md"):
            (out / name).write_bytes(b"")

    def run(self, steps: Sequence[Step]) -> None:
        """Runs the steps; an exception or a signal that raises one ends those under way first."""
        for group in groups(steps):
            with ThreadPoolExecutor(self.beside) as pool:
                try:
                    list(pool.map(self._run, group))
                except BaseException:
                    self.deadline = 0.0
                    pool.shutdown(wait=False, cancel_futures=True)
                    kill_marked(f"{self._mark}=")
                    raise

    @property
    def code(self) -> int:
        """0 where every step that could run here has run and is ok, else 1."""
        return int(any(result.state not in ("ok", "cannot run here") for result in self.results.values()))

    def report(self, heading: str) -> str:
        """The Markdown table of all results, and the sections below it; table.md gets it too."""
        rows = [
            [name, self.steps[name].shows, result.state, f"{result.seconds:.0f}", str(result).replace("|", "/")]
            for name, result in self.results.items()
        ]
        parts = [heading, table(["step", "shows", "state", "s", "found"], rows)]
        parts += [text for result in self.results.values() for text in result.sections]
        text = "\n\n".join(parts) + "\n"
        (self.out / "table.md").write_text(text, encoding="utf-8")
        return text

    def _run(self, step: Step) -> None:
        self.steps[step.name] = step
        obstacle = self._obstacle(step)
        if obstacle:
            log, result = "", obstacle
        else:
            with self._lock:
                print(f"{step.name} ...", flush=True)
            log, result = self._process(step)
        with self._lock:
            self.results[step.name] = result
            with open(self.out / "results.jsonl", "a", encoding="utf-8") as lines:
                lines.write(json.dumps(asdict(result)) + "\n")
            with open(self.out / "logs.txt", "a", encoding="utf-8") as logs:
                logs.write(f"\n======== {step.name}: {result.state}\n{log}")
            print(f"{result.state:15} {step.name:15} {result.seconds:5.1f} s  {result}", flush=True)

    def _obstacle(self, step: Step) -> Result | None:
        """The result of a step that is not to be begun."""
        if step.needs_gpu and not self.gpu:
            return Result(step.name, "cannot run here", reason="needs a GPU")
        missing = [module for module in step.modules if importlib.util.find_spec(module) is None]
        if missing:
            return Result(step.name, "cannot run here", reason=f"{', '.join(missing)} is not installed")
        for name in step.needs:
            if name in self.results and self.results[name].state != "ok":
                return Result(step.name, "skipped", reason=f"needs {name}, which is not ok")
        if time.monotonic() >= self.deadline:
            return Result(step.name, "skipped", reason=f"the {self.minutes:g} minutes are over")
        return None

    def _process(self, step: Step) -> tuple[str, Result]:
        """Runs the step's command; returns its log and the result."""
        begin = time.monotonic()
        limit = step.limit * (SLOWER if self.place.dry else 1)
        cut = self.deadline - begin < limit
        file, who = self._logs / f"{step.name}.log", f"{self._mark}={step.name}"
        with open(file, "wb") as output:
            process = subprocess.Popen(
                [sys.executable, *step.command(self.place)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=CHECKOUT,
                env={**self._environment, self._mark: step.name},
                start_new_session=True,
            )
            code: int | None = None
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(max(0.0, min(limit, self.deadline - begin)))
            kill_marked(f"{who}\0")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GONE_SECONDS)
        log = file.read_text(encoding="utf-8", errors="replace")
        found: dict[str, Any] = {
            "seconds": round(time.monotonic() - begin, 1),
            "facts": {name: value for one in _heard(log, "fact") for name, value in one.items()},
            "cannot": _heard(log, "cannot"),
            "sections": _sections(log),
        }
        if step.read:
            found["facts"] |= step.read(log)
        if code is None:
            reason = f"cut off, the {self.minutes:g} minutes are over" if cut else f"after {limit:g} s"
            return log, Result(step.name, "timed out", exit="SIGKILL", reason=reason, **found)
        if code == 0:
            return log, Result(step.name, "ok", exit=0, **found)
        return log, Result(step.name, "failed", exit=name_of(code), reason=f"{name_of(code)}: {_last(log)}", **found)


def groups(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Stretches of steps that may run side by side: none needs another one of its stretch."""
    group: list[Step] = []
    for step in steps:
        names = {member.name for member in group}
        if group and (step.alone or group[-1].alone or names & set(step.needs)):
            yield group
            group = []
        group.append(step)
    if group:
        yield group


def chosen(steps: Sequence[Step], names: Sequence[str]) -> list[Step]:
    """The steps of these names and those that they need, in order; all where no name is given."""
    wanted = set(names or [step.name for step in steps])
    for step in reversed(steps):
        if step.name in wanted:
            wanted.update(step.needs)
    return [step for step in steps if step.name in wanted]


def name_of(code: int) -> int | str:
    """An exit code of subprocess, or the name of the signal that it stands for."""
    return signal.Signals(-code).name if code < 0 else code


def _last(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip() and not line.startswith("::")]
    return lines[-1][:200] if lines else "no output"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------- processes


def kill_marked(mark: str) -> None:
    """kill -9 of every process with this text in its environment, and of those that they start meanwhile."""
    end = time.monotonic() + GONE_SECONDS
    while (found := marked(mark)) and time.monotonic() < end:
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)


def marked(mark: str) -> list[int]:
    """The processes with this text in their environment; a dead one that nobody has waited for has none."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has gone, or is another user's
                if mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found
