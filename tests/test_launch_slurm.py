"""launch/slurm.py and its parts where no SLURM is needed: plans, scripts, refusals, and the logic of coming back."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
from conftest import CHECKOUT
from hypothesis import given
from hypothesis import strategies as st

from dist_colorize import config
from dist_colorize.errors import RunFailed, UserError, run_command
from dist_colorize.recipe import Recipe
from dist_colorize.slurm import follow, network, partition, snapshot, sweep
from dist_colorize.slurm.partition import Node, gpus_of, resolve
from dist_colorize.slurm.settings import SlurmConfig
from dist_colorize.slurm.snapshot import take_snapshot
from dist_colorize.slurm.submission import Submission, batch_script, submit
from dist_colorize.slurm.task import Task, rendezvous

BASH = str(shutil.which("bash"))
Launch = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def launch(
    launcher: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Launch:
    """launch/slurm.py in this process, on a laptop: no SLURM on PATH."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.chdir(tmp_path)

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            run_command(lambda: launcher.main(arguments))
        said = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, int(left.value.code or 0), said.out, said.err)

    return start


@pytest.fixture(scope="module")
def launcher() -> ModuleType:
    """launch/slurm.py, which is a script and in no package of the checkout."""
    spec = importlib.util.spec_from_file_location("launch_slurm", CHECKOUT / "launch" / "slurm.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def submission(tmp_path: Path, settings: SlurmConfig | None = None, count: int = 1) -> Submission:
    tasks = [Task("dist_colorize.train", ("train.steps=3",), str(tmp_path), None)] * count
    runs: list[Path | None] = [tmp_path / f"run {i}" for i in range(count)]
    resumes = [f"resume {i}" for i in range(count)]
    return Submission(
        settings or SlurmConfig(gpus_per_node=2), "name", tmp_path, tmp_path / "code", tasks, runs, resumes
    )


# ---------------------------------------------------------------- the command


def test_a_dry_run_needs_no_slurm_and_writes_nothing(launch: Launch, tmp_path: Path) -> None:
    done = launch("--nodes", "4", "--time", "12:00:00", "train.lr=1e-4", "--setup", "module load x", "--dry-run")
    assert done.returncode == 0, done.stderr
    for line in ("--nodes=4", "--gpus-per-node=8", "--ntasks-per-node=8", "--time=12:00:00", "--signal=USR2@120"):
        assert f"#SBATCH {line}\n" in done.stdout
    assert "\nmodule load x\n" in done.stdout
    assert "each of 32 tasks runs:\n#   python -m dist_colorize.train --config" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["bin"]
    assert subprocess.run([BASH, "-n"], input=done.stdout, text=True, check=False).returncode == 0


def test_the_command_runs_from_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, str(CHECKOUT / "launch" / "slurm.py"), "--dry-run", "--gpus-per-node", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(rf" {tmp_path}/runs/\S+/code -u -m submitit", done.stdout)
    checkout = subprocess.run(
        [*command, "--no-snapshot"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True
    )
    assert f" {CHECKOUT} -u -m submitit" in checkout.stdout


def test_without_slurm_nothing_runs_and_the_remedy_is_named(launch: Launch, tmp_path: Path) -> None:
    done = launch("--nodes", "4")
    assert done.returncode == 2
    assert "there is no SLURM here" in done.stderr and "--dry-run" in done.stderr and "torchrun" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["bin"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train.stps=3"], "did you mean train.steps?"),
        (["--nodes", "0"], "slurm.nodes must be at least 1, got 0"),
        (["--nodes", "many"], "slurm.nodes must be a whole number"),
        (["--nodes", "3", "--gpus-per-node", "0", "train.global_batch=4"], "cannot be shared by 3 ranks"),
        (["--tasks-per-node", "2"], "tasks_per_node is for gpus_per_node 0 only"),
        (["--sweep", "train.lr"], "write key=value,value"),
    ],
)
def test_mistakes_are_named_before_the_queue(launch: Launch, arguments: list[str], words: str) -> None:
    done = launch("--dry-run", *arguments)
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr


def test_every_option_is_a_field_of_the_slurm_section(launch: Launch, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "slurm:\n  nodes: 2\n  gpus_per_node: 4\n  partition: p\n  account: a\n  qos: q\n  constraint: c\n"
        "  comment: two words\n  exclusive: true\n  mem_gb: 10\n  export: NONE\n  setup: [source env]\n"
        "train:\n  global_batch: 8\n"
    )
    from_file = launch("--dry-run", "--config", str(recipe))
    options = "--nodes 2 --gpus-per-node 4 --partition p --account a --qos q --constraint c --comment 'two words' "
    options += "--exclusive --mem-gb 10 --export NONE --setup 'source env' train.global_batch=8"
    from_options = launch("--dry-run", *shlex.split(options))
    assert from_file.returncode == from_options.returncode == 0, from_file.stderr + from_options.stderr
    lines = [line for line in from_file.stdout.splitlines() if line.startswith("#SBATCH") and "/" not in line]
    assert set(lines) - {"#SBATCH --job-name=colorize"} <= set(from_options.stdout.splitlines())
    for option in ("--partition=p", "--account=a", "--qos=q", "--constraint=c", "--exclusive", "--mem=10240M"):
        assert f"#SBATCH {option}" in lines
    assert "#SBATCH --comment='two words'" in lines and "#SBATCH --export=NONE" in lines


def test_other_commands_and_arrays(launch: Launch) -> None:
    evaluation = launch("--dry-run", "--nodes", "2", "--job", "evaluate", "runs/RUN", "evaluate.preset=blend")
    assert "16 tasks runs:\n#   python -m dist_colorize.evaluate runs/RUN evaluate.preset=blend" in evaluation.stdout
    post = launch("--dry-run", "--job", "postprocess", "--checkpoint", "runs/RUN", "in", "--output", "out")
    assert "python -m dist_colorize.postprocess --checkpoint runs/RUN in --output out" in post.stdout
    assert "--kill-on-bad-exit=0" in post.stdout
    swept = launch("--dry-run", "--sweep", "train.lr=1e-3,3e-4", "loss.rebalance=0.25,0.5")
    assert "#SBATCH --array=0-3%4" in swept.stdout and swept.stdout.count("#   python -m dist_colorize.train") == 4


# ---------------------------------------------------------------- parts


def test_the_batch_script_quotes_what_the_shell_would_split(tmp_path: Path) -> None:
    folder = tmp_path / "a b'c"
    script = batch_script(submission(folder, count=2))
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    lines = script.splitlines()
    start, stop = lines.index(next(x for x in lines if x.startswith("NOTES="))), lines.index("REQUEUES=100")
    shell = "\n".join([*lines[start:stop], 'echo "$NOTES|$RUN|$RESUME"'])
    told = subprocess.run(
        ["bash", "-c", shell], env={"SLURM_ARRAY_TASK_ID": "1"}, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == f"{folder}|{folder}/run 1|resume 1"


def test_submitting_without_slurm_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no SLURM here"):
        submit(submission(tmp_path))


PYXIS_SRUN = """#!{python} -I
# srun with the pyxis plugin, as far as its options go: see args.c of NVIDIA/pyxis
import json, os, sys
KNOWN = {{"unbuffered", "output", "kill-on-bad-exit", "cpu-bind", "export", "cpus-per-task"}}
KNOWN |= {{"container-image", "container-mounts", "container-workdir"}}
words, options = sys.argv[1:], {{}}
while words[0].startswith("--"):
    name, equals, value = words.pop(0)[2:].partition("=")
    options[name] = value if equals or name == "unbuffered" else words.pop(0)
assert options.keys() <= KNOWN, options.keys() - KNOWN
mounts = [mount.split(":") for mount in options["container-mounts"].split(",")]
assert all(len(mount) == 2 and mount[0][0] == mount[1][0] == "/" for mount in mounts), mounts
with open({told!r}, "w") as file:
    json.dump([options["container-image"], options["container-workdir"], mounts], file)
os.environ["PYTHONPATH"] = "/in/the/image"  # what an image sets takes precedence
os.execvp(words[0], words)
"""


def test_a_container_gets_what_pyxis_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch script itself, with an srun that reads options as the plugin does, and a Python that only reports."""
    work, data, told = tmp_path / "work", tmp_path / "photographs", tmp_path / "told"
    for folder in (work, data, tmp_path / "bin"):
        folder.mkdir()
    monkeypatch.chdir(work)
    programs = {
        "srun": PYXIS_SRUN.format(python=sys.executable, told=str(told)),
        "python3": f'#!/bin/bash\necho "$PYTHONPATH $*" > {tmp_path}/started\n',
        "squeue": "#!/bin/bash\n",
    }
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    settings = SlurmConfig(gpus_per_node=1, cpus_per_task=2, container_image="nvcr#nvidia/pytorch:24.01-py3")
    job = submission(tmp_path / "job", settings)
    (tmp_path / "job").mkdir()
    job = dataclasses.replace(job, runs=[tmp_path / "run"], data=[data])
    script = batch_script(job)
    assert sys.executable not in script
    env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "PYTHONPATH": "/of/the/host"}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=False)
    image, workdir, mounts = json.loads(told.read_text())
    assert (image, workdir) == ("nvcr#nvidia/pytorch:24.01-py3", str(work)), done.stderr
    expected = [work, tmp_path / "job", tmp_path / "job" / "code", tmp_path / "run", data]
    assert mounts == [[str(path), str(path)] for path in expected]
    path, *words = (tmp_path / "started").read_text().split()
    assert path == f"{tmp_path}/job/code:/in/the/image"
    hold = f"{tmp_path}/job/code/dist_colorize/slurm/hold_signals.py"
    assert words[:6] == ["-I", hold, "python3", "-P", "-u", "-m"] and words[6].startswith("submitit")


@pytest.mark.parametrize("name", ["a,b", "a:b", "a b"])
def test_paths_that_a_container_cannot_see_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="no comma, colon or space"):
        batch_script(submission(tmp_path / name, SlurmConfig(gpus_per_node=1, container_image="x.sqsh")))


@pytest.mark.parametrize(
    ("gres", "count"),
    [("gpu:8", 8), ("gpu:a100:8(S:0-1)", 8), ("(null)", 0), ("gpu:a:4(S:0),gpu:b:2(S:1),nvme:9", 6), ("nvme:1", 0)],
)
def test_gpus_of_gres(gres: str, count: int) -> None:
    assert gpus_of(gres) == count


def test_what_a_partition_offers_fills_the_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [Node(64, 8), Node(96, 8), Node(32, 4), Node(128, 0)]
    monkeypatch.setattr(partition, "offered", lambda name: nodes)
    two, three = resolve(SlurmConfig(nodes=2)), resolve(SlurmConfig(nodes=3))
    assert (two.gpus_per_node, two.cpus_per_task) == (8, 8)
    assert (three.gpus_per_node, three.cpus_per_task) == (4, 8)  # the third has 4; the smallest core count is 32
    cpu = resolve(SlurmConfig(nodes=4, gpus_per_node=0))
    assert (cpu.gpus_per_node, cpu.tasks_per_node, cpu.cpus_per_task) == (0, 1, 32)
    with pytest.raises(UserError, match="--gpus-per-node 0 trains on CPUs"):
        resolve(SlurmConfig(nodes=4))
    with pytest.raises(UserError, match="has 4"):
        resolve(SlurmConfig(nodes=5))
    monkeypatch.setattr(partition, "offered", lambda name: None)
    assert resolve(SlurmConfig(nodes=5)).gpus_per_node == 8


def test_a_recipe_keeps_its_slurm_section(tmp_path: Path) -> None:
    recipe = config.build(Recipe, {"slurm": {"nodes": 4, "time": "90", "setup": ["a: b"]}}, "test")
    (tmp_path / "recipe.yaml").write_text(config.dump(recipe))
    assert config.load(Recipe, tmp_path / "recipe.yaml") == recipe


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True), min_size=1, max_size=3))
def test_a_sweep_has_every_combination_once(values: list[list[int]]) -> None:
    axes = [f"train.key{i}={','.join(map(str, axis))}" for i, axis in enumerate(values)]
    runs = sweep.combinations(axes)
    expected = 1
    for axis in values:
        expected *= len(axis)
    assert len({tuple(run) for run in runs}) == len(runs) == expected
    assert len({sweep.folder_name(i, run) for i, run in enumerate(runs)}) == expected


def test_commas_within_brackets_belong_to_a_value() -> None:
    assert sweep.combinations(["data.scale=[0.1,1],[0.5,1]"]) == [["data.scale=[0.1,1]"], ["data.scale=[0.5,1]"]]
    for axes in (["a=1,1"], ["a=1,"], ["=1"], ["a=1", "a=2"]):
        with pytest.raises(UserError, match="--sweep"):
            sweep.combinations(axes)


def test_the_snapshot_runs_by_itself(tmp_path: Path) -> None:
    code = take_snapshot(tmp_path / "code")
    probe = "import dist_colorize.slurm.task; from dist_colorize.resources import resource as r;"
    probe += "print(r('configs', 'quickstart.yaml'), r('kernels'), r('launch', 'comeback.sh'))"
    env = {**os.environ, "PYTHONPATH": str(code)}
    told = subprocess.run(
        [sys.executable, "-P", "-c", probe], cwd=CHECKOUT, env=env, capture_output=True, text=True, check=True
    )
    assert all(path.startswith(str(code)) and Path(path).exists() for path in told.stdout.split())


def test_the_snapshot_has_what_numba_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    (package / "__pycache__").mkdir(parents=True)
    for name in ("a.py", "__pycache__/a.f-1.py311.nbi", "__pycache__/a.f-1.py311.1.nbc", "__pycache__/a.pyc", ".b"):
        (package / name).touch()
    monkeypatch.setattr(snapshot, "PACKAGE", package)
    copy = take_snapshot(tmp_path / "code") / "package"
    found = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    assert found == {"a.py", "__pycache__/a.f-1.py311.nbi", "__pycache__/a.f-1.py311.1.nbc"}
    assert (copy / "a.py").stat().st_mtime_ns == (package / "a.py").stat().st_mtime_ns  # numba asks for that


def test_the_rendezvous_of_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_colorize.slurm.task.address_of", {"n1": None, "n2": "10.0.0.2"}.get)
    monkeypatch.setattr("dist_colorize.slurm.task.interface_towards", lambda address: f"to-{address}")
    slurm = {"SLURM_NTASKS": "16", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    slurm |= {"SLURM_PROCID": "11", "SLURM_LOCALID": "3", "SLURM_NODEID": "1", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}
    slurm |= {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", "NCCL_SOCKET_IFNAME": "ib0"}
    found = rendezvous(slurm)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"]) == (
        "11",
        "16",
        "3",
        "8",
    )
    assert found["MASTER_ADDR"] == "10.0.0.1"  # n1 has no address here but 127.0.1.1
    assert found["GLOO_SOCKET_IFNAME"] == "to-10.0.0.1" and "NCCL_SOCKET_IFNAME" not in found  # the user's stays
    assert found["CUDA_VISIBLE_DEVICES"] == "3"
    assert rendezvous(slurm, "eth7")["NCCL_SOCKET_IFNAME"] == "eth7"
    first = rendezvous({**slurm, "SLURM_NODEID": "0"})
    assert first["MASTER_ADDR"] == "127.0.0.1" and first["GLOO_SOCKET_IFNAME"] == "to-10.0.0.2"
    alone = rendezvous({**slurm, "SLURM_JOB_NUM_NODES": "1", "CUDA_VISIBLE_DEVICES": "5"})
    assert alone["GLOO_SOCKET_IFNAME"] == "lo" and "CUDA_VISIBLE_DEVICES" not in alone


def test_the_interface_towards_this_machine() -> None:
    assert network.interface_towards("127.0.0.1") == "lo"
    assert network.address_of("localhost") is None and network.address_of("no-such-host.invalid") is None


def test_held_signals_wait_for_their_handler() -> None:
    """A signal between exec and the handler neither kills the process nor gets lost."""
    program = (
        "import signal, sys, time; print('up', flush=True); time.sleep(1);"
        "signal.signal(signal.SIGUSR2, lambda *_: print('seen', flush=True));"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2}); time.sleep(0.1)"
    )
    hold = CHECKOUT / "dist_colorize" / "slurm" / "hold_signals.py"
    command = [sys.executable, "-I", str(hold), sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGUSR2)
        assert process.stdout.read() == "seen\n"
    assert process.returncode == 0


def test_following_reads_states_and_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, said = tmp_path / "log", []
    states = iter(["PENDING", "RUNNING", "RUNNING", "COMPLETED"])

    def state_of(job: str) -> follow.State:
        name = next(states)
        if name == "RUNNING":
            with open(log, "a") as file:
                file.write("half a " if not log.stat().st_size else "line\nand ")
        return follow.State(name)

    monkeypatch.setattr(follow, "state_of", state_of)
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.01)
    last = follow.follow({"7": log}, said.append)
    assert last["7"].name == "COMPLETED"
    assert said == ["job 7: PENDING\n", "job 7: RUNNING\n", "half a line\n", "job 7: COMPLETED\n"]


def test_following_waits_for_a_controller_that_restarts_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = iter([None, follow.State("RUNNING"), None, None, follow.State("COMPLETED")])
    monkeypatch.setattr(follow, "state_of", lambda job: next(states))
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.01)
    said: list[str] = []
    assert follow.follow({"7": tmp_path / "log"}, said.append)["7"].name == "COMPLETED"
    assert said == ["job 7: RUNNING\n", "job 7: COMPLETED\n"]
    monkeypatch.setattr(follow, "state_of", lambda job: None)
    monkeypatch.setattr(follow, "SILENT_SECONDS", 0.05)
    with pytest.raises(RunFailed, match=r"the cluster has not answered.*squeue -j 7"):
        follow.follow({"7": tmp_path / "log"}, said.append)


@pytest.mark.parametrize(
    ("scontrol", "sacct", "expected"),
    [
        ("echo JobId=7 JobState=RUNNING Reason=None Restarts=2", "exit 1", "RUNNING (came back 2 times)"),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "echo COMPLETED", "COMPLETED"),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "exit 1", "GONE"),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", "exit 1", "None"),
    ],
)
def test_what_the_cluster_says_of_a_job(
    scontrol: str, sacct: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("scontrol", scontrol), ("sacct", sacct)):
        (tmp_path / name).write_text(f"#!{BASH}\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert str(follow.state_of("7")) == expected


# ---------------------------------------------------------------- coming back


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., tuple[str, int, str]]:
    """`script(code)`: a batch script whose tasks leave with `code`; its words, its exit code, what was requeued."""

    def start(
        code: int | str,
        state: str = "RUNNING",
        restarts: int = 0,
        requeues: int = 5,
        retries: int = 1,
        run: str | None = None,
        more: Sequence[str] = (),
        down: str = "",
    ) -> tuple[str, int, str]:
        bin_, notes = tmp_path / "bin", tmp_path / "notes"
        for folder in (bin_, notes, tmp_path / "run" / "checkpoints"):
            folder.mkdir(parents=True, exist_ok=True)
        (tmp_path / "requeued").write_text("")
        for name, text in (("squeue", f"echo {state}"), ("scontrol", f'echo "$@" >> {tmp_path}/requeued')):
            (bin_ / name).write_text(f"#!/bin/bash\n{down}{text}\n")
            (bin_ / name).chmod(0o755)
        (bin_ / "sleep").write_text("#!/bin/bash\n")
        (bin_ / "sleep").chmod(0o755)
        lines = [
            f"NOTES={notes}",
            f"RUN={f'{tmp_path}/run' if run is None else run}",
            "RESUME='do this'",
            f"REQUEUES={requeues}",
        ]
        lines += [f"RETRIES={retries}", f"source {CHECKOUT}/launch/comeback.sh", "begin"]
        lines += ["echo port $MASTER_PORT", f"(exit {code})" if isinstance(code, int) else code, "end $?"]
        env = {"PATH": f"{bin_}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": str(restarts)}
        env |= dict(word.split("=") for word in more)
        done = subprocess.run(["bash", "-c", "\n".join(lines)], env=env, capture_output=True, text=True, check=False)
        assert done.stderr == ""
        return done.stdout, done.returncode, (tmp_path / "requeued").read_text().strip()

    return start


Script = Callable[..., tuple[str, int, str]]


def test_a_finished_job_stays_finished(script: Script, tmp_path: Path) -> None:
    words, code, requeued = script(says(tmp_path, "finished", 0))
    assert "finished" in words and (code, requeued) == (0, "")
    assert script(0, run="")[:2] == script("true", run="")[:2] and "finished" in script(0, run="")[0]


def test_srun_that_lost_a_node_says_0_and_is_not_believed(script: Script, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_text('{"state": "finished"}')
    os.utime(tmp_path / "run" / "status.json", (1, 1))  # by an earlier job, with fewer steps
    words, code, requeued = script(says(tmp_path, "running", 0))
    assert "srun lost its tasks" in words and (code, requeued) == (1, "requeue 77")


def says(tmp_path: Path, state: str, code: int) -> str:
    """Tasks that leave a state in the run folder."""
    return f"""read -t 0.02 <> <(:); echo '{{"state": "{state}"}}' > {tmp_path}/run/status.json; (exit {code})"""


def test_an_interrupted_job_is_requeued(script: Script) -> None:
    words, code, requeued = script(75)
    assert "interrupted" in words and "4 more requeues left" in words and (code, requeued) == (75, "requeue 77")
    assert script(75, state="SIGNALING")[2] == "requeue 77"


def test_only_the_own_element_of_an_array_is_requeued(script: Script) -> None:
    assert script(75, more=["SLURM_ARRAY_JOB_ID=77", "SLURM_ARRAY_TASK_ID=3"])[2] == "requeue 77_3"


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "TIMEOUT", ""])
def test_a_job_that_was_ended_from_outside_is_not_raised_again(script: Script, state: str) -> None:
    words, _, requeued = script(75, state=state)
    assert requeued == "" and "SLURM has ended it" in words and words.rstrip().endswith("do this")


def test_a_controller_that_restarts_is_asked_again(script: Script, tmp_path: Path) -> None:
    """Here for the first two questions, squeue's and scontrol's, once each."""
    (tmp_path / "down").mkdir()
    down = f"[[ -e {tmp_path}/down/$(basename $0) ]] || {{ touch {tmp_path}/down/$(basename $0); exit 1; }}; "
    words, code, requeued = script(75, down=down)
    assert (code, requeued) == (75, "requeue 77"), words


def test_the_budget_is_kept_and_its_end_is_said(script: Script) -> None:
    assert script(75, restarts=4)[2] == "requeue 77"
    words, code, requeued = script(75, restarts=5)
    assert (code, requeued) == (75, "") and "budget of 5 requeues is spent" in words
    words, code, _ = script(0, restarts=6)  # SLURM itself has requeued it once more, after a node failure
    assert code == 1 and "port" not in words


def test_bad_usage_is_not_repeated(script: Script) -> None:
    words, code, requeued = script(2)
    assert (code, requeued) == (2, "") and "cannot work" in words


def test_failures_count_while_there_is_no_new_checkpoint(script: Script, tmp_path: Path) -> None:
    latest = tmp_path / "run" / "checkpoints" / "latest"
    assert script(1)[2] == "requeue 77"
    latest.symlink_to("step-5.pt")
    assert script(137, restarts=1)[2] == "requeue 77"  # there has been progress: this failure is the first one again
    words, code, requeued = script(137, restarts=2)
    assert (code, requeued) == (137, "") and "for the 2. time without a new checkpoint (slurm.retries=1)" in words


def test_interruptions_without_any_progress_end_as_well(script: Script, tmp_path: Path) -> None:
    """As with a warning that is longer than the time limit."""
    told = [script(75, restarts=n, requeues=100) for n in range(11)]
    assert [requeued for _, _, requeued in told] == ["requeue 77"] * 10 + [""]
    assert "for the 11. time without progress" in told[-1][0]
    (tmp_path / "run" / "checkpoints" / "latest").symlink_to("step-5.pt")
    assert script(75, restarts=11, requeues=100)[2] == "requeue 77"


def test_torchrun_hides_the_exit_code_but_the_run_folder_tells(script: Script, tmp_path: Path) -> None:
    status = tmp_path / "run" / "status.json"
    status.parent.mkdir()
    status.write_text('{"state": "interrupted"}')
    os.utime(status, (1, 1))  # of an earlier start: says nothing about this one
    assert "failed with exit code 1" in script(1)[0]
    assert "interrupted, its work is saved" in script(says(tmp_path, "interrupted", 1))[0]


def test_a_port_that_is_taken_is_passed_over(script: Script) -> None:
    with socket.socket() as taken:
        try:
            taken.bind(("127.0.0.1", 20077))
            taken.listen()
        except OSError:
            pass  # somebody else has it: as good
        assert "port 20077" not in script(0)[0]
