"""Ranks, launchers and whole runs that are killed: the others say who is gone, and nothing is lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import kill_tree, rank_environment, torchrun_command
from test_distributed import PRELUDE
from test_train import TINY, last_state, losses

KILLS = Path(__file__).parent / "workers" / "kills.py"

LOSING = """
    from datetime import timedelta
    from dist_colorize import distributed
    from dist_colorize.distributed import LateAgreement

    def main():
        with session(DistributedConfig(device="cpu")) as world:
            # On a busy machine ranks come together later than within these few seconds.
            distributed._backend_for("cpu").set_timeout(timedelta(seconds=float(os.environ["LIMIT"])))
            with LateAgreement(world) as agree:
                for number in range(10**6):
                    time.sleep(0.01)
                    agree(False)  # two collectives under way, as in training
                    world.sum_(torch.ones(2))
                    if number == 50 and world.rank == 2:
                        exec(os.environ["FAULT"])
                    if number == 50 and world.rank == 0:
                        time.sleep(float(os.environ["LATE"]))

    run_command(main)
"""

STUCK = """
    from dataclasses import replace
    from datetime import timedelta
    from dist_colorize import distributed, heartbeat
    from dist_colorize.distributed import LateAgreement

    def main():
        heartbeat.STUCK_SECONDS = 2.0
        with session(DistributedConfig(device="cpu")) as world:
            world.barrier()
            distributed._backend_for("cpu").set_timeout(timedelta(seconds=float(os.environ["LIMIT"])))
            if world.rank == 2:
                exec(os.environ["FAULT"])
            on_a_gpu = replace(world, backend="nccl")
            with LateAgreement(on_a_gpu) as agree:
                agree(False)
                time.sleep(1000)  # as in loss.item(), while a collective on the GPU waits for rank 2

    run_command(main)
"""


def lose(folder: Path, fault: str, limit: float, body: str = LOSING, late: float = 0) -> tuple[list[int], list[str]]:
    """Exit codes and stderr of three ranks, without a launcher that would end them; the last one has the fault."""
    program = folder / "program.py"
    program.write_text(PRELUDE + textwrap.dedent(body))
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20_000 + os.getpid() % 9000), "WORLD_SIZE": "3"}
    place |= {"LIMIT": str(limit), "FAULT": fault, "LATE": str(late)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(program), str(folder)],
            env=rank_environment({**place, "RANK": str(rank)}),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    told = ["", "", ""]
    try:
        for rank in (0, 1):
            told[rank] = ranks[rank].communicate(timeout=120)[1]
    finally:
        for process in ranks:
            process.kill()
        told[2] = ranks[2].communicate()[1]
    return [process.returncode for process in ranks], told


def assert_told(codes: list[int], told: list[str], expected: str) -> None:
    assert codes[:2] == [1, 1], told
    for rank in (0, 1):
        line = rf"\[rank {rank}\] error: {expected}.* goes on from the last checkpoint"
        assert re.search(line, told[rank]), told[rank]
        assert "Traceback" not in told[rank]


FROZEN = "os.kill(os.getpid(), signal.SIGSTOP)"


@pytest.mark.parametrize(
    ("fault", "limit", "expected"),
    [
        ("os.kill(os.getpid(), 9)", 60, r"rank 2 \(.*, pid \d+\) vanished, last seen 20\d\d-.* s ago \(.*peer"),
        ("raise ValueError('a bug')", 60, r"rank 2 \(.*, pid \d+\) left with ValueError: a bug"),
        (FROZEN, 5, r"rank 2 .* vanished, last seen .* \(Timed out"),
        ("time.sleep(1000)", 5, r"rank 2 .* is alive but does not answer; .* raise distributed.timeout \(Timed out"),
    ],
    ids=["killed", "failed", "frozen", "busy"],
)
def test_a_lost_rank_is_named_by_the_others(tmp_path: Path, fault: str, limit: float, expected: str) -> None:
    assert_told(*lose(tmp_path, fault, limit), expected)


def test_all_tell_of_the_timeout_although_the_first_one_closes_its_connections(tmp_path: Path) -> None:
    """On a busy machine rank 0 may enter its collective seconds after rank 1, and still wait when rank 1 gives up."""
    assert_told(*lose(tmp_path, FROZEN, 5, late=2), r"rank 2 \(.*, pid \d+\) vanished, last seen .* \(Timed out")


def test_a_rank_that_waits_for_its_gpu_names_the_lost_one_too(tmp_path: Path) -> None:
    """Its main thread hears of nothing; gloo's time-out is found by the heartbeat, and each accuses rank 2 alone."""
    codes, told = lose(tmp_path, FROZEN, 3, STUCK)
    assert_told(codes, told, r"rank 2 \(.*, pid \d+\) vanished, last seen [^;]*\(Timed out")


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"XDG_CACHE_HOME": str(tmp_path_factory.getbasetemp() / "cache"), "OMP_NUM_THREADS": "1"}


