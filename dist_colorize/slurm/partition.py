"""What a partition of the cluster offers: GPUs and CPU cores per node, as sinfo tells it."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, replace

from dist_colorize.errors import UserError
from dist_colorize.slurm.settings import SlurmConfig

USUAL_GPUS = 8
"""GPUs per node where the cluster cannot be asked."""


@dataclass(frozen=True)
class Node:
    """The size of one node."""

    cpus: int
    gpus: int


def resolve(config: SlurmConfig) -> SlurmConfig:
    """`config` with gpus_per_node, tasks_per_node and cpus_per_task filled in from what the partition offers."""
    nodes = offered(config.partition)
    gpus = config.gpus_per_node
    if gpus is None:
        gpus = USUAL_GPUS if nodes is None else common_gpus(nodes, config)
    per_node = gpus or config.tasks_per_node or 1
    cpus = config.cpus_per_task
    if cpus is None and nodes:
        # The smallest of the nodes that the job can get; the cluster's default of one core starves the data pipeline.
        cpus = max(1, min((n.cpus for n in nodes if n.gpus >= gpus), default=1) // per_node)
    return replace(config, gpus_per_node=gpus, tasks_per_node=None if gpus else per_node, cpus_per_task=cpus)


def tasks(config: SlurmConfig) -> int:
    """Tasks of the job in all, of a config that `resolve` has filled in."""
    return config.nodes * (config.gpus_per_node or config.tasks_per_node or 1)


def common_gpus(nodes: list[Node], config: SlurmConfig) -> int:
    """The largest number of GPUs that enough nodes of the partition have."""
    counts = sorted((n.gpus for n in nodes), reverse=True)
    if len(counts) < config.nodes:
        raise UserError(
            f"--nodes {config.nodes}: {_name(config.partition)} has {len(counts)}; ask for fewer or another --partition"
        )
    if counts[config.nodes - 1] == 0:
        raise UserError(
            f"{_name(config.partition)} offers GPUs on {sum(c > 0 for c in counts)} of the {config.nodes} nodes asked "
            "for; --gpus-per-node 0 trains on CPUs, --partition names another partition (see sinfo)"
        )
    return counts[config.nodes - 1]


def offered(partition: str | None) -> list[Node] | None:
    """The nodes of a partition (None: the default one); None where there is no SLURM, or no such partition."""
    if shutil.which("sinfo") is None:
        return None
    command = ["sinfo", "-h", "-N", "-o", "%P|%c|%G", *(["-p", partition] if partition else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:  # without a slurm.conf it looks for the cluster in the DNS
        return None
    if done.returncode:
        return None
    rows = [line.split("|") for line in done.stdout.splitlines() if line.count("|") == 2]
    # the default partition has a star behind its name
    nodes = [Node(int(cpus.rstrip("+")), gpus_of(gres)) for name, cpus, gres in rows if partition or name[-1:] == "*"]
    return nodes or None


def gpus_of(gres: str) -> int:
    """GPUs in a GRES text of sinfo: "gpu:a100:4(S:0-1),gpu:h100:4,nvme:1" has 8."""
    bare = re.sub(r"\([^)]*\)", "", gres)
    return sum(int(m[1]) for part in bare.split(",") if (m := re.fullmatch(r"gpu(?::[^:]+)*?(?::(\d+))", part)))


def _name(partition: str | None) -> str:
    return f"partition {partition}" if partition else "the default partition"
