"""Pid 1 of the login host and of the nodes of a cluster for tests; started by cluster.Cluster, standard library only.

python namespaces.py login FOLDER       # in new network, UTS, mount, PID and IPC namespaces
python namespaces.py node FOLDER nodeN  # in such namespaces below those of the login host
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

LOGIN = "10.77.0.254"


def do(*command: str) -> None:
    subprocess.run(command, check=True)


def start(folder: Path, name: str, *command: str) -> subprocess.Popen[bytes]:
    """Start a program that stays, with its output in a log."""
    with open(folder / "log" / f"{name}.out", "ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def login(folder: Path) -> None:
    # Everything ends when the test process has gone, however it went: its end of the pipe closes then.
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(0)), daemon=True).start()
    do("mount", "--bind", str(folder / "etc" / "hosts.login"), "/etc/hosts")
    do("hostname", "login")
    do("ip", "link", "set", "lo", "up")
    do("ip", "link", "add", "bridge", "type", "bridge")
    do("ip", "address", "add", f"{LOGIN}/24", "dev", "bridge")
    do("ip", "link", "set", "bridge", "up")
    munge = folder / "munge"
    files = [f"--{kind}-file={munge}/munge.{kind}" for kind in ("key", "pid", "seed")]
    log = f"--log-file={munge}/munge.log"
    start(folder, "munged", "munged", "-F", f"--socket={munge}/munge.socket", *files, log, "--num-threads=4", "--force")
    while not (munge / "munge.socket").exists():
        time.sleep(0.01)
    start(folder, "slurmctld", "slurmctld", "-D", "-c")
    for number in range(1, int((folder / "etc" / "nodes").read_text()) + 1):
        boot(folder, f"node{number}")
    (folder / "run" / "login.ready").touch()
    while True:
        for wish in (folder / "run").glob("node*.boot"):
            wish.unlink()
            boot(folder, wish.stem)
        reap()
        time.sleep(0.1)


def boot(folder: Path, name: str) -> None:
    """Start a node, and plug its network in."""
    go = folder / "run" / f"{name}.go"
    go.unlink(missing_ok=True)
    port, namespaces = f"v-{name}", ["--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc"]
    subprocess.run(["ip", "link", "delete", port], stderr=subprocess.DEVNULL, check=False)  # of before the power loss
    below = ["unshare", *namespaces, "--kill-child=SIGKILL", sys.executable, "-I", __file__, "node", str(folder), name]
    unshare = start(folder, name, *below)
    children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children")
    while not children.read_text().split():
        time.sleep(0.005)
    do(
        *("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns"),
        children.read_text().split()[0],
    )
    do("ip", "link", "set", port, "master", "bridge", "up")
    go.touch()


def node(folder: Path, name: str) -> None:
    # One core of the machine for each node, so that ranks do not fight for all of them.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(name.removeprefix("node")) % len(cores)]})
    do("hostname", name)
    do("mount", "--bind", str(folder / "etc" / f"hosts.{name}"), "/etc/hosts")
    while not (folder / "run" / f"{name}.go").exists():
        time.sleep(0.01)
    address = LOGIN.rpartition(".")[0] + "." + name.removeprefix("node")
    do("ip", "link", "set", "lo", "up")
    do("ip", "address", "add", f"{address}/24", "dev", "eth0")
    do("ip", "link", "set", "eth0", "up")
    start(folder, f"slurmd.{name}", "slurmd", "-D")
    while True:
        reap()
        time.sleep(0.1)


def reap() -> None:
    """The duty of pid 1: processes whose parents have gone end here."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if sys.argv[1] == "login":
        login(Path(sys.argv[2]))
    else:
        node(Path(sys.argv[2]), sys.argv[3])
