"""A real SLURM cluster on one machine, for tests.

    with Cluster(folder) as cluster:                 # slurmctld and four nodes, in a second or so
        done = cluster.run(["sinfo"])                # on the login host
        cluster.power_off(2)                         # every process and the network of node2 vanish at once
        cluster.power_on(2)

No systemd, no container: namespaces. The login host is one process, pid 1 of a PID namespace, with munged, slurmctld
and a network bridge in it; every node is pid 1 of a namespace below, with a host name, an address and a slurmd of its
own (namespaces.py). Killing the login host's process ends everything, and it ends itself when the test process is gone,
however that dies. The file system is that of the machine, as if it were shared. GPUs are device files without a device.
Needs SLURM's daemons, iproute2, and root or user namespaces.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from cluster.configuration import write_configuration

INSTALL = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge iproute2"
NAMESPACES = Path(__file__).with_name("namespaces.py")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "ip", "unshare", "nsenter")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # Debian keeps the daemons where users do not look


def missing() -> str | None:
    """Why no cluster can be started here, with the remedy; None where it can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if absent:
        return f"no {', '.join(absent)} here: {INSTALL}"
    probe = subprocess.run(["unshare", *_user(), "--net", "true"], capture_output=True, text=True, check=False)
    return None if probe.returncode == 0 else f"namespaces are forbidden here ({probe.stderr.strip()}): run as root"


class Cluster:
    """Up between `with` and its end."""

    def __init__(self, folder: Path, nodes: int = 4, cpus: int = 16, gpus: int = 8, user_signal: bool = True) -> None:
        """`user_signal`: whether preempted jobs get the signal that they asked for, or SIGTERM alone."""
        self.folder = folder
        self.nodes = nodes
        write_configuration(folder, nodes, cpus, gpus, user_signal)
        self._login: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    def __enter__(self) -> Self:
        log = self._log = open(self.folder / "log" / "login.out", "ab")
        namespaces = ["--net", "--uts", "--mount", "--pid", "--ipc", "--fork", "--mount-proc", "--kill-child=SIGKILL"]
        self._login = subprocess.Popen(
            ["unshare", *_user(), *namespaces, sys.executable, "-I", str(NAMESPACES), "login", str(self.folder)],
            stdin=subprocess.PIPE,  # its end is the sign that we are gone
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=self.environment(),
        )
        try:
            wait_for(lambda: (self.folder / "run" / "login.ready").exists(), 30, self._complaints)
            self.wait_until_idle(60)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._login is not None and self._login.stdin is not None and self._log is not None
        with contextlib.suppress(ProcessLookupError):
            self._login.kill()  # unshare; its child is pid 1 of the namespace, and with it goes everything
        self._login.wait()
        self._login.stdin.close()
        self._log.close()
        wait_for(lambda: not self.processes(), 20, lambda: f"still there: {self.processes()}")

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment of a user's shell on the cluster."""
        ours = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN", "SUBMITIT"))}
        return {**ours, "PATH": PATH, "SLURM_CONF": str(self.folder / "etc" / "slurm.conf"), **(more or {})}

    def run(
        self,
        command: Sequence[str],
        node: int | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 120,
        user: int | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login host, or on a node; its result with stdout and stderr as text."""
        inside = [*self.inside(node, cwd), *as_user(user)]
        return subprocess.run(
            [*inside, *command], env=self.environment(env), capture_output=True, text=True, timeout=timeout, check=False
        )

    def inside(self, node: int | None = None, cwd: Path | None = None) -> list[str]:
        """The words before a command that make it run on the login host, or on a node."""
        pid = self._login_pid() if node is None else self._node_pid(node)
        assert pid, f"node{node} is off"
        user = ["--user", "--preserve-credentials"] if os.geteuid() else []
        return ["nsenter", f"--target={pid}", *user, "--net", "--uts", "--mount", "--pid", f"--wd={cwd or Path.cwd()}"]

    def power_off(self, node: int) -> None:
        """End all processes and the network of a node at once, without a word to anybody."""
        os.kill(self._node_pid(node), signal.SIGKILL)

    def power_on(self, node: int) -> None:
        """Boot a node that is off."""
        (self.folder / "run" / f"node{node}.boot").touch()
        wait_for(lambda: self._node_pid(node) != 0, 20, self._complaints)

    def kill_slurmd(self, node: int) -> None:
        """End the daemon of a node; the tasks on it go on."""
        self.run(["pkill", "-KILL", "-x", "slurmd"], node=node)

    def restart_slurmd(self, node: int) -> None:
        """Start the daemon of a node again."""
        cores = ",".join(map(str, os.sched_getaffinity(self._node_pid(node))))  # as all of this node, not as this test
        command = [*self.inside(node), "taskset", "--cpu-list", cores, "slurmd"]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}  # it stays
        subprocess.run(command, env=self.environment(), check=True, timeout=60, **quiet)

    def wait_until_idle(self, timeout: float = 60) -> None:
        """Return when every node is up and without a job."""
        command = ["sinfo", "--noheader", "--partition=main", "--format=%t %D"]
        wait_for(lambda: self.run(command).stdout.split() == ["idle", str(self.nodes)], timeout, self._complaints)

    def processes(self) -> list[int]:
        """Pids of all processes that belong to the cluster, as seen from outside."""
        needle = f"SLURM_CONF={self.folder}/".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if needle in (entry / "environ").read_bytes() and _state(int(entry.name)) != "Z":
                        found.append(int(entry.name))
        return found

    def _login_pid(self) -> int:
        assert self._login is not None
        return next(iter(_children(self._login.pid)), 0)

    def _node_pid(self, node: int) -> int:
        """Pid, seen from here, of a node's pid 1; 0 when it is off."""
        for unshare in _children(self._login_pid()):
            with contextlib.suppress(OSError):
                if f"node{node}".encode() in Path(f"/proc/{unshare}/cmdline").read_bytes().split(b"\0"):
                    for child in _children(unshare):
                        if _state(child) != "Z":
                            return child
        return 0

    def _complaints(self) -> str:
        logs = [log for log in (self.folder / "log" / name for name in ("login.out", "slurmctld.log")) if log.exists()]
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)


def as_user(user: int | None) -> list[str]:
    """The words before a command that make it run as another user."""
    return [] if user is None else ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]


def wait_for(condition: Callable[[], object], seconds: float, what: Callable[[], str] | str = "") -> None:
    """Return when `condition()` is true; AssertionError with `what` when it is not within so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {what() if callable(what) else what}")
        time.sleep(0.1)


def _user() -> list[str]:
    return ["--user", "--map-current-user", "--keep-caps"] if os.geteuid() else []


def _children(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        yield from (int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
