"""The `slurm` section of a recipe: what is asked of the cluster, and how often a job may come back."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """What launch/slurm.py asks of the cluster. Each field is also an option: gpus_per_node is --gpus-per-node."""

    nodes: int = 1
    """Nodes of the job."""
    gpus_per_node: int | None = None
    """GPUs of each node, with one task for each. null: what the partition offers on enough nodes. 0: CPUs only."""
    tasks_per_node: int | None = None
    """Tasks on each node, only where gpus_per_node is 0; null: one."""
    cpus_per_task: int | None = None
    """CPU cores of each task; null: an equal share of the node's."""
    mem_gb: float | None = None
    """Memory of each node in GiB, 0 for all of it; null: the partition's default."""
    partition: str | None = None
    """Partition; null: the cluster's default."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have, as for sbatch: "a100&ib"."""
    time: str | None = None
    """Time limit as for sbatch: "90" minutes, "12:00:00", "2-00:00:00"; null: the partition's default."""
    comment: str | None = None
    """Comment of the job."""
    exclusive: bool = False
    """Whether the nodes are shared with no other job."""
    dependency: str | None = None
    """Jobs to wait for, as for sbatch: "afterok:123"."""
    container_image: str | None = None
    """Image for the tasks (pyxis plugin); working folder, run folder and photographs keep their paths in it."""
    python: str | None = None
    """Python of the tasks; null: the one that submits, in a container python3."""
    export: str | None = None
    """Environment that the job gets from the submitting shell, as for sbatch: "ALL,TOKEN=x"; null: all of it."""
    interface: str | None = None
    """Network interface between the nodes; null: the one that leads to the other nodes."""
    setup: list[str] = field(default_factory=list)
    """Lines of the batch script before the tasks start: "module load cuda"."""
    warning: int = 120
    """Seconds before the time limit at which training is told to save; must cover one step and one checkpoint."""
    requeues: int = 100
    """How often the job may come back in all, after time limits, preemptions and failures."""
    retries: int = 3
    """How often it may come back after failures that follow each other without a new checkpoint between them."""

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise ValueError(f"nodes must be at least 1, got {self.nodes}")
        for name in ("gpus_per_node", "warning", "requeues", "retries", "mem_gb"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must not be below 0, got {value}")
        for name in ("tasks_per_node", "cpus_per_task"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.tasks_per_node is not None and self.gpus_per_node != 0:
            raise ValueError("tasks_per_node is for gpus_per_node 0 only: each GPU gets one task")
