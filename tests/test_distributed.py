"""The ranks of a run, under real torchrun on gloo: they compute, wait, stop and fail together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import kill_tree, rank_environment, torchrun_command

from dist_colorize import distributed
from dist_colorize.distributed import DistributedConfig, Lent, nccl_timeout, session
from dist_colorize.errors import FAILURE, INTERRUPTED, Interrupted, RunFailed, UserError
from dist_colorize.flight_recorder import DUMP_SECONDS
from dist_colorize.hardware import usable_cores
from dist_colorize.heartbeat import SILENT_SECONDS, STUCK_SECONDS

PRELUDE = """
import json, os, signal, sys, time
import torch
from dist_colorize.distributed import DistributedConfig, session
from dist_colorize.stopping import StopFlag
from dist_colorize.errors import Interrupted, UserError, run_command

def note(**facts):
    path = f"{sys.argv[1]}/{os.environ['RANK']}.json"
    with open(path + ".new", "w") as file:
        json.dump(facts, file)
    os.replace(path + ".new", path)

def empty_root():
    raise UserError("data.root: empty")

def caught(kind, function, *args):
    try:
        function(*args)
    except kind as error:
        return f"{type(error).__name__}: {error}"
"""


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], list[str]]:
    """Write a rank's program; returns its arguments, the last of which is the folder for its notes."""

    def write(body: str) -> list[str]:
        path = tmp_path / "program.py"
        path.write_text(PRELUDE + textwrap.dedent(body))
        return [str(path), str(tmp_path)]

    return write


def notes(tmp_path: Path, ranks: int) -> list[dict[str, Any]]:
    return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.world_size(3)
