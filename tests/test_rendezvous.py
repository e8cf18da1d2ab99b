"""Ranks that find each other, or do not. Where one is killed, they are real processes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import kill_tree, rank_environment

from dist_colorize import rendezvous
from dist_colorize.errors import FAILURE, RunFailed, UserError
from dist_colorize.heartbeat import Launcher, PeerLost
from dist_colorize.rendezvous import Rendezvous


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """Where the ranks of this test are told to meet, without torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    return port


def test_every_rank_hears_every_rank_also_a_late_one(port: int) -> None:
    heard, meetings = {}, {}  # the store ends with rank 0's meeting

    def join(rank: int) -> None:
        time.sleep(0.3 * (2 - rank))  # rank 0, which serves the store, comes last
        meeting = meetings[rank] = Rendezvous(rank, 3, 60, Launcher())
        heard[rank] = [meeting.exchange("name", f"rank {rank}"), meeting.exchange("age", str(rank))]

    ranks = [threading.Thread(target=join, args=(rank,)) for rank in range(3)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert heard == {rank: [["rank 0", "rank 1", "rank 2"], ["0", "1", "2"]] for rank in range(3)}


def test_workers_that_are_started_again_do_not_hear_the_first_ones(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Rendezvous(0, 2, 10, Launcher())
    assert Rendezvous(1, 2, 10, Launcher()).store.add("count", 1) == 1
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert Rendezvous(1, 2, 10, Launcher()).store.add("count", 1) == 1
    assert server.store.add("count", 1) == 2


def test_workers_that_are_started_again_do_not_hear_of_the_collective_that_failed_before(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL's watchdog tells the others past all prefixes, and theirs would end the new processes minutes later."""
    torchrun = dist.TCPStore("127.0.0.1", port, 2, True, wait_for_workers=False)
    torchrun.set("exception_dump", "0000")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    Rendezvous(1, 2, 10, Launcher())
    assert torchrun.check(["exception_dump"])  # one rank is enough, and rank 0 does it before it can be met
    Rendezvous(0, 2, 10, Launcher())
    assert not torchrun.check(["exception_dump"])


def test_a_rank_that_nobody_serves_gives_up_after_its_time_out(port: int) -> None:
    began = time.monotonic()
    with pytest.raises(PeerLost, match=rf"rank 0 did not answer at 127.0.0.1:{port} for 1 s \(.*refused\)"):
        Rendezvous(1, 2, 1, Launcher())
    assert 1 <= time.monotonic() - began < 3


def test_a_connection_to_itself_is_no_answer(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def meet_oneself(address: tuple[str, int], timeout: float) -> socket.socket:
        end = socket.socket()
        end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        end.bind(address)
        end.connect(address)
        return end

    monkeypatch.setattr(socket, "create_connection", meet_oneself)
    monkeypatch.setattr(rendezvous, "CONNECT_SECONDS", 1)
    with pytest.raises(PeerLost, match=f"rank 0 did not answer at 127.0.0.1:{port}"):
        Rendezvous(1, 2, 0.5, Launcher())


def test_torchruns_store_is_not_waited_for_as_long_as_ranks_are(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(rendezvous, "TORCHRUN_SECONDS", 1)
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        with pytest.raises(PeerLost, match=f"torchrun did not answer at 127.0.0.1:{port} for 1 s"):
            Rendezvous(rank, size, 3600, Launcher())


def test_a_launcher_that_goes_is_noticed_by_a_rank_that_waits(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store may be on another node, and live on: it is the rank that looks after its own torchrun."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    meeting = Rendezvous(0, 2, 3600, Launcher())
    monkeypatch.setattr(os, "getppid", lambda: 0)
    with pytest.raises(PeerLost, match="torchrun has gone before the ranks had met"):
        meeting.exchange("name", "rank 0")


def test_those_who_did_not_come_are_named(port: int) -> None:
    meeting = Rendezvous(0, 4, 1, Launcher())
    Rendezvous(2, 4, 1, Launcher()).store.set("name/2", "rank 2")
    with pytest.raises(PeerLost, match="of 4 ranks these did not come within 1 s: 1, 3; see what they printed"):
        meeting.exchange("name", "rank 0")


def test_a_port_that_is_taken_is_named(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)), pytest.raises(RunFailed, match=f"cannot serve port {port}.*in use"):
        Rendezvous(0, 2, 10, Launcher())


@pytest.mark.parametrize(("name", "value"), [("MASTER_ADDR", ""), ("MASTER_PORT", ""), ("MASTER_PORT", "99999")])
def test_an_address_that_is_none_is_bad_usage(
    port: int, name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"the environment variable {name} .*start with torchrun"):
        Rendezvous(1, 2, 10, Launcher())


# ---------------------------------------------------------------- killed while they meet

PROGRAM = """
import os, sys, time
from dist_colorize import distributed, heartbeat, rendezvous
from dist_colorize.distributed import DistributedConfig, session
from dist_colorize.errors import run_command

heartbeat.SILENT_SECONDS = 0.5

def main():
    with session(DistributedConfig(device="cpu", timeout=float(sys.argv[1]))):
        print("met", flush=True)

{before}
run_command(main)
"""


def written(path: Path, before: str) -> str:
    path.write_text(PROGRAM.format(before=textwrap.dedent(before)))
    return str(path)


@pytest.mark.parametrize(
    ("killed", "where", "limit", "told"),
    [
        # gloo does not notice that its other side has died before it came: the time-out has to pass
        (1, "distributed.dist.init_process_group", 10, r"rank 1 \(.*, pid {pid}\) vanished"),
        (0, "distributed._identity", 3600, "the store of the process group has gone before the ranks had met"),
    ],
    ids=["while the group forms", "before they know each other"],
)
def test_who_is_killed_while_ranks_meet(
    tmp_path: Path, port: int, killed: int, where: str, limit: int, told: str
) -> None:
    deadly = f"{where} = lambda *_, **__: time.sleep(2) or os.kill(os.getpid(), 9)"
    ranks = []
    for number in range(2):
        program = written(tmp_path / f"{number}.py", deadly if number == killed else "")
        place = {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": str(number), "LOCAL_WORLD_SIZE": "2"}
        command = [sys.executable, program, str(limit)]
        ranks.append(subprocess.Popen(command, env=rank_environment(place), stderr=subprocess.PIPE, text=True))
    try:
        errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    finally:
        for rank in ranks:
            kill_tree(rank.pid)
    assert ranks[killed].returncode == -signal.SIGKILL
    assert ranks[1 - killed].returncode == FAILURE and "Traceback" not in errors[1 - killed]
    [line] = [line for line in errors[1 - killed].splitlines() if " error: " in line]
    assert re.search(told.format(pid=ranks[killed].pid), line), line


@pytest.mark.parametrize("moment", ["importing", "meeting"])
def test_ranks_whose_torchrun_is_killed_before_they_met_do_not_stay(tmp_path: Path, moment: str) -> None:
    wait = f"""
    def wait(*_):
        launcher = os.getppid()
        open(f"{tmp_path}/{{os.getpid()}}", "w").close()
        while os.path.exists(f"/proc/{{launcher}}"):  # its port may answer for a moment after os.getppid() has changed
            time.sleep(0.05)
        return "cpu"

    rendezvous.TORCHRUN_SECONDS = 2
    """
    wait = textwrap.dedent(wait) + ("wait()" if moment == "importing" else "distributed._identity = wait")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with open(tmp_path / "log", "w") as log:
        command += [written(tmp_path / "program.py", wait), "3600"]
        launcher = subprocess.Popen(command, env=rank_environment(), stdout=log, stderr=log)
    ranks: list[int] = []
    try:
        while len(ranks) < 2:
            ranks = [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]
            assert launcher.poll() is None
            time.sleep(0.05)
        launcher.kill()
        launcher.wait()
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{rank}").exists() for rank in ranks):
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
    finally:
        for pid in [launcher.pid, *ranks]:
            kill_tree(pid)
    text = (tmp_path / "log").read_text()
    assert "Traceback" not in text and "met\n" not in text
    assert text.count("torchrun did not answer" if moment == "importing" else "before the ranks had met") == 2
