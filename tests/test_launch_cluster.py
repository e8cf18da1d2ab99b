"""launch/slurm.py on a real SLURM cluster: however a job is cut off, it ends in the weights it should have."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from cluster import Cluster, as_user, missing, wait_for
from conftest import CHECKOUT, run_torchrun
from PIL import Image

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

TINY = [
    "model.width=0.0625",
    "data.crop=32",
    "data.threads=1",
    "train.global_batch=4",
    "train.warmup=2",
    "train.log_every=1",
    "train.precision=fp32",
    "train.validate_every=0",
    "evaluate.pictures=0",
    "checkpoint.every=1000",
    "distributed.threads=1",  # their number decides the order of sums, and this machine may have more cores than ranks
]
LAUNCHER = CHECKOUT / "launch" / "slurm.py"
CPUS = ["--gpus-per-node", "0", "--cpus-per-task", "1"]
NOBODY = 65534
LONG = "train.steps=60"
"""Long enough to be cut off in the middle, on a fast machine too."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def weights(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`weights(ranks, *overrides)`: the run folder of a run that nothing disturbs, under torchrun on this host."""
    done: dict[tuple[int, tuple[str, ...]], Path] = {}

    def undisturbed(ranks: int, *overrides: str) -> Path:
        if (ranks, overrides) not in done:
            run = tmp_path_factory.mktemp("torchrun") / "run"
            arguments = [*TINY, *overrides, f"run.dir={run}"]
            finished = run_torchrun(ranks, "-m", "dist_colorize.train", *arguments, env=environment, timeout=300)
            assert finished.returncode == 0, finished.stderr
            done[ranks, overrides] = run
        return done[ranks, overrides]

    return undisturbed


@dataclass
class Job:
    """A job that launch/slurm.py has submitted."""

    cluster: Cluster
    id: str
    run: Path
    said: str

    def scontrol(self, field: str) -> str:
        shown = self.cluster.run(["scontrol", "show", "job", "-o", self.id]).stdout
        found = re.search(rf"\b{field}=(\S+)", shown)
        return found[1] if found else ""

    @property
    def log(self) -> str:
        """What rank 0 and the batch script printed, over all starts."""
        found = re.search(r"^log: (.+_0_log\.out)", self.said, re.MULTILINE)
        assert found
        path = Path(found[1])
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def steps(self) -> int:
        """Steps that metrics.jsonl has."""
        file = self.run / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def until_steps(self, count: int) -> None:
        wait_for(lambda: self.steps >= count, 400, lambda: self.log)

    def until(self, state: str, seconds: float = 600) -> None:
        """Wait for one of the states, "A|B"."""
        try:
            wait_for(lambda: self.scontrol("JobState") in state.split("|"), seconds)
        except AssertionError:
            raise AssertionError(f"{self.scontrol('JobState')} is not {state}:\n{self.log}") from None

    def cancel(self) -> None:
        self.cluster.run(["scancel", self.id])
        self.cluster.wait_until_idle()


Launch = Callable[..., "subprocess.CompletedProcess[str]"]
Submit = Callable[..., Job]