def test_ranks_sum_agree_and_share(tmp_path: Path, program: Any, torchrun: Any) -> None:
    args = program("""
        with session(DistributedConfig(timeout=3)) as world, StopFlag() as stop:
            big = 2**53 + world.rank  # a float64 sum would lose the last bit
            facts = dict(
                who=[world.rank, world.local_rank, world.size, world.local_size, str(world.device), world.backend],
                threads=[world.threads, torch.get_num_threads()],
                sum=world.sum_(torch.tensor([big, world.rank])).tolist(),
                agree=[world.agree(world.rank == 2), world.agree(False), world.agree(True)],
                gathered=world.gather_objects({"rank": world.rank}),
                broadcast=world.broadcast_object(f"from {world.rank}"),
                # longer than the time-out of a collective
                slow=world.wait_for((lambda: time.sleep(5) or "done") if world.is_leader else None),
                user=caught(UserError, world.wait_for, empty_root),
                bug=caught(Exception, world.wait_for, lambda: 1 // 0),
            )
            if world.rank == 1:
                os.kill(os.getpid(), signal.SIGUSR2)
            world.barrier()
            before = stop.requested
            def endless():
                while not stop.requested:
                    time.sleep(0.01)
                return "half a result"
            stopped = caught(Interrupted, world.wait_for, endless, stop)
            note(**facts, stopped=stopped, requested=[before, stop.requested])
        """)
    done = torchrun(3, *args)
    assert done.returncode == 0, done.stderr
    for rank, facts in enumerate(notes(tmp_path, 3)):
        assert facts["who"] == [rank, rank, 3, 3, "cpu", "gloo"]
        assert facts["threads"] == [max(1, usable_cores() // 3)] * 2
        assert facts["sum"] == [3 * 2**53 + 3, 3]
        assert facts["agree"] == [True, False, True]
        assert facts["gathered"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert facts["broadcast"] == "from 0"
        assert facts["slow"] == "done"
        assert facts["user"] == "UserError: data.root: empty"
        own = "ZeroDivisionError: integer division or modulo by zero"
        assert facts["bug"] == (own if rank == 0 else f"RuntimeError: rank 0 failed: {own}")
        assert facts["requested"] == [rank == 1, True]
        assert facts["stopped"] == "Interrupted: stopped on request"


def test_the_process_does_not_end_under_work_that_is_slow_to_stop(tmp_path: Path, program: Any) -> None:
    """A thread that is frozen by the interpreter's end keeps its locks; a progress bar's destructor waited for one."""
    args = program("""
        from dist_colorize import distributed
        distributed.LEAVING_SECONDS = 0.1

        def slow():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(2)
            os.environ["RANK"] = "0"
            note(returned=True)

        def main():
            with session(DistributedConfig()) as world, StopFlag() as stop:
                world.wait_for(slow, stop)
        run_command(main)
        """)
    done = subprocess.run([sys.executable, *args], env=rank_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == INTERRUPTED, done.stderr
    assert notes(tmp_path, 1) == [{"returned": True}]


STEPS = """
    from dist_colorize import stopping
    stopping.SECOND_SIGNAL_SECONDS = float(os.environ["GRACE"])

    def main():
        with session(DistributedConfig()) as world, StopFlag() as stop:
            for step in range(10**6):
                time.sleep(0.01 * (1 + world.rank))
                if step == 5:
                    note(pid=os.getpid())
                if world.agree(stop.requested):
                    if world.is_leader:
                        time.sleep(float(os.environ["SAVING"]))
                    note(left=step)
                    raise Interrupted(f"at step {step}")
    run_command(main)
"""


@pytest.mark.world_size(2)
@pytest.mark.parametrize("told", ["launcher", "launcher and ranks", "ranks"])
def test_a_signal_ends_all_ranks_at_the_same_step(tmp_path: Path, program: Any, told: str) -> None:
    command = torchrun_command(2, *program(STEPS))
    # Rank 0 saves for long after the ranks were told; the grace is shorter than the others take to leave.
    env = rank_environment({"SAVING": "6", "GRACE": "0.2"} if told == "ranks" else {"SAVING": "0", "GRACE": "30"})
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not all((tmp_path / f"{rank}.json").exists() for rank in range(2)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        pids = [facts["pid"] for facts in notes(tmp_path, 2)]
        # The launcher tells its ranks, for a second time where scancel told them too; told alone, the first rank that
        # leaves makes the launcher tell the others.
        for pid in pids if "ranks" in told else []:
            os.kill(pid, signal.SIGTERM)
        if "launcher" in told:
            process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    finally:
        kill_tree(process.pid)
    steps = [facts.get("left") for facts in notes(tmp_path, 2)]
    assert steps[0] is not None
    assert steps[0] == steps[1]
    assert stderr.count(f"interrupted: at step {steps[0]}\n") == 1


@pytest.mark.world_size(4)
def test_late_agreements_are_the_same_on_every_rank_whenever_the_flags_rise(
    tmp_path: Path, program: Any, torchrun: Any
) -> None:
    """150 loops of up to 12 steps; in each every rank wishes to stop at a step of its own, or never, and takes its
    time. Other collectives go on in between. The last question of a loop stays open."""
    args = program("""
        import random
        from dist_colorize.distributed import LateAgreement
        left, expected = [], []
        with session(DistributedConfig()) as world:
            for loop in range(150):
                wishes = [random.Random(f"{loop} {rank}").choice([*range(12), 99, 99]) for rank in range(world.size)]
                pace = random.Random(f"{loop} {world.rank} pace")
                expected.append(min(min(wishes) + 1, 12))
                with LateAgreement(world) as agree:
                    stopping, step = False, -1
                    while not stopping and step < 12:
                        step += 1
                        time.sleep(pace.choice([0, 0, 0, 0.001, 0.004]))
                        total = world.sum_(torch.tensor([world.rank, step])).tolist()
                        assert total == [6, 4 * step], total
                        stopping = agree(step >= wishes[world.rank])
                    assert world.gather_objects(step) == [step] * 4
                left.append(step)
        note(left=left, expected=expected)
        """)
    done = torchrun(4, *args)
    assert done.returncode == 0, done.stderr
    for facts in notes(tmp_path, 4):
        assert facts["left"] == facts["expected"]


@pytest.mark.world_size(2)
def test_a_question_that_stays_open_holds_nobody_up(tmp_path: Path, program: Any, torchrun: Any) -> None:
    args = program("""
        from dist_colorize.distributed import LateAgreement
        def main():
            with session(DistributedConfig()) as world:
                agree = LateAgreement(world)
                agree(False)
                note(at_work=[world.lent._tensors[0]._use_count() > 0])
                if os.environ["ENDS"] == "interrupted":
                    raise Interrupted()
        run_command(main)
        """)
    for ends, code in (("well", 0), ("interrupted", 1)):
        done = torchrun(2, *args, env={"ENDS": ends})
        assert done.returncode == code and 'Traceback (most recent call last):\n  File "' + args[0] not in done.stderr
        assert "SIGABRT" not in done.stderr and ("75" in done.stderr) == (ends == "interrupted"), done.stderr


def test_tensors_are_kept_until_gloo_has_let_go_of_them() -> None:
    with session(DistributedConfig(device="cpu")) as world:
        lent, tensor = Lent(), torch.ones(1)
        work = torch.distributed.all_reduce(lent.add(tensor), async_op=True)
        work.wait()
        held = [work.get_future()]  # holds it as gloo's thread does
        del work
        lent.settle(0.05)
        assert lent._tensors == [tensor]
        threading.Timer(0.2, held.clear).start()
        lent.settle(60)
        assert lent._tensors == [] and not held
        assert world.size == 1


@pytest.mark.world_size(2)
def test_a_lost_peer_ends_the_others_soon(tmp_path: Path, program: Any, torchrun: Any) -> None:
    args = program("""
        with session(DistributedConfig(timeout=20)) as world:
            world.barrier()
            if world.rank == 1:
                time.sleep(1)
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                os.kill(os.getpid(), signal.SIGKILL)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            started = time.monotonic()
            error = caught(RuntimeError, world.barrier)
            note(error=error, seconds=time.monotonic() - started)
        """)
    assert torchrun(2, *args).returncode != 0
    facts = json.loads((tmp_path / "0.json").read_text())
    assert facts["error"] is not None
    assert facts["seconds"] < 10


def test_one_process_needs_no_launcher_and_makes_the_same_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    try:
        for _ in range(2):  # a second session in the same process works like the first
            with session(DistributedConfig(device="cpu")) as world:
                assert (world.rank, world.size, world.is_leader, world.threads) == (0, 1, True, usable_cores())
                assert world.sum_(torch.tensor([1.5])).item() == 1.5
                assert world.gather_objects("x") == ["x"]
                assert world.broadcast_object("x") == "x"
                assert world.wait_for(lambda: 42) == 42
                assert not world.agree(False)
                with pytest.raises(ZeroDivisionError):
                    world.wait_for(lambda: 1 // 0)
        with pytest.raises(KeyError), session(DistributedConfig(device="cpu")):
            raise KeyError
        assert not torch.distributed.is_initialized()
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def nccl_stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The session of a rank with a GPU, on a CPU: torch's fake backend in place of NCCL. What it was given."""
    import torch.testing._internal.distributed.fake_pg  # registers the backend

    seen: dict[str, Any] = {}
    genuine = torch.distributed.init_process_group

    def init(backend: str, **settings: Any) -> None:
        seen.update(settings, backend=backend, environment=dict(os.environ))
        genuine(backend.replace("nccl", "fake"), **settings | {"device_id": None})

    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    monkeypatch.setattr(distributed, "_agreed_backend", lambda *args: "nccl")
    monkeypatch.setattr(
        torch._C._distributed_c10d.FakeProcessGroup,
        "set_timeout",
        lambda self, timeout: seen.update(nccl_timeout=timeout),
        raising=False,
    )
    for name in ("RANK", "WORLD_SIZE", "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    return seen


def test_nccl_waits_longer_than_gloo_which_names_the_lost_rank(nccl_stand_in: dict[str, Any]) -> None:
    threads = torch.get_num_threads()
    with session(DistributedConfig(device="cpu", timeout=200)) as world:
        assert nccl_stand_in["backend"] == "cpu:gloo,cuda:nccl" and world.backend == "nccl"
        assert nccl_stand_in["timeout"] == timedelta(seconds=200)
        assert distributed._backend_for("cpu").options._timeout == timedelta(seconds=200)
        assert nccl_stand_in["nccl_timeout"] == timedelta(seconds=460)
        # It also leaves time to find out who is missing, in a thread that gives the main one a chance first.
        for timeout in (1.0, 300.0, 1e6):
            assert nccl_timeout(timeout) >= timeout + STUCK_SECONDS + 2 * SILENT_SECONDS + DUMP_SECONDS
    torch.set_num_threads(threads)


def test_nccl_records_its_collectives_before_it_begins(nccl_stand_in: dict[str, Any]) -> None:
    threads = torch.get_num_threads()
    with session(DistributedConfig(device="cpu")):
        assert nccl_stand_in["environment"]["TORCH_FR_BUFFER_SIZE"] == "2000"
        assert nccl_stand_in["environment"]["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert "TORCH_FR_BUFFER_SIZE" not in os.environ
    torch.set_num_threads(threads)


@pytest.mark.parametrize("error", [RunFailed("all ranks know", shared=True), KeyError("a bug"), Interrupted("")])
def test_a_rank_alone_keeps_no_process_group_after_an_error(nccl_stand_in: dict[str, Any], error: Exception) -> None:
    threads = torch.get_num_threads()
    with pytest.raises(type(error)), session(DistributedConfig(device="cpu")):
        raise error
    assert not torch.distributed.is_initialized()
    torch.set_num_threads(threads)


def test_where_nccl_fails_on_a_rank_alone_its_own_words_remain(nccl_stand_in: dict[str, Any]) -> None:
    threads, failure = torch.get_num_threads(), torch.distributed.DistBackendError
    with pytest.raises(failure, match="Last error"), session(DistributedConfig(device="cpu")):
        raise failure("NCCL error: unhandled cuda error\nLast error: out of memory")
    assert not torch.distributed.is_initialized()
    torch.set_num_threads(threads)


def test_a_process_that_lost_a_rank_does_not_wait_for_its_gpu(tmp_path: Path, program: Any) -> None:
    """At the interpreter's end torch and CUDA wait for collectives; here another handler does, which never ends."""
    args = program("""
        import atexit
        from dist_colorize import distributed
        atexit.register(time.sleep, 1000)
        distributed._agreed_backend = lambda *args: "nccl"
        genuine = torch.distributed.init_process_group
        torch.distributed.init_process_group = lambda backend, device_id, **settings: genuine("gloo", **settings)
        distributed._backend_for = lambda device, found=distributed._backend_for: found("cpu")

        def main():
            with session(DistributedConfig(device="cpu")):
                raise RuntimeError("gloo: Connection closed by peer")
        run_command(main)
        """)
    done = subprocess.run([sys.executable, *args], env=rank_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == FAILURE, done.stderr
    assert done.stderr.endswith("goes on from the last checkpoint\n") and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("identities", "backend", "expected"),
    [
        (["cpu a", "cpu a", "cpu b"], "auto", "gloo"),
        (["cuda a u0", "cuda a u1", "cuda b u2"], "auto", "nccl"),
        (["cuda a u0", "cuda b u0"], "auto", "nccl"),
        (["cuda a u0", "cuda a u1", "cuda a u0"], "auto", "gloo"),
        (["cuda a u0"], "gloo", "gloo"),
    ],
)
def test_the_backend_follows_from_all_devices(identities: list[str], backend: Any, expected: str) -> None:
    assert distributed._agreed_backend(DistributedConfig(backend=backend), identities) == expected


@pytest.mark.parametrize(
    ("identities", "backend", "message"),
    [
        (["cuda a u0", "cpu b"], "auto", r"rank 1 on b has no GPU while rank 0 has one; .*distributed.device=cpu"),
        (["cuda a u0", "cuda a u1", "cuda a u1"], "nccl", r"ranks 1 and 2 share one GPU.*distributed.backend=auto"),
    ],
)
def test_devices_that_do_not_fit_together_are_named(identities: list[str], backend: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        distributed._agreed_backend(DistributedConfig(backend=backend), identities)


def test_ranks_take_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [distributed.own_device(DistributedConfig(), rank).index for rank in range(4)] == [0, 1, 0, 1]
    assert distributed.own_device(DistributedConfig(device="cpu"), 1) == torch.device("cpu")


@pytest.mark.parametrize("config", [DistributedConfig(device="cuda"), DistributedConfig(backend="nccl")])
def test_asking_for_a_gpu_that_is_not_there_is_an_error(
    monkeypatch: pytest.MonkeyPatch, config: DistributedConfig
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"distributed.*no NVIDIA GPU or driver"):
        distributed.own_device(config, 0)


def test_impossible_settings() -> None:
    with pytest.raises(ValueError, match="timeout"):
        DistributedConfig(timeout=0)
    with pytest.raises(ValueError, match="nccl works on GPUs only"):
        DistributedConfig(device="cpu", backend="nccl")


def test_a_broken_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match='WORLD_SIZE must be a whole number, got "two"'), session(DistributedConfig()):
        pass


@pytest.mark.world_size(2)
def test_all_ranks_use_as_many_threads_as_the_poorest_may(tmp_path: Path, program: Any, torchrun: Any) -> None:
    args = program("""
        os.environ["LOCAL_WORLD_SIZE"] = "1"  # each as on a node of its own
        os.sched_getaffinity = lambda pid: set(range(3 + int(os.environ["RANK"])))
        with session(DistributedConfig()) as world:
            shared = [world.threads, torch.get_num_threads()]
        note(threads=shared)
        """)
    assert torchrun(2, *args).returncode == 0
    assert notes(tmp_path, 2) == [{"threads": [3, 3]}] * 2


def test_the_number_of_threads_can_be_set() -> None:
    before = torch.get_num_threads()
    try:
        with session(DistributedConfig(device="cpu", threads=before + 1)) as world:
            assert world.threads == torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ValueError, match="threads must be at least 1 or null, got 0"):
        DistributedConfig(threads=0)


@pytest.mark.gpu
@pytest.mark.world_size(2)
def test_two_ranks_share_one_gpu_over_gloo(tmp_path: Path, program: Any, torchrun: Any) -> None:
    args = program("""
        with session(DistributedConfig()) as world:
            note(backend=world.backend, sum=world.sum_(torch.ones(1, device=world.device)).item())
        """)
    done = torchrun(2, *args, env={"CUDA_VISIBLE_DEVICES": "0"})
    assert done.returncode == 0, done.stderr
    assert notes(tmp_path, 2) == [{"backend": "gloo", "sum": 2.0}] * 2


@pytest.mark.gpu
@pytest.mark.world_size(1)
def test_one_gpu_talks_nccl_and_the_flag_stays_on_the_cpu(tmp_path: Path, program: Any, torchrun: Any) -> None:
    args = program("""
        from dist_colorize import distributed
        with session(DistributedConfig(timeout=100)) as world:
            total = world.sum_(torch.ones(1, device=world.device)).item()
            seconds = [distributed._backend_for(on).options._timeout.total_seconds() for on in ("cpu", "cuda")]
            note(backend=world.backend, agree=world.agree(True), sum=total, seconds=seconds)
        """)
    done = torchrun(1, *args)
    assert done.returncode == 0, done.stderr
    assert notes(tmp_path, 1) == [{"backend": "nccl", "agree": True, "sum": 1.0, "seconds": [100.0, 260.0]}]


@pytest.mark.gpu
@pytest.mark.world_size(1)
def test_nccl_with_one_rank_trains_under_ddp_and_leaves_a_record(tmp_path: Path, program: Any, torchrun: Any) -> None:
    args = program("""
        import subprocess
        from pathlib import Path
        from dist_colorize.distributed import LateAgreement
        folder = Path(sys.argv[1]) / "flight_recorder"
        with session(DistributedConfig()) as world, LateAgreement(world) as agree:
            world.recorder.write_into(folder)
            torch.manual_seed(0)
            plain = torch.nn.Linear(4, 4).to(world.device)
            ddp = torch.nn.parallel.DistributedDataParallel(plain, device_ids=[world.device])
            for step in range(3):
                ddp(torch.ones(2, 4, device=world.device)).sum().backward()
                assert not agree(False)
            torch.cuda.synchronize()
            gradients = [float(p.grad.sum()) for p in plain.parameters()]
            record = world.recorder.dump()
        reader = [sys.executable, "-m", "torch.distributed.flight_recorder.fr_trace", str(folder)]
        read = subprocess.run(reader, capture_output=True, text=True)
        note(gradients=gradients, record=str(record), bytes=record.stat().st_size, read=[read.returncode, read.stderr])
        """)
    done = torchrun(1, *args)
    assert done.returncode == 0, done.stderr
    (facts,) = notes(tmp_path, 1)
    assert facts["gradients"] == [3 * 2 * 4.0 * 4, 3 * 2 * 4.0]
    assert facts["record"] == str(tmp_path / "flight_recorder" / "rank_0") and facts["bytes"] > 1000
    assert facts["read"][0] == 0, facts["read"][1]
