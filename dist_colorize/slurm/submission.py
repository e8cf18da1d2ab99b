"""A batch script for sbatch, made by submitit, and its submission.

The script runs one process per GPU (no torchrun in between); launch/comeback.sh, which is part of it, decides at its
end whether the job comes back. Nothing here runs anything on the machine that submits.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from submitit.core.core import Job
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor

from dist_colorize.errors import UserError
from dist_colorize.resources import resource
from dist_colorize.slurm.settings import SlurmConfig
from dist_colorize.slurm.task import Task

REMEDY = (
    "there is no SLURM here (sbatch and srun are not on PATH): submit on a login node of the cluster; "
    "--dry-run shows the batch script anywhere; torchrun --nproc_per_node=N -m dist_colorize.train trains here"
)


@dataclass(frozen=True)
class Submission:
    """One job, or an array of jobs, before it is submitted."""

    config: SlurmConfig
    """As partition.resolve() leaves it."""
    name: str
    """Job name."""
    folder: Path
    """Where batch script, logs, notes and code lie; on a file system that all nodes share."""
    code: Path
    """What PYTHONPATH of the tasks begins with."""
    tasks: list[Task]
    """More than one make an array."""
    runs: list[Path | None]
    """The run folder of each of `tasks`, where it has one."""
    resumes: list[str]
    """The command that resumes each of `tasks` by hand."""
    data: list[Path] = field(default_factory=list)
    """What a container must show besides the working folder and the run folders."""

    def log(self, job: str, rank: int = 0) -> Path:
        """What a task of `job` prints; that of rank 0 holds the batch script's own words too."""
        return self.folder / f"{job}_{rank}_log.out"


class _Executor(SlurmExecutor):
    """submitit's executor, which can also write a script where there is no SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def submit_all(self, tasks: list[Task]) -> list[Job[None]]:
        """Submit one job for one task, an array for several."""
        return [self.submit(tasks[0])] if len(tasks) == 1 else self.map_array(Task.__call__, tasks)

    def script(self, tasks: int) -> str:
        """The text that sbatch would get for this many jobs."""
        if tasks > 1:
            self.parameters["map_count"] = tasks
        return self._make_submission_file_text(self._submitit_command_str, uid="")


def batch_script(submission: Submission) -> str:
    """The batch script; writes nothing."""
    return _executor(submission).script(len(submission.tasks))


def submit(submission: Submission) -> list[str]:
    """Submit it; returns the id of each job. Raises UserError with sbatch's own words where the cluster refuses."""
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise UserError(REMEDY)
    words = io.StringIO()
    try:
        with _outside_of_jobs(), contextlib.redirect_stderr(words):
            return [job.job_id for job in _executor(submission).submit_all(submission.tasks)]
    except (FailedJobError, FailedSubmissionError) as error:
        said = (str(error) or words.getvalue()).strip()
        raise UserError(f"the cluster refused the job; sbatch says:\n{said}") from None


def _executor(submission: Submission) -> _Executor:
    config, folder = submission.config, submission.folder
    python = config.python or ("python3" if config.container_image else shlex.quote(sys.executable))
    # Signals that come before Python is up are ignored for some milliseconds by bash, then held by hold_signals.py.
    # PYTHONPATH is set here and not in the batch script: a container's image may have one, which would win. -P: the
    # working folder may hold another version of the package.
    start = 'trap "" TERM INT USR1 USR2; export PYTHONPATH="$0${PYTHONPATH:+:$PYTHONPATH}"; '
    start += f'exec {python} -I "$0"/dist_colorize/slurm/hold_signals.py {python} -P "$@"'
    executor = _Executor(folder, python=f"bash -c {shlex.quote(start)} {shlex.quote(str(submission.code))}")
    asked = {
        "job_name": submission.name,
        "nodes": config.nodes,
        "ntasks_per_node": config.gpus_per_node or config.tasks_per_node,
        "gpus_per_node": config.gpus_per_node or None,
        "cpus_per_task": config.cpus_per_task,
        "mem": None if config.mem_gb is None else f"{math.ceil(config.mem_gb * 1024)}M",
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "time": config.time,
        "comment": config.comment,
        "exclusive": config.exclusive or None,
        "dependency": config.dependency,
        "signal_delay_s": config.warning,
        "wckey": None,  # submitit's default is refused by clusters that account by such keys
        "stderr_to_stdout": True,
        "setup": _setup(submission),
        "teardown": ["end $?"],
        "srun_args": _srun_arguments(submission),
        # --requeue: some clusters set JobRequeue=0
        "additional_parameters": {"requeue": True, **({"export": config.export} if config.export else {})},
    }
    executor.update_parameters(**asked)
    return executor


def _setup(submission: Submission) -> list[str]:
    config = submission.config
    runs = shlex.join(str(run or "") for run in submission.runs)
    return [
        *config.setup,
        f"NOTES={shlex.quote(str(submission.folder))}",
        f"RUNS=({runs})",
        f"RESUMES=({shlex.join(submission.resumes)})",
        "RUN=${RUNS[SLURM_ARRAY_TASK_ID]} RESUME=${RESUMES[SLURM_ARRAY_TASK_ID]}  # no array: the first",
        f"REQUEUES={config.requeues}",
        f"RETRIES={config.retries}",
        "",
        resource("launch", "comeback.sh").read_text(encoding="utf-8").rstrip(),
        "",
        "begin",
    ]


def _srun_arguments(submission: Submission) -> list[str]:
    config = submission.config
    arguments = [
        # One rank that failed ends all, instead of leaving them to wait for it; post-processing waits for nobody.
        f"--kill-on-bad-exit={0 if submission.tasks[0].module.endswith('postprocess') else 1}",
        "--cpu-bind=none",  # each rank shares out the cores of the node by itself, see distributed.session
        "--export=ALL",  # what the batch script has set, also when sbatch --export named little
    ]
    if config.cpus_per_task:
        arguments.append(f"--cpus-per-task={config.cpus_per_task}")  # since 22.05 srun does not take it from sbatch
    if config.container_image:
        arguments += _container_arguments(submission, config.container_image)
    return arguments


def _container_arguments(submission: Submission, image: str) -> list[str]:
    """Options of NVIDIA's pyxis plugin: https://github.com/NVIDIA/pyxis. Folders keep their paths in the container."""
    folders = (Path.cwd(), submission.folder, submission.code, *submission.runs, *submission.data)
    shared = list(dict.fromkeys(str(path) for path in folders if path))
    for path in shared:
        if re.search(r"[,:\s]", path):
            raise UserError(f"{path}: no comma, colon or space may be in a path that a container is to see; rename it")
    return [
        f"--container-image={image}",
        "--container-mounts=" + ",".join(f"{path}:{path}" for path in shared),
        f"--container-workdir={Path.cwd()}",
    ]


@contextlib.contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Hide the variables of the job that this process is part of (salloc): sbatch would take them for options."""
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    hidden = {k: v for k, v in os.environ.items() if k.startswith(("SLURM_", "SRUN_")) and k != "SLURM_CONF"}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)
