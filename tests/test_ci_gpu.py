"""The runner of .ci/gpu, on steps that crash, hang, leave processes behind or cannot run; and its list of steps."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import gpu_decode, gpu_postprocess, gpu_step
from benchmarks.gpu_decode import Outcome
from benchmarks.gpu_runner import Place, Runner, Step, chosen, groups, marked
from dist_colorize.doctor import Finding
from dist_colorize.postprocess.selfcheck import Agreement, Speed

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
    section("### More\\n\\n| of | it |")
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
    assert text.startswith("# Heading\n\n| step ") and text.endswith("\n\n### More\n\n| of | it |\n")
    (row,) = [line for line in text.splitlines() if line.startswith("| good")]
    assert [cell.strip() for cell in row.split("|")[1:4]] == ["good", "what good shows", "ok"]
    assert "speed: 1235; kinds: 20; cannot run here: the other half: needs a GPU" in row
    assert run.code == 1


def test_a_step_that_hangs_dies_with_all_that_it_started(tmp_path: Path) -> None:
    run = runner(tmp_path)
    run.run([step("hang", HANG, limit=5.0), step("good", GOOD)])
    assert [(line["state"], line["exit"]) for line in lines(tmp_path)] == [("timed out", "SIGKILL"), ("ok", 0)]
    assert lines(tmp_path)[0]["reason"] == "after 5 s"
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
    gpu = step("gpu", "raise SystemExit(1)", needs_gpu=True)
    run.run([gpu, step("module", "raise SystemExit(1)", modules=("no_such_module",))])
    assert {line["state"] for line in lines(tmp_path)} == {"cannot run here"}
    assert [line["reason"] for line in lines(tmp_path)] == ["needs a GPU", "no_such_module is not installed"]
    assert run.code == 0
    # with a GPU it runs
    run.gpu = True
    run.run([gpu])
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


# ---------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("ci_gpu", str(SCRIPT))
    spec = importlib.util.spec_from_loader("ci_gpu", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_each_step_is_named_once_and_needs_earlier_ones(script: ModuleType) -> None:
    names = [step.name for step in script.STEPS]
    assert len(set(names)) == len(names)
    for number, one in enumerate(script.STEPS):
        assert set(one.needs) <= set(names[:number])
        # a module of ours that it names is there
        command = one.command(Place(Path("/work"), dry=True))
        assert command[0] == "-m" and (importlib.util.find_spec(command[1]) is not None)
        assert ("--dry" in command) == (command[1].startswith("benchmarks.") and one.name != "step")


def test_facts_are_read_from_what_pytest_and_doctor_print(script: ModuleType) -> None:
    log = """
