"""Trains with processes that are killed at random, and looks after each kill at what is left.

    python kills.py FOLDER RANKS KILLS SEED OVERRIDE...     # kill -9 of one rank or of all, in turns at random
    python kills.py FOLDER torchrun KILLS SEED OVERRIDE...  # kill -9 of the launcher of two ranks

Half of the kills wait until a checkpoint is being written. Ranks without a launcher are forked from this process, which
has imported everything but started no thread: a life then takes seconds. Between kills nobody repairs anything. A run
that gets to its end is compared with one that was left alone, and another is begun; after the last kill the run is left
to its end. Prints the figures as JSON.
"""

from __future__ import annotations

import collections
import importlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dist_colorize import checkpoint, heartbeat, train
from dist_colorize.errors import run_command

FEW_SECONDS = 0.5
"""For which a survivor of these tests listens whether a silent rank is gone."""


class Forked:
    """Ranks of one life, without a launcher."""

    def __init__(self, ranks: int, arguments: list[str], log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.ranks = [self._fork(rank, ranks, port, arguments, log) for rank in range(ranks)]

    def _fork(self, rank: int, ranks: int, port: int, arguments: list[str], log: Path) -> int:
        child = os.fork()
        if child:
            return child
        code = 99
        try:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_PORT": str(port)}
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            run_command(lambda: train.main(arguments))
        except SystemExit as left:
            code = int(left.code or 0)
        finally:
            os._exit(code)

    def kill(self, generator: random.Random) -> None:
        for rank in self.ranks if generator.random() < 0.5 else [generator.choice(self.ranks)]:
            os.kill(rank, signal.SIGKILL)

    def living(self) -> list[int]:
        self.ranks = [rank for rank in self.ranks if not os.waitpid(rank, os.WNOHANG)[0]]
        return self.ranks


class Launched:
    """torchrun and its two ranks."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        with open(log, "ab") as output:
            self.launcher = subprocess.Popen(
                [*command, "-m", "dist_colorize.train", *arguments], stdout=output, stderr=output
            )
        self.ranks: set[int] = set()

    def kill(self, generator: random.Random) -> None:
        self.living()
        self.launcher.kill()

    def living(self) -> list[int]:
        if self.launcher.poll() is None:
            found = subprocess.run(
                ["ps", "-o", "pid=", "--ppid", str(self.launcher.pid)], capture_output=True, text=True, check=False
            )
            self.ranks |= {int(pid) for pid in found.stdout.split()}
            return [self.launcher.pid, *self.ranks]
        return [rank for rank in self.ranks if Path(f"/proc/{rank}").exists()]


Life = Forked | Launched


def wait_for_the_end(life: Life, seconds: float) -> None:
    """Those that do not end in time fail the test."""
    deadline = time.monotonic() + seconds
    while left := life.living():
        if time.monotonic() > deadline:
            for process in left:
                os.kill(process, signal.SIGKILL)
            raise AssertionError(f"{len(left)} processes still ran {seconds} s after a kill")
        time.sleep(0.02)


def steps_of(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def torn(run: Path) -> bool:
    return any(run.glob("checkpoints/.*.tmp"))


def phase(run: Path, before: int, whole: int) -> str:
    """What a life was at when it was killed, which had found `before` steps."""
    done = len(steps_of(run))
    return "writing" if torn(run) else "scoring" if done == whole else "training" if done > before else "starting"


def final(run: Path) -> tuple[dict[str, Any], list[float]]:
    lines = steps_of(run)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return checkpoint.load(run / "checkpoints" / "latest"), [line["loss"] for line in lines]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def main(folder: Path, start: Callable[[Path], Life], kills: int, generator: random.Random) -> dict[str, Any]:
    log = folder / "output.txt"
    began = time.monotonic()
    wait_for_the_end(start(folder / "first"), 600)  # makes the index and counts colours, as no later one does
    indexed = time.monotonic()
    wait_for_the_end(start(folder / "whole"), 600)
    duration = time.monotonic() - indexed
    whole, losses = final(folder / "whole")
    made = finished = 0
    phases: collections.Counter[str] = collections.Counter()
    run, last = folder / "run-0", 0
    while made < kills or last:
        begin = log.stat().st_size
        before = len(steps_of(run))
        born = time.monotonic()
        life = start(run)
        if made < kills:
            end = born + generator.uniform(0.05, 1.0) * duration
            while life.living() and time.monotonic() < end:
                time.sleep(0.005)
            if generator.random() < 0.5:
                while life.living() and not torn(run):
                    time.sleep(0.001)
            if life.living():
                life.kill(generator)
                made += 1
                phases[phase(run, before, len(losses))] += 1
            else:  # the machine has become faster, or it had little left to do
                duration = (duration + time.monotonic() - born) / 2
        wait_for_the_end(life, 120)

        text = log.read_bytes()[begin:].decode(errors="replace")
        resumed = [int(step) for step in re.findall(r"resuming from .*, step (\d+)", text)]
        assert resumed in ([], [last]) if last else not resumed, (resumed, last)
        found = checkpoint.newest(run / "checkpoints")
        if found is None:
            assert last == 0
            continue
        state, _, skipped = found
        assert not skipped, skipped
        assert state["step"] >= last, (state["step"], last)
        last = state["step"]
        if (run / "evaluation.json").exists():
            state, seen = final(run)
            assert seen == losses
            parts = ("model", "optimizer", "rng", "position", "class_weights", "best")
            assert all(same(state[part], whole[part]) for part in parts)
            finished += 1
            run, last = folder / f"run-{finished}", 0
    return {
        "kills": made,
        "finished": finished,
        "seconds": round(time.monotonic() - began),
        "killed while": dict(phases),
    }


if __name__ == "__main__":
    folder, ranks = Path(sys.argv[1]), sys.argv[2]
    folder.mkdir()
    overrides = sys.argv[5:]
    heartbeat.SILENT_SECONDS = FEW_SECONDS
    # What each rank would import by and by. It must start no thread: forks would wait for ever for what that one holds.
    for module in ("torch._dynamo", "torch.distributed.fsdp", "torch.utils.tensorboard", "scipy.spatial", "numba"):
        importlib.import_module(module)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "set OMP_NUM_THREADS=1"

    def start(run: Path) -> Life:
        arguments, log = [*overrides, f"run.dir={run}"], folder / "output.txt"
        return Launched(arguments, log) if ranks == "torchrun" else Forked(int(ranks), arguments, log)

    print(json.dumps(main(folder, start, int(sys.argv[3]), random.Random(int(sys.argv[4])))))
