"""Order among runs: what folders say, what commands print, and that pruning deletes only what was confirmed."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from dist_colorize import runs
from dist_colorize.curves import Curve, sparkline
from dist_colorize.errors import UserError
from dist_colorize.run_facts import differing, find_runs, read_run

GONE = 2**22 + 1
"""No process has this number: Linux ends at 2^22."""


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, state: str = "finished", psnr: float | None = None, lr: float = 0.1, **status: Any) -> Path:
        path = tmp_path / name
        (path / "checkpoints").mkdir(parents=True)
        (path / "config.yaml").write_text(f"run: {{dir: {name}}}\ntrain: {{steps: 20, lr: {lr}}}\n")
        now = datetime.now(UTC).isoformat()
        facts = {"state": state, "step": 10, "pid": os.getpid(), "host": socket.gethostname(), "updated": now}
        (path / "status.json").write_text(json.dumps(facts | status))
        lines = [{"step": step, "loss": 5.0 / step} for step in (1, 5, 10)]
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 11, "lo')
        if psnr is not None:
            scores = {"final": {"psnr": psnr, "mse": 10.0}, "raw": {"psnr": 50 - psnr}}
            protocol = {"data": "photos", "size": 96, "photographs": 8, "preset": "final"}
            (path / "evaluation.json").write_text(json.dumps({"protocol": protocol, "scores": scores}))
        return path

    return make


def run(*arguments: str | Path) -> None:
    runs.main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"state": "finished"}, "finished"),
        ({"state": "interrupted"}, "interrupted"),
        ({"state": "failed"}, "failed"),
        ({"state": "running"}, "running"),
        ({"state": "running", "pid": GONE}, "failed"),
        ({"state": "running", "pid": "?"}, "failed"),
        ({"state": "running", "host": "elsewhere", "pid": GONE}, "running"),
        ({"state": "running", "host": "elsewhere", "updated": "2020-01-01T00:00:00+00:00"}, "failed"),
    ],
)
def test_state_is_what_the_run_says_unless_its_process_has_gone(
    make: Callable[..., Path], facts: dict[str, Any], expected: str
) -> None:
    found = read_run(make("a", **facts))
    assert found is not None and found.state == expected


def test_list_shows_state_steps_scores_and_what_differs(
    make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make("a", psnr=20.5, lr=0.1)
    make("b", state="interrupted", lr=0.2)
    (tmp_path / "notes").mkdir()
    run("--root", tmp_path)
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:3] == ["run", "state", "step"] and len(table) == 3
    assert table[1].split() == ["a", "finished", "10/20", "20.5", "10", "lr=0.1"]
    assert table[2].split() == ["b", "interrupted", "10/20", "-", "-", "lr=0.2"]
    assert differing(find_runs(tmp_path)) == {"train.lr": [0.1, 0.2]}, "where a run lies is no difference"
    with pytest.raises(UserError, match="--root"):
        run("--root", tmp_path / "nowhere")


def test_scores_of_a_run_without_evaluation_are_those_of_its_last_validation(make: Callable[..., Path]) -> None:
    path = make("a", state="running")
    lines = [{"step": step, "scores": {"final": {"psnr": psnr}}} for step, psnr in ((5, 18.0), (10, 19.0))]
    (path / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_run(path)
    assert found is not None and found.scores == {"final": {"psnr": 19.0}} and found.scored_on == "last validation"


def test_compare_shows_settings_and_curves_and_writes_a_page(
    make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = make("a", psnr=20.0, lr=0.1), make("b", psnr=21.0, lr=0.2)
    run("compare", a, b, "--report", tmp_path / "page.html")
    shown = capsys.readouterr().out
    words = [line.split() for line in shown.splitlines()]
    assert ["train.lr", "0.1", "0.2"] in words and ["PSNR", "(dB),", "final", "20", "21"] in words
    assert [line.split() for line in shown.splitlines() if line.startswith("step")][-1] == ["step", "1", "5", "10"]
    assert ["a", "5", "1", "0.5"] in words
    page = (tmp_path / "page.html").read_text()
    assert "train.lr" in page and "polyline" in page
    with pytest.raises(UserError, match="holds no run"):
        run("compare", a, tmp_path)


def test_best_ranks_by_what_the_metric_calls_better(
    make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, psnr in (("a", 20.0), ("b", 22.0), ("c", 21.0)):
        make(name, psnr=psnr)
    make("unscored")
    run("--root", tmp_path, "best")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["run", "b", "c", "a"]
    run("--root", tmp_path, "best", "--stage", "raw")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()][1:] == ["a", "c", "b"]
    with pytest.raises(UserError, match="ranked by psnr"):
        run("--root", tmp_path, "best", "--metric", "colourfulness")
    with pytest.raises(UserError, match=r"dist_colorize\.evaluate"):
        run("--root", tmp_path, "best", "--metric", "ssim")


def answer(monkeypatch: pytest.MonkeyPatch, reply: Callable[[], str]) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt: reply())


def closed() -> str:
    raise EOFError


@pytest.mark.parametrize("reply", [lambda: "no", lambda: "", lambda: "y", closed])
def test_prune_deletes_nothing_without_a_yes(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reply: Callable[[], str]
) -> None:
    path = make("a", state="failed")
    answer(monkeypatch, reply)
    run("--root", tmp_path, "prune", "--state", "failed")
    assert path.is_dir()


def test_prune_deletes_what_it_showed_and_nothing_else(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed, working, good = make("failed", "failed"), make("working", "running"), make("good", psnr=20.0)
    changed, later = make("changed", "failed"), tmp_path / "later"
    (tmp_path / "link").symlink_to(good)

    def meanwhile() -> str:
        make("later", "failed")
        status = json.loads((changed / "status.json").read_text())
        status["updated"] = (datetime.now(UTC) + timedelta(seconds=5)).isoformat()
        (changed / "status.json").write_text(json.dumps(status))
        return "yes"

    answer(monkeypatch, meanwhile)
    run("--root", tmp_path, "prune", "--state", "failed")
    assert not failed.exists()
    assert working.is_dir() and good.is_dir() and later.is_dir() and changed.is_dir()
    assert "changed since" in capsys.readouterr().out
    answer(monkeypatch, lambda: "yes")
    run("prune", working)
    assert working.is_dir() and "running" in capsys.readouterr().out
    for wrong in (tmp_path, tmp_path / "link"):
        with pytest.raises(UserError, match="nothing is deleted"):
            run("prune", good, wrong)
    with pytest.raises(UserError, match="say which runs"):
        run("--root", tmp_path, "prune")
    assert good.is_dir()


def test_prune_can_choose_by_age(make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old = make("old", updated=(datetime.now(UTC) - timedelta(days=9)).isoformat())
    new = make("new")
    answer(monkeypatch, lambda: "yes")
    run("--root", tmp_path, "prune", "--older", "7")
    assert not old.exists() and new.is_dir()


def test_curves_are_compared_at_the_same_steps() -> None:
    curve = Curve("loss", [("a", [1, 10, 20], [3.0, 2.0, 1.0]), ("b", [5, 10], [9.0, 8.0])])
    steps = curve.sampled_steps()
    assert steps == [1, 5, 10, 20]
    rows = dict(curve.sampled(lambda value: "-" if value is None else f"{value:g}"))
    assert rows == {"a": ["3", "3", "2", "1"], "b": ["-", "9", "8", "-"]}
    assert curve.svg().count("<polyline") == 2 and "&lt;" in Curve("<x>", curve.lines).svg()
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█" and len(sparkline(list(range(999)))) == 40
