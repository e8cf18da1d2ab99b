"""The runner of .ci/gpu, on steps that crash, hang, leave processes behind or cannot run; and its list of steps."""

from __future__ import annotations

import json
import signal
import textwrap
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_runner import Place, Runner, Step, chosen, groups, marked

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "gpu"
LONG = 60.0


def step(name: str, code: str, limit: float = LONG, **others: Any) -> Step:
    """A step that runs a few lines of Python."""
    command = ["-c", textwrap.dedent(code)]
    return Step(name, f"what {name} shows", limit, lambda place: command, **others)


def runner(folder: Path, minutes: float = 1.0, **others: Any) -> Runner:
    return Runner(Place(folder / "work", dry=False), folder / "out", minutes, **others)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text().splitlines()]


GOOD = """
    from benchmarks.gpu_runner import cannot, fact, section
    print("some output")
    fact(speed=1234.5678, kinds=20)
    cannot("the other half: needs a GPU")
    section("### More")
"""
CRASH = """
    import os, signal
    from benchmarks.gpu_runner import fact
    fact(before="the crash")
    os.kill(os.getpid(), signal.SIGSEGV)
"""
# The grandchild has a session of its own, as torchrun's ranks have: killing the group does not reach it.
HANG = """
    import subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    print("child", child.pid, flush=True)
    time.sleep(600)
"""
LEFT_BEHIND = """
    import subprocess, sys
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    print("child", child.pid, flush=True)
"""


def child_of(folder: Path, name: str) -> int:
    words = (folder / "work" / "logs" / f"{name}.log").read_text().split()
    return int(words[words.index("child") + 1])


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_steps_come_to_is_in_the_lines_the_logs_and_the_table(tmp_path: Path) -> None:
    run = runner(tmp_path)
    run.run([step("crash", CRASH), step("good", GOOD), step("bad", "raise SystemExit('told\\nwhy')")])
    crash, good, bad = lines(tmp_path)
    assert crash | {"seconds": 0} == {
        "step": "crash",
        "state": "failed",
        "seconds": 0,
        "exit": "SIGSEGV",
        "reason": "SIGSEGV: no output",
        "facts": {"before": "the crash"},
        "cannot": [],
        "sections": [],
    }
    assert (good["state"], good["exit"], good["facts"]) == ("ok", 0, {"speed": 1234.5678, "kinds": 20})
    assert (bad["state"], bad["exit"], bad["reason"]) == ("failed", 1, "1: why")
    assert "======== good: ok\nsome output\n" in (tmp_path / "out" / "logs.txt").read_text()

    text = run.report("# Heading")
    assert text == (tmp_path / "out" / "table.md").read_text()
    assert text.startswith("# Heading\n\n| step ") and text.endswith("\n\n### More\n")
    (row,) = [line for line in text.splitlines() if line.startswith("| good")]
    assert [cell.strip() for cell in row.split("|")[1:4]] == ["good", "what good shows", "ok"]
    assert "speed: 1235; kinds: 20; cannot run here: the other half: needs a GPU" in row
    assert run.code == 1


def test_a_step_that_hangs_dies_with_all_that_it_started(tmp_path: Path) -> None:
    run = runner(tmp_path)
    run.run([step("hang", HANG, limit=3.0), step("good", GOOD)])
    assert [(line["state"], line["exit"]) for line in lines(tmp_path)] == [("timed out", "SIGKILL"), ("ok", 0)]
    assert lines(tmp_path)[0]["reason"] == "after 3 s"
    assert not is_alive(child_of(tmp_path, "hang"))
    assert run.code == 1


def test_what_a_step_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    run = runner(tmp_path)
    run.run([step("leaves", LEFT_BEHIND)])
    assert run.results["leaves"].state == "ok"
    assert not is_alive(child_of(tmp_path, "leaves"))
    assert run.code == 0


def test_the_deadline_cuts_off_what_runs_and_skips_what_is_left(tmp_path: Path) -> None:
    run = runner(tmp_path, minutes=0.05)
    run.run([step("hang", HANG), step("good", GOOD)])
    hang, good = lines(tmp_path)
    assert (hang["state"], hang["reason"]) == ("timed out", "cut off, the 0.05 minutes are over")
    assert (good["state"], good["exit"], good["reason"]) == ("skipped", None, "the 0.05 minutes are over")
    assert run.code == 1


def test_what_cannot_run_here_is_no_failure(tmp_path: Path) -> None:
    run = runner(tmp_path)
    leaves = "from benchmarks.gpu_runner import leave; leave('needs a compiler')"
    run.run(
        [
            step("gpu", "raise SystemExit(1)", needs_gpu=True),
            step("module", "raise SystemExit(1)", modules=("no_such_module",)),
            step("leaves", leaves),
        ]
    )
    assert {line["state"] for line in lines(tmp_path)} == {"cannot run here"}
    reasons = [line["reason"] for line in lines(tmp_path)]
    assert reasons == ["needs a GPU", "no_such_module is not installed", "needs a compiler"]
    assert run.code == 0
    # with a GPU it runs
    run.gpu = True
    run.run([step("gpu", "raise SystemExit(1)", needs_gpu=True)])
    assert run.results["gpu"].state == "failed"


def test_a_step_is_skipped_where_one_that_it_needs_went_wrong(tmp_path: Path) -> None:
    run = runner(tmp_path)
    run.run([step("data", CRASH), step("train", GOOD, needs=("data",)), step("paint", GOOD, needs=("train",))])
    assert [line["state"] for line in lines(tmp_path)] == ["failed", "skipped", "skipped"]
    assert run.results["train"].reason == "needs data, which is not ok"


def test_steps_run_side_by_side_unless_one_is_to_be_alone_or_needs_another() -> None:
    plain, other, alone, after = (
        step("plain", GOOD),
        step("other", GOOD),
        step("alone", GOOD, alone=True),
        step("after", GOOD, needs=("plain",)),
    )
    found = [[member.name for member in group] for group in groups([alone, plain, other, after, alone])]
    assert found == [["alone"], ["plain", "other"], ["after"], ["alone"]]


def test_two_steps_beside_each_other_meet(tmp_path: Path) -> None:
    meet = """
        import pathlib, time
        here, there = (pathlib.Path({folder!r}, name) for name in {names})
        here.touch()
        while not there.exists():
            time.sleep(0.01)
    """
    run = runner(tmp_path, beside=2)
    run.run([step(a, meet.format(folder=str(tmp_path), names=(a, b))) for a, b in (("one", "two"), ("two", "one"))])
    assert {line["state"] for line in lines(tmp_path)} == {"ok"}


def test_an_interrupted_run_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runner(tmp_path)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 2.0)
        with pytest.raises(KeyboardInterrupt):
            run.run([step("hang", HANG), step("good", GOOD)])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not marked(f"{run._mark}=")
    assert "good" not in run.results


def test_what_a_chosen_step_needs_runs_too() -> None:
    steps = [step("a", GOOD), step("b", GOOD, needs=("a",)), step("c", GOOD), step("d", GOOD, needs=("b",))]
    assert [one.name for one in chosen(steps, ["d"])] == ["a", "b", "d"]
    assert [one.name for one in chosen(steps, [])] == ["a", "b", "c", "d"]