tests/test_a.py::test_one PASSED
FAILED tests/test_a.py::test_two[cuda] - AssertionError
ERROR tests/test_b.py
= 1 failed, 3 passed, 2 skipped, 400 deselected, 1 error in 12.34s =
"""
    assert script.tests(log) == {
        "failed": 1,
        "passed": 3,
        "skipped": 2,
        "error": 1,
        "wrong": "test_a.py::test_two[cuda] test_b.py",
    }
    cut_off = "[gw1] [ 12%] PASSED tests/test_a.py::test_one \n[gw0] [ 15%] FAILED tests/test_a.py::test_two[cuda] \n"
    assert script.tests(cut_off) == {"wrong": "test_a.py::test_two[cuda]"}
    assert script.tests("Segmentation fault") == {}

    found = [
        Finding("torch", "ok", "2.11"),
        Finding("scikit-image", "broken", "no"),
        Finding("SLURM", "absent", "none"),
    ]
    assert script.findings("\n".join(["Software", *map(str, found)])) == {"well": 1, "broken": "scikit-image"}
    off = Agreement("decode, fp16", "ab", worst=0.1, share=0, tolerance=1, most=0)
    checks = f"  ok  {off}\n  !!  {off}\n      {Speed('scale chroma', 2e-6, 4000, 0.713)}\n"
    expected = {"well": 1, "broken": "decode, fp16", "scale chroma": "71.3 %"}
    assert script.kernels(f"kernels on A card\n{checks}") == expected


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    places = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--only", "doctor", *places],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--dry runs what can be run without one" in done.stderr
    assert [line["step"] for line in lines(tmp_path)] == ["versions"]
    assert "torch: " in (tmp_path / "out" / "table.md").read_text()


# ---------------------------------------------------------------- what steps are made of


def test_a_kind_that_its_decoder_dies_of_does_not_hide_the_others() -> None:
    asked = []

    def start(kinds: Sequence[str]) -> tuple[int | str, str]:
        asked.append(list(kinds))
        told = []
        for kind in kinds:
            if kind == "crashes":
                return "SIGSEGV", "\n".join(told)
            if kind == "fails":
                return gpu_decode.TOLD, "\n".join([*told, json.dumps([kind, {"failure": "unsupported"}])])
            told += ["a warning of a library", json.dumps([kind, {"worst": 3.0, "mean": 0.25}])]
        return 0, "\n".join(told)

    found = gpu_decode.each_kind(["a", "crashes", "b", "fails", "c"], start)
    assert {kind: str(outcome) for kind, outcome in found.items()} == {
        "a": "3 (0.25)",
        "b": "3 (0.25)",
        "c": "3 (0.25)",
        "crashes": "SIGSEGV",
        "fails": "unsupported",
    }
    assert asked == [["a", "crashes", "b", "fails", "c"], ["b", "fails", "c"], ["c"]]
    good, bad = found["a"], found["crashes"]
    hopeless = gpu_decode.each_kind(list("abcde"), lambda kinds: ("SIGSEGV", ""))
    assert [str(hopeless[kind]) for kind in "abcd"] == ["SIGSEGV"] * 3 + ["not tried after 3 deaths"]
    assert gpu_decode.wrongly(good, bad)
    assert not gpu_decode.wrongly(bad, bad)  # the CPU cannot decode it either
    assert not gpu_decode.wrongly(good, good)
    assert gpu_decode.wrongly(good, Outcome(worst=255, mean=40.0))
    assert gpu_decode.wrongly(good, Outcome(failure="another shape"))


def test_kernels_belong_to_the_range_in_which_they_were_launched() -> None:
    main, autograd, dali = 1, 2, 3
    trace: list[dict[str, Any]] = [
        {"cat": "user_annotation", "name": "encoder", "ts": 100, "dur": 50, "tid": main},
        {"cat": "user_annotation", "name": "backward", "ts": 200, "dur": 100, "tid": main},
        {"cat": "user_annotation", "name": "DistributedDataParallel.forward", "ts": 90, "dur": 70, "tid": main},
        {"cat": "gpu_user_annotation", "name": "encoder", "ts": 400, "dur": 900, "tid": 7},
        {"cat": "cpu_op", "name": "autograd::engine::evaluate_function: Conv", "ts": 210, "dur": 5, "tid": autograd},
    ]

    def launch(ts: int, thread: int, dur: int, cat: str = "kernel", by: str = "cuda_runtime") -> None:
        number = len(trace)
        trace.append({"cat": by, "name": "launch", "ts": ts, "dur": 1, "tid": thread, "args": {"correlation": number}})
        # it runs much later, when the host is in another range
        trace.append({"cat": cat, "ts": ts + 1000, "dur": dur, "tid": 7, "args": {"correlation": number}})

    launch(120, main, 3000)
    launch(149, main, 1000, by="cuda_driver")
    launch(220, autograd, 5000)
    launch(230, main, 500, cat="gpu_memset")
    launch(130, dali, 7000)
    launch(160, main, 11000)
    launch(50, main, 13000)
    trace.append({"cat": "kernel", "ts": 2000, "dur": 17000, "tid": 7, "args": {}})
    assert gpu_step.by_part(trace, kernels=True) == {
        "encoder": 4.0,
        "backward": 5.5,
        "data": 7.0,
        gpu_step.ELSEWHERE: 41.0,
    }
    assert gpu_step.by_part(trace, kernels=False) == {"encoder": 0.05, "backward": 0.1}


def test_pictures_are_compared_pixel_by_pixel(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    pixels = np.full((10, 10, 3), 100, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one" / "a.png")
    pixels[0, 0], pixels[1, 1, 2] = 101, 107
    Image.fromarray(pixels).save(tmp_path / "other" / "a.png")
    assert gpu_postprocess.differences(tmp_path / "one", tmp_path / "other") == (0.99, 7, 100)
