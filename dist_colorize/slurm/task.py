"""What each task of a job does: find its place among the others, run a command of this package, leave with its code.

submitit loads a pickled Task in every process that srun starts and calls it. hold_signals.py has run before.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dist_colorize.errors import OK, run_command
from dist_colorize.slurm.network import address_of, interface_towards

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
OWNER_SECONDS = 5.0
"""How often rank 0 looks whether its job has been started anew elsewhere."""


@dataclass(frozen=True)
class Task:
    """One command of the package, started once per task of the job."""

    module: str
    """dist_colorize.train, .evaluate or .postprocess."""
    arguments: tuple[str, ...]
    notes: str
    """Folder of the submission; `<job>.owner` in it names the start of the job that may write results."""
    interface: str | None

    def __call__(self) -> None:
        """Return when the command finished; leave with its exit code when it did not."""
        # submitit has put its own handlers in place, which would leave one rank without the others. The signals stay
        # held until the command takes them up; one that comes after that is too late to change anything.
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: None)
        environment = rendezvous(os.environ, self.interface)
        os.environ.update(environment)
        print(describe(os.environ), flush=True)
        if environment["RANK"] == "0":
            threading.Thread(target=_leave_when_replaced, args=(Path(self.notes),), daemon=True).start()
        # postprocess is a package whose command is its __main__
        name = f"{self.module}.__main__" if self.module.endswith(".postprocess") else self.module
        try:
            command = importlib.import_module(name).main
            run_command(lambda: command(list(self.arguments)))
        except SystemExit as end:
            if end.code != OK:
                raise
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def rendezvous(environment: Mapping[str, str], interface: str | None = None) -> dict[str, str]:
    """What torch.distributed needs to know, from the variables that srun sets for a task.

    MASTER_PORT is chosen by the batch script, on the node where rank 0 will listen. Variables that name an interface
    and are set already stay as they are, unless `interface` is given.
    """
    size, nodes = int(environment["SLURM_NTASKS"]), int(environment["SLURM_JOB_NUM_NODES"])
    local = int(environment["SLURM_LOCALID"])
    names = hostnames(environment["SLURM_JOB_NODELIST"])
    found = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(size // nodes),
    }
    if nodes == 1:
        found["MASTER_ADDR"] = "127.0.0.1"
        found["GLOO_SOCKET_IFNAME"] = interface or environment.get("GLOO_SOCKET_IFNAME", "lo")
    else:
        first, mine = names[0], int(environment["SLURM_NODEID"])
        launched_at = environment.get("SLURM_LAUNCH_NODE_IPADDR", first)  # of srun, which runs on the first node
        found["MASTER_ADDR"] = "127.0.0.1" if mine == 0 else address_of(first) or launched_at
        peer = address_of(names[1]) if mine == 0 else found["MASTER_ADDR"]
        route = interface or (interface_towards(peer) if peer else None)
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            if route and (interface or name not in environment):
                found[name] = route
    visible = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    if len(visible) > 1:  # srun shows every task all GPUs of the job on this node; each task takes its own
        found["CUDA_VISIBLE_DEVICES"] = visible[local % len(visible)]
    return found


def hostnames(nodelist: str) -> list[str]:
    """The names in SLURM's short form of a list, "node[1-3,7]"."""
    from submitit.slurm.slurm import _parse_node_list

    names: list[str] = _parse_node_list(nodelist)
    return names


def describe(environment: Mapping[str, str]) -> str:
    """One line that says who this task is."""
    gpu = environment.get("CUDA_VISIBLE_DEVICES", "")
    return (
        f"rank {environment['RANK']} of {environment['WORLD_SIZE']} on {socket.gethostname()}: "
        f"{f'GPU {gpu}' if gpu else 'CPU'}, meets at {environment['MASTER_ADDR']}:{environment.get('MASTER_PORT', '')}"
        f" by {environment.get('GLOO_SOCKET_IFNAME', 'the default interface')}, "
        f"start {environment.get('SLURM_RESTART_COUNT', '0')} of job {environment['SLURM_JOB_ID']}"
    )


def _leave_when_replaced(notes: Path) -> None:
    """End this process when its job runs elsewhere by now: a node that lost its slurmd is given up, its tasks go on."""
    me = os.environ.get("SLURM_RESTART_COUNT", "0")
    owner = notes / f"{os.environ['SLURM_JOB_ID']}.owner"
    while True:
        time.sleep(OWNER_SECONDS)
        try:
            now = owner.read_text().strip()
        except OSError:
            continue
        if now and now != me:
            print(f"error: start {now} of this job has taken over; start {me} leaves", file=sys.stderr, flush=True)
            os._exit(1)
