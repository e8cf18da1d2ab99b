"""What all tests share: processes under torchrun, and plain words for tests that are left out here."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# pytest finds hooks by name
from own_process import pytest_pyfunc_call, pytest_runtest_logreport, pytest_runtest_logstart  # noqa: F401

if TYPE_CHECKING:
    import torch

CHECKOUT = Path(__file__).resolve().parent.parent

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
"""For `parametrize("device", DEVICES)`: what must hold on a CPU and on a GPU alike."""
DECODING_DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.own_process])]
"""The same for tests that decode images, which can crash the process on a GPU."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = config.getoption("--slow") or "slow" in config.getoption("-m")
    gpu = None
    for item in items:
        if item.get_closest_marker("slow") and not slow:
            item.add_marker(pytest.mark.skip(reason="slow: run it with --slow"))
        if item.get_closest_marker("gpu"):
            gpu = _has_gpu() if gpu is None else gpu
            if not gpu:
                item.add_marker(pytest.mark.skip(reason="no GPU here"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def ieee_fp32(request: pytest.FixtureRequest) -> None:
    """Tests that need a GPU compute in fp32 as the product does."""
    if "gpu" in request.keywords:
        from dist_colorize.hardware import use_ieee_fp32

        use_ieee_fp32()


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """A session that failed on a GPU keeps its process group, as its process is about to end; pytest's is not."""
    yield
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The test runs on the CPU, and on the first GPU where there is one."""
    import torch

    return torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture
def torchrun() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`torchrun(nproc, *args, env=..., timeout=...)` runs a script or `-m module` with arguments in nproc ranks.

    Real torchrun on this machine's loopback, on a port that is free, one thread per rank unless `env` says otherwise.
    Returns the completed process with stdout and stderr as text; past `timeout` seconds every process of it is killed
    and the test fails with what was printed.
    """
    return run_torchrun


def torchrun_command(nproc: int, *args: str | os.PathLike[str]) -> list[str]:
    """The command line of torchrun, for tests that steer the process themselves (signals, kills)."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    return [*launcher, *(os.fspath(a) for a in args)]


def rank_environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of ranks in tests: this checkout importable, loopback only, one thread each."""
    path = os.pathsep.join(p for p in (str(CHECKOUT), os.environ.get("PYTHONPATH")) if p)
    defaults = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **defaults, **(env or {})}


def run_torchrun(
    nproc: int, *args: str | os.PathLike[str], env: Mapping[str, str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    command = torchrun_command(nproc, *args)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=rank_environment(env),
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        out, err = process.communicate()
        pytest.fail(f"still running after {timeout} s: {' '.join(command)}\n{out}\n{err}")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def kill_tree(pid: int) -> None:
    """Kill -9 a process and all its descendants; torchrun puts each rank in a session of its own."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    for child in children.stdout.split():
        kill_tree(int(child))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