@pytest.fixture
def launch(cluster: Cluster, environment: dict[str, str], tmp_path: Path) -> Launch:
    """`launch(*arguments)`: launch/slurm.py on the login host."""

    def start(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return cluster.run([sys.executable, str(LAUNCHER), *arguments], env=environment, cwd=tmp_path, timeout=timeout)

    return start


@pytest.fixture
def submit(cluster: Cluster, launch: Launch, tmp_path: Path) -> Iterator[Submit]:
    """`submit(*arguments)`: a tiny training on CPUs; what still runs at the end of the test is cancelled."""
    jobs: list[Job] = []

    def start(*arguments: str) -> Job:
        run = tmp_path / f"run{len(jobs)}"
        jobs.append(submitted(cluster, run, launch(*CPUS, f"run.dir={run}", *TINY, *arguments)))
        return jobs[-1]

    yield start
    for job in jobs:
        cluster.run(["scancel", job.id])
    cluster.wait_until_idle(120)


def submitted(cluster: Cluster, run: Path, done: subprocess.CompletedProcess[str]) -> Job:
    """The job that a finished launch/slurm.py tells of."""
    assert done.returncode == 0, done.stderr
    number = re.search(r"^job: (\d+)", done.stdout, re.MULTILINE)
    assert number
    return Job(cluster, number[1], run, done.stdout)


def same_weights(run: Path, other: Path) -> bool:
    ours, theirs = (torch.load(r / "checkpoints" / "latest", weights_only=True) for r in (run, other))
    return ours["step"] == theirs["step"] and all(torch.equal(v, theirs["model"][k]) for k, v in ours["model"].items())


def assert_every_step_once(run: Path, steps: int) -> None:
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == list(
        range(1, steps + 1)
    )


# ---------------------------------------------------------------- plain


def test_four_nodes_train_as_torchrun_does_on_one_host(submit: Submit, weights: Callable[..., Path]) -> None:
    job = submit("--nodes", "4", "--comment", "a comment", "train.steps=6")
    job.until("COMPLETED")
    assert same_weights(job.run, weights(4, "train.steps=6"))
    assert job.scontrol("NumNodes") == "4" and job.scontrol("NumTasks") == "4" and job.scontrol("Comment") == "a"
    # Every node takes its own name for 127.0.1.1 here: the interface was found by the route to the others.
    assert "rank 0 of 4 on node1: CPU, meets at 127.0.0.1" in job.log and "by eth0" in job.log
    assert job.log.rstrip().endswith("finished")
    # The code and the settings that ran are a copy.
    assert next(job.run.glob("slurm/*/code/dist_colorize/train.py")).exists()
    assert (job.run / "config.yaml").read_text() == next(job.run.glob("slurm/*/recipe.yaml")).read_text()


@pytest.mark.slow
def test_four_nodes_with_two_tasks_each(submit: Submit, weights: Callable[..., Path]) -> None:
    job = submit("--nodes", "4", "--tasks-per-node", "2", "train.steps=4", "train.global_batch=8")
    job.until("COMPLETED")
    assert "rank 0 of 8" in job.log and job.scontrol("NumTasks") == "8"
    assert same_weights(job.run, weights(8, "train.steps=4", "train.global_batch=8"))


def test_gpu_nodes_get_a_task_for_each_gpu(cluster: Cluster, launch: Launch) -> None:
    """The default asks for all 8 GPUs of a node and a task for each; each task then takes one of them."""
    shown = launch("--nodes", "4", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    for line in ("--gpus-per-node=8", "--ntasks-per-node=8", "--nodes=4", "--cpus-per-task=2"):
        assert f"#SBATCH {line}\n" in shown.stdout
    task = (
        "import os; from dist_colorize.slurm.task import rendezvous; r = rendezvous(os.environ);"
        "print(os.uname().nodename, r['LOCAL_RANK'], r['CUDA_VISIBLE_DEVICES'], r['LOCAL_WORLD_SIZE'], r['WORLD_SIZE'])"
    )
    options = ["--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=2"]
    told = cluster.run(["srun", *options, sys.executable, "-c", task], env={"PYTHONPATH": str(CHECKOUT)})
    assert told.returncode == 0, told.stderr
    expected = {f"node{node} {gpu} {gpu} 8 32" for node in range(1, 5) for gpu in range(8)}
    assert set(told.stdout.split("\n")) - {""} == expected


def test_a_rejected_submission_shows_the_words_of_sbatch(launch: Launch, tmp_path: Path) -> None:
    refused = launch(*CPUS, "--nodes", "40", f"run.dir={tmp_path / 'run'}", "train.global_batch=40")
    assert refused.returncode == 2
    assert "the cluster refused the job" in refused.stderr and "Node count specification invalid" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- cut off


@pytest.mark.slow
def test_a_warned_job_saves_comes_back_and_ends_in_the_same_weights(
    submit: Submit, weights: Callable[..., Path]
) -> None:
    """What the time limit does, by hand: SLURM sends USR2 some time before it."""
    job = submit("--nodes", "2", LONG)
    job.until_steps(3)
    job.cluster.run(["scancel", "--signal=USR2", job.id])
    job.until("COMPLETED")
    stopped = re.search(r"interrupted: after step (\d+) of 60", job.log)
    assert stopped and 3 <= int(stopped[1]) < 60
    assert f"step-{int(stopped[1]):08d}.pt, step {stopped[1]}" in job.log  # no step was lost
    assert job.scontrol("Restarts") == "1"
    assert re.search(r"back at work: step \d+ done [\d.]+ s after", job.log)
    assert_every_step_once(job.run, 60)
    assert same_weights(job.run, weights(2, LONG))


@pytest.mark.slow
def test_a_warning_during_evaluation(submit: Submit, tmp_path: Path) -> None:
    """Between two steps, and after the last one."""
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for number in range(400):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photographs / f"{number}.png")
    slowly = ["train.validate_every=2", f"data.val_root={photographs}", "evaluate.batch=1"]
    job = submit("--nodes", "1", "train.steps=4", *slowly)
    for times, steps in ((1, 2), (2, 4)):
        job.until_steps(steps)
        job.cluster.run(["scancel", "--signal=USR2", job.id])
        wait_for(lambda times=times: job.log.count("work is saved; requeued") == times, 60, lambda: job.log)
        assert job.log.count("interrupted: during evaluation") == times
    job.until("COMPLETED")
    assert job.scontrol("Restarts") == "2"
    assert_every_step_once(job.run, 4)
    assert [json.loads(line)["step"] for line in (job.run / "validation.jsonl").read_text().splitlines()] == [2, 4]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "code", "restarts"),
    [
        ("start", "{wait}", 1),  # no module of ours is loaded, no handler set
        ("exit", "import atexit; atexit.register(lambda: exec({wait!r}))", 0),  # registered first, so it runs last
    ],
    ids=["start", "exit"],
)
def test_a_warning_while_python_starts_or_exits(
    submit: Submit, tmp_path: Path, moment: str, code: str, restarts: int
) -> None:
    """A warned job that has not begun is requeued once; one that has finished stays finished."""
    (tmp_path / "here").mkdir()
    wait = f"import pathlib, time; pathlib.Path({str(tmp_path / moment)!r}).touch(); time.sleep(2)"
    (tmp_path / "here" / "sitecustomize.py").write_text(code.format(wait=wait))
    job = submit("--nodes", "1", "--setup", f"export PYTHONPATH={tmp_path}/here", "train.steps=3")
    wait_for((tmp_path / moment).exists, 120, lambda: job.log)
    job.cluster.run(["scancel", "--signal=USR2", job.id])
    job.until("COMPLETED")
    assert job.scontrol("Restarts") == str(restarts), job.log
    assert job.log.count("interrupted, its work is saved; requeued") == restarts
    assert_every_step_once(job.run, 3)


