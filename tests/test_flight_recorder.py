"""The record of the last collectives: where it is written, who decides, and that torch's own reader takes it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C import _distributed_c10d

from dist_colorize import flight_recorder
from dist_colorize.distributed import DistributedConfig, session
from dist_colorize.flight_recorder import DEFAULTS, OLD_NAMES, PREFIX, FlightRecorder
from dist_colorize.run_folder import RunConfig
from dist_colorize.tracking import open_run

NAMES = [*DEFAULTS, PREFIX, *OLD_NAMES.values()]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def chosen() -> dict[str, str]:
    return {name: os.environ[name] for name in NAMES if name in os.environ}


def test_torch_is_told_before_the_group_is_made_and_where_to_when_the_folder_is_known(tmp_path: Path) -> None:
    with FlightRecorder(3, enabled=True) as recorder:
        assert chosen() == {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
        recorder.write_into(tmp_path / "flight_recorder")
        assert chosen()[PREFIX] == f"{tmp_path}/flight_recorder/rank_"
        assert (tmp_path / "flight_recorder").is_dir()  # torch makes none
    assert chosen() == {}  # another run in this process has a folder of its own


def test_what_the_user_has_set_stays_under_old_names_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "7", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
    theirs |= {"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": f"{tmp_path}/mine_"}
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(_distributed_c10d, "_dump_nccl_trace", lambda: b"record", raising=False)
    with FlightRecorder(1, enabled=True) as recorder:
        recorder.write_into(tmp_path / "run")
        assert chosen() == theirs
        assert recorder.dump() == tmp_path / "mine_1"
    assert chosen() == theirs


def test_without_nccl_there_is_nothing_to_record(tmp_path: Path) -> None:
    with session(DistributedConfig(device="cpu")) as world, open_run(RunConfig(dir=str(tmp_path)), world, "") as run:
        assert chosen() == {}
        assert world.recorder is not None and world.recorder.dump() is None
        assert not (run.path / "flight_recorder").exists()


def test_the_record_of_a_run_is_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_distributed_c10d, "_dump_nccl_trace", lambda: b"record", raising=False)
    with session(DistributedConfig(device="cpu")) as world, FlightRecorder(0, enabled=True) as recorder:
        object.__setattr__(world, "recorder", recorder)
        run = open_run(RunConfig(dir=str(tmp_path)), world, "")
        assert recorder.dump() == run.path / "flight_recorder" / "rank_0"


def test_a_record_that_cannot_be_had_is_no_reason_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder any more; torch that raises; a GPU that answers no more."""
    never = threading.Event()
    answers: list[Callable[[], Any]] = [
        lambda: b"record",
        lambda: torch.ones(2) @ torch.ones(3),
        lambda: (never.wait(), b"")[1],
    ]
    monkeypatch.setattr(flight_recorder, "DUMP_SECONDS", 0.1)
    for number, answer in enumerate(answers):
        monkeypatch.setattr(_distributed_c10d, "_dump_nccl_trace", answer, raising=False)
        with FlightRecorder(0, enabled=True) as recorder:
            recorder.write_into(tmp_path / str(number))
            if number == 0:
                (tmp_path / "0").rmdir()
            assert recorder.dump() is None
    never.set()


def test_torchs_reader_shows_the_collective_that_a_rank_did_not_enter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks; the second one stands still before its third collective. The entries are of gloo's record, as NCCL
    would write them."""
    threads = torch.get_num_threads()
    with session(DistributedConfig(device="cpu")) as world:
        for _ in range(3):
            world.sum_(torch.ones(5))
        record = pickle.loads(_distributed_c10d._dump_fr_trace())  # type: ignore[attr-defined]
    torch.set_num_threads(threads)
    group = record["entries"][-1]["process_group"]
    record["pg_config"] = {group[0]: {"name": group[0], "desc": group[1], "ranks": "[0, 1]"}}
    entries = record["entries"][-3:]
    for number, entry in enumerate(entries):
        entry |= {"profiling_name": "nccl:all_reduce", "state": "scheduled" if number == 2 else "completed"}
        entry |= {"collective_seq_id": number + 1, "record_id": number}

    for rank in (0, 1):
        ranks_own = pickle.dumps(record | {"entries": entries[: 3 - rank]})
        monkeypatch.setattr(_distributed_c10d, "_dump_nccl_trace", lambda own=ranks_own: own, raising=False)
        with FlightRecorder(rank, enabled=True) as recorder:
            recorder.write_into(tmp_path / "flight_recorder")
            recorder.dump()
    reader = [sys.executable, "-m", "torch.distributed.flight_recorder.fr_trace", str(tmp_path / "flight_recorder")]
    read = subprocess.run(reader, capture_output=True, text=True)
    told = read.stdout + read.stderr
    assert read.returncode == 0, told
    assert "all_reduce" in told and "missing ranks: {1}" in told, told