def wait_until(condition: Any, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(child) for child in found.stdout.split()]


def start(arguments: list[str], cache: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    command = torchrun_command(2, *arguments)
    with open(log, "ab") as output:
        return subprocess.Popen(command, env=rank_environment(cache), stdout=output, stderr=output)


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    "given",
    [pytest.param(True, id="run.dir given", marks=pytest.mark.slow), pytest.param(False, id="run.dir not given")],
)
def test_torchrun_heals_a_run_that_lost_a_rank(tmp_path: Path, cache: dict[str, str], given: bool) -> None:
    where = f"run.dir={tmp_path / 'runs' / 'one'}" if given else f"run.root={tmp_path / 'runs'}"
    many = [*TINY, where, "train.steps=40", "train.validate_every=0", "evaluate.pictures=0"]
    process = start(["--max-restarts=1", "-m", "dist_colorize.train", *many], cache, tmp_path / "log")
    try:
        wait_until(lambda: list(tmp_path.glob("runs/*/checkpoints/step-00000006.pt")) or process.poll() is not None)
        os.kill(children(process.pid)[-1], signal.SIGKILL)
        assert process.wait(timeout=240) == 0, (tmp_path / "log").read_text()
    finally:
        kill_tree(process.pid)
    runs = [path for path in (tmp_path / "runs").iterdir() if path.is_dir()]
    assert len(runs) == 1
    assert list(losses(runs[0])) == list(range(1, 41)) and last_state(runs[0])["step"] == 40
    log = (tmp_path / "log").read_text()
    assert log.count(f"run: {runs[0]}") == 2 and int(re.findall(r"resuming from .*, step (\d+)", log)[0]) >= 6


@pytest.mark.world_size(2)
def test_ranks_without_their_launcher_save_and_leave(tmp_path: Path, cache: dict[str, str]) -> None:
    run = tmp_path / "run"
    arguments = ["-m", "dist_colorize.train", *TINY, f"run.dir={run}", "train.steps=100000", "train.validate_every=0"]
    process = start(arguments, cache, tmp_path / "log")
    try:
        wait_until(lambda: (run / "checkpoints" / "step-00000003.pt").exists() or process.poll() is not None)
        ranks = children(process.pid)
        assert len(ranks) == 2
        process.kill()
        process.wait()
        wait_until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks), 60)
    finally:
        for rank in ranks:
            kill_tree(rank)
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"
    assert last_state(run)["step"] == max(losses(run))


@pytest.mark.slow
def test_no_kill_at_any_time_loses_a_run(tmp_path: Path, cache: dict[str, str]) -> None:
    """200 kill -9 in all: of the only rank, of one or both of two ranks, of torchrun. Every step makes a checkpoint."""
    kills = {"1": 134, "2": 60, "torchrun": 6}
    settings = [*TINY, "train.steps=20", "train.global_batch=4", "train.validate_every=0", "evaluate.pictures=0"]
    settings += ["checkpoint.every=1", "checkpoint.keep=2", "distributed.timeout=60"]
    processes = {
        ranks: subprocess.Popen(
            [sys.executable, str(KILLS), str(tmp_path / ranks), ranks, str(number), "1", *settings],
            env=rank_environment(cache | {"XDG_CACHE_HOME": str(tmp_path / f"cache-{ranks}")}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for ranks, number in kills.items()
    }
    try:
        for ranks, process in processes.items():
            out, err = process.communicate(timeout=1500)
            assert process.returncode == 0, err + (tmp_path / ranks / "output.txt").read_text()[-3000:]
            seen = json.loads(out.splitlines()[-1])
            print(f"{ranks}: {seen}")
            assert seen["kills"] == kills[ranks] and seen["finished"] >= 1
    finally:
        for process in processes.values():
            kill_tree(process.pid)
