"""Trains with ranks that are killed at random, and looks after each kill at what is left.

    python kills.py FOLDER RANKS KILLS SEED OVERRIDE...

Ranks are forked: to import torch takes longer than the training that is killed. Between kills nobody repairs anything.
A run that gets to its end is compared with one that was left alone, and another is begun. Prints the figures as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch

from dist_colorize import checkpoint, train
from dist_colorize.errors import run_command


def fork_ranks(ranks: int, arguments: list[str], log: Path) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_PORT": str(port)}
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            code = 99
            try:
                run_command(lambda: train.main(arguments))
            except SystemExit as left:
                code = int(left.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return children


def ends(children: list[int], seconds: float) -> list[int]:
    """Exit code of each child; those that do not end in time fail the test."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(children):
        for child in children:
            if child not in codes and os.waitpid(child, os.WNOHANG)[0]:
                codes[child] = 0
        if time.monotonic() > deadline:
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
            raise AssertionError(f"{len(children) - len(codes)} ranks still ran {seconds} s after a kill")
        time.sleep(0.01)
    return list(codes.values())


def final(folder: Path) -> tuple[dict[str, Any], list[float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return checkpoint.load(folder / "checkpoints" / "latest"), [line["loss"] for line in lines]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def main(folder: Path, ranks: int, kills: int, seed: int, overrides: list[str]) -> None:
    generator = random.Random(seed)
    log = folder / "output.txt"
    began = time.monotonic()
    ends(fork_ranks(ranks, [*overrides, f"run.dir={folder / 'whole'}"], log), 600)
    duration = time.monotonic() - began
    whole, losses = final(folder / "whole")
    made = finished = resumed = in_the_middle_of_a_write = 0
    run, last = folder / "run-0", 0
    while made < kills:
        children = fork_ranks(ranks, [*overrides, f"run.dir={run}"], log)
        end = time.monotonic() + generator.uniform(0.05, 1.0) * duration
        gone = False
        while time.monotonic() < end and not gone:
            time.sleep(0.005)
            gone = not all(Path(f"/proc/{child}/stat").read_text().split()[2] != "Z" for child in children)
        if not gone:
            for child in children if generator.random() < 0.5 else [generator.choice(children)]:
                os.kill(child, signal.SIGKILL)
            made += 1
        ends(children, 120)
        in_the_middle_of_a_write += bool(list(run.glob("checkpoints/.*.tmp")))
        found = checkpoint.newest(run / "checkpoints")
        if found is not None:
            assert not found[2], found[2]
            assert found[0]["step"] >= last, (found[0]["step"], last)
            resumed += found[0]["step"] > last
            last = found[0]["step"]
        else:
            assert last == 0
        if gone and last == len(losses):
            state, seen = final(run)
            assert seen == losses
            assert all(
                same(state[key], whole[key]) for key in ("model", "optimizer", "rng", "position", "class_weights")
            )
            finished += 1
            run, last = folder / f"run-{finished}", 0
    print(json.dumps({"kills": made, "finished": finished, "advanced": resumed, "torn": in_the_middle_of_a_write}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