def _arguments(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


@pytest.mark.slow
def test_the_budget_of_requeues_ends_with_a_last_word(submit: Submit) -> None:
    job = submit("--nodes", "1", "--requeues", "0", "train.steps=100000")
    job.until_steps(2)
    job.cluster.run(["scancel", "--signal=USR2", job.id])
    job.until("FAILED")
    last = job.log.rstrip().splitlines()[-1]
    assert "its budget of 0 requeues is spent (slurm.requeues); it does not come back" in last
    assert f"run.dir={job.run}" in last


def test_a_cancelled_job_stays_cancelled(submit: Submit) -> None:
    job = submit("--nodes", "1", "train.steps=100000")
    job.until_steps(2)
    job.cancel()
    assert job.scontrol("JobState") == "CANCELLED" and job.scontrol("Restarts") == "0"
    time.sleep(7)  # longer than a requeued job waits
    assert job.scontrol("JobState") == "CANCELLED"
    assert "requeued" not in job.log


@pytest.mark.slow
def test_a_crashed_rank_comes_back(submit: Submit, weights: Callable[..., Path]) -> None:
    job = submit("--nodes", "2", LONG, "checkpoint.every=2")
    job.until_steps(5)
    rank = next(
        p for p in job.cluster.processes() if "submitit.core._submit" in _arguments(p) and "-P" in _arguments(p)
    )
    subprocess.run(["kill", "-KILL", str(rank)], check=True)
    job.until("COMPLETED")
    assert "failed with exit code 137; requeued" in job.log
    resumed = re.search(r"resuming from .*, step (\d+)", job.log)
    assert resumed and int(resumed[1]) >= 4
    assert_every_step_once(job.run, 60)
    assert same_weights(job.run, weights(2, LONG))


def test_a_job_that_cannot_work_is_not_repeated(submit: Submit, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    job = submit("--nodes", "1", f"data.root={tmp_path / 'empty'}", "train.steps=3")
    job.until("FAILED")
    assert "error: " in job.log and "it does not come back" in job.log.rstrip().splitlines()[-1]
    assert job.scontrol("Restarts") == "0"


@pytest.mark.slow
def test_the_real_time_limit(submit: Submit) -> None:
    """SLURM looks at limits every 30 s and warns up to 60 s early: of two minutes, after half a one at least."""
    job = submit("--nodes", "1", "--time", "2", "--warning", "30", "train.steps=100000")
    wait_for(lambda: "interrupted, its work is saved; requeued" in job.log, 400, lambda: job.log)
    wait_for(lambda: "back at work" in job.log, 400, lambda: job.log)
    stopped, resumed = re.search(r"after step (\d+)", job.log), re.search(r"resuming from .*, step (\d+)", job.log)
    assert stopped and resumed and stopped[1] == resumed[1]


@pytest.mark.slow
def test_a_node_that_loses_power(submit: Submit, cluster: Cluster, weights: Callable[..., Path]) -> None:
    job = submit("--nodes", "2", LONG, "checkpoint.every=2")
    job.until_steps(5)
    node = int(job.scontrol("NodeList")[-2])  # node[1-2]
    cluster.power_off(node)
    try:
        job.until("COMPLETED")
    finally:
        cluster.power_on(node)
        cluster.wait_until_idle(120)
    assert job.scontrol("Restarts") == "1"
    silence = re.search(r"back at work: step \d+ done ([\d.]+) s after the last sign of life", job.log)
    assert silence and 5 < float(silence[1]) < 200
    assert_every_step_once(job.run, 60)
    assert same_weights(job.run, weights(2, LONG))


@pytest.mark.slow
def test_a_node_that_loses_its_slurmd(submit: Submit, cluster: Cluster) -> None:
    """SLURM gives the node up and starts the job elsewhere; the tasks that still run on it must not go on writing."""
    job = submit("--nodes", "1", "train.steps=100000", "checkpoint.every=5")
    job.until_steps(6)
    node = int(job.scontrol("NodeList")[-1])
    cluster.kill_slurmd(node)
    try:
        wait_for(lambda: "start 1 of this job has taken over; start 0 leaves" in job.log, 400, lambda: job.log)
        wait_for(lambda: "back at work" in job.log, 400, lambda: job.log)
        assert job.scontrol("NodeList") != f"node{node}"
        cluster.run(["scancel", job.id])
    finally:
        cluster.restart_slurmd(node)
        cluster.wait_until_idle(120)


def preempt(cluster: Cluster, nodes: int) -> None:
    """A job of a higher partition takes so many nodes for some seconds."""
    wanted = ["--partition=high", f"--nodes={nodes}", "--exclusive", "--output=/dev/null"]
    high = cluster.run(["sbatch", *wanted, "--wrap", "sleep 3"])
    assert high.returncode == 0, high.stderr


@pytest.mark.slow
def test_preemption_by_a_higher_partition(submit: Submit, cluster: Cluster, weights: Callable[..., Path]) -> None:
    job = submit("--nodes", "2", "--exclusive", LONG)
    job.until_steps(3)
    preempt(cluster, nodes=4)
    job.until("COMPLETED")
    assert job.scontrol("Restarts") in ("1", "2")
    stopped, resumed = re.search(r"after step (\d+)", job.log), re.search(r"resuming from .*, step (\d+)", job.log)
    assert stopped and resumed and stopped[1] == resumed[1]
    assert_every_step_once(job.run, 60)
    assert same_weights(job.run, weights(2, LONG))


@pytest.mark.slow
def test_preemption_by_sigterm_alone_of_a_job_of_another_user(
    weights: Callable[..., Path], world_readable: Path, environment: dict[str, str]
) -> None:
    """A cluster that does not know preempt_send_user_signal, and a user who is not its administrator."""
    python, path = interpreter_for(NOBODY)
    cluster_folder, work = world_readable / "slurm", world_readable / "work"
    for folder in (cluster_folder, work):
        folder.mkdir()
    work.chmod(0o777)
    run, own = work / "run", {"PYTHONPATH": path, "HOME": str(work), "XDG_CACHE_HOME": str(work / "cache")}
    with Cluster(cluster_folder, nodes=2, user_signal=False) as cluster:
        arguments = [*CPUS, "--nodes", "2", "--exclusive", f"run.dir={run}", *TINY, LONG]
        done = cluster.run([python, str(LAUNCHER), *arguments], env=environment | own, cwd=work, user=NOBODY)
        job = submitted(cluster, run, done)
        job.until_steps(3)
        preempt(cluster, nodes=2)
        job.until("COMPLETED")
        assert "interrupted, its work is saved; requeued" in job.log
        assert_every_step_once(run, 60)
        assert run.stat().st_uid == (run / "checkpoints" / "latest").stat().st_uid == NOBODY
    assert same_weights(run, weights(2, LONG))


@pytest.fixture
def world_readable() -> Iterator[Path]:
    """pytest's own folders are closed to other users."""
    folder = Path(tempfile.mkdtemp(prefix="cluster"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def interpreter_for(user: int) -> tuple[str, str]:
    """A Python that `user` may run, and a PYTHONPATH with which it has our packages; skips where there is none."""
    if os.geteuid():
        pytest.skip("only root can submit as another user")
    packages = sysconfig.get_path("purelib")
    system = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    for python, path in ((sys.executable, ""), (system, packages)):
        probe = [*as_user(user), "bash", "-c", f"PYTHONPATH={path} {python} -c 'import torch, nvidia.dali, submitit'"]
        if subprocess.run(probe, cwd=CHECKOUT, capture_output=True, timeout=120, check=False).returncode == 0:
            return python, path
    pytest.skip(f"neither {sys.executable} nor {system} can be run by user {user} with the packages of {packages}")


# ---------------------------------------------------------------- around the job


def test_a_run_folder_belongs_to_one_job(submit: Submit, launch: Launch) -> None:
    job = submit("--nodes", "1", "train.steps=100000")
    second = launch(*CPUS, f"run.dir={job.run}")
    assert second.returncode == 2
    assert f"job {job.id}" in second.stderr and f"scancel {job.id}" in second.stderr
    behind = launch("--dry-run", f"run.dir={job.run}", "--dependency", f"afterany:{job.id}")
    assert behind.returncode == 0, behind.stderr
    assert f"#SBATCH --dependency=afterany:{job.id}" in behind.stdout


@pytest.mark.slow
def test_following_shows_progress_and_ctrl_c_leaves_the_job(
    cluster: Cluster, environment: dict[str, str], tmp_path: Path
) -> None:
    run, said = tmp_path / "run", tmp_path / "said"
    launcher = [sys.executable, "-u", str(LAUNCHER), "--follow", *CPUS, f"run.dir={run}", *TINY, "train.steps=100000"]
    # A shell without job control starts what it puts into the background, this test perhaps, deaf to Ctrl-C.
    command = [*cluster.inside(cwd=tmp_path), "env", "--default-signal=INT", *launcher]
    with open(said, "w") as output:
        follower = subprocess.Popen(
            command, env=cluster.environment(environment), stdout=output, stderr=output, start_new_session=True
        )
    try:
        wait_for(lambda: re.search(r"^train .*images/s", said.read_text(), re.MULTILINE), 200, said.read_text)
        subprocess.run(["pkill", "-INT", "--parent", str(follower.pid)], check=True)
        assert follower.wait(30) == 75
    finally:
        subprocess.run(["pkill", "-KILL", "--parent", str(follower.pid)], check=False)
        follower.wait(30)
        job = re.search(r"^job: (\d+)", said.read_text(), re.MULTILINE)
        state = cluster.run(["squeue", "-h", "-j", job[1], "-o", "%T"]).stdout if job else ""
        cluster.run(["scancel", job[1] if job else "--state=PENDING"])
        cluster.wait_until_idle(120)
    assert job and f"job {job[1]}: RUNNING" in said.read_text()
    assert f"the job goes on. To stop it: scancel {job[1]}" in said.read_text()
    assert state.strip() == "RUNNING"


@pytest.mark.slow
def test_a_sweep_is_an_array_with_a_run_for_each_combination(cluster: Cluster, launch: Launch, tmp_path: Path) -> None:
    sweep = ["--sweep", "train.lr=1e-3,3e-4", "loss.rebalance=0.25"]
    done = launch(*CPUS, *TINY, "train.steps=3", f"run.root={tmp_path}", "--follow", *sweep, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("COMPLETED") == 2
    runs = sorted(tmp_path.glob("*/0*"))
    assert [run.name for run in runs] == ["000-lr=1e-3-rebalance=0.25", "001-lr=3e-4-rebalance=0.25"]
    assert (
        "lr: 0.001" in (runs[0] / "config.yaml").read_text() and "lr: 0.0003" in (runs[1] / "config.yaml").read_text()
    )
    assert all((run / "evaluation.json").exists() for run in runs)
    compare = [sys.executable, "-m", "dist_colorize.runs", "compare", *map(str, runs)]
    compared = subprocess.run(compare, cwd=CHECKOUT, capture_output=True, text=True, timeout=120, check=True).stdout
    assert re.search(r"train\.lr +0\.001 +0\.0003", compared), compared
    assert "slurm" not in compared and "run.dir" not in compared


@pytest.mark.slow
def test_evaluation_and_post_processing_are_shared_out(
    launch: Launch, weights: Callable[..., Path], tmp_path: Path
) -> None:
    run = weights(2, LONG)
    before = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").unlink()
    two = [*CPUS, "--nodes", "2", "--follow", f"run.root={tmp_path}", "--job"]
    evaluation = launch(*two, "evaluate", str(run), timeout=900)
    assert evaluation.returncode == 0, evaluation.stdout + evaluation.stderr
    after = json.loads((run / "evaluation.json").read_text())
    assert after["scores"]["final"]["psnr"] == pytest.approx(before["scores"]["final"]["psnr"], rel=1e-6)
    output = tmp_path / "out"
    post = launch(*two, "postprocess", "--checkpoint", str(run), "--output", str(output), "--size", "32", timeout=900)
    assert post.returncode == 0, post.stdout + post.stderr
    assert len([path for path in output.rglob("*") if path.is_file()]) == 8
    logs = sorted(tmp_path.glob("slurm-postprocess-*/*_log.out"))
    assert ["4 colorized" in log.read_text() for log in logs] == [True, True]


@pytest.mark.slow
def test_the_batch_script_for_torchrun(
    cluster: Cluster, environment: dict[str, str], weights: Callable[..., Path], tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "job.log"
    options = ["--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={log}"]
    python = {"PATH": f"{Path(sys.executable).parent}:{cluster.environment()['PATH']}", "GPUS": "0", "RANKS": "1"}
    command = ["sbatch", "--parsable", *options, "launch/torchrun.sbatch", *TINY, LONG, f"run.dir={run}"]
    sent = cluster.run(command, env=environment | python, cwd=CHECKOUT)
    assert sent.returncode == 0, sent.stderr
    job = Job(cluster, sent.stdout.strip(), run, f"log: {tmp_path}/x_0_log.out")
    wait_for(lambda: job.steps >= 3, 600, lambda: log.read_text() if log.exists() else "")
    cluster.run(["scancel", "--signal=USR2", job.id])
    wait_for(lambda: job.scontrol("JobState") in ("COMPLETED", "FAILED"), 600, lambda: log.read_text())
    assert "interrupted, its work is saved; requeued" in log.read_text()
    assert job.scontrol("JobState") == "COMPLETED"
    assert_every_step_once(run, 60)
    assert same_weights(run, weights(2, LONG))


def test_teardown_leaves_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Twice in a row, with a job at work."""
    for _ in range(2):
        with Cluster(tmp_path_factory.mktemp("slurm"), nodes=2) as small:
            assert small.run(["sbatch", "--nodes=2", "--output=/dev/null", "--wrap", "srun sleep 1000"]).returncode == 0
            wait_for(lambda: "sleep" in "".join(map(_arguments, small.processes())), 30)
        assert small.processes() == []
    links = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    assert "v-node" not in links and "bridge" not in links
