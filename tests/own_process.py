"""Tests marked own_process run in a child process: what they call may crash, as decoders on a GPU do.

A child takes seconds to start, so one runs all marked tests of a file that are still to come. A test that ends its
process has failed; the next one gets a new child. Used by conftest.py, which imports the hooks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

OUTCOMES = "DIST_COLORIZE_TEST_OUTCOMES"
"""Set in a child: the file that takes a line of JSON for each thing that happens to a test."""
SECONDS = 300
"""For all the tests of one child."""

_found = pytest.StashKey[dict[str, tuple[str, str]]]()
"""By node id: passed, failed, skipped or xfailed; and why."""


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if "own_process" not in pyfuncitem.keywords or OUTCOMES in os.environ:
        return None
    found = pyfuncitem.session.stash.setdefault(_found, {})
    if pyfuncitem.nodeid not in found:
        items = pyfuncitem.session.items
        rest = [item for item in items[items.index(pyfuncitem) :] if item.path == pyfuncitem.path]
        found |= run_child(pyfuncitem.config, [item.nodeid for item in rest if "own_process" in item.keywords])
    outcome, text = found[pyfuncitem.nodeid]
    if outcome == "skipped":
        pytest.skip(text)
    if outcome == "xfailed":
        pytest.xfail(text)
    if outcome == "failed":
        pytest.fail(text, pytrace=False)
    return True


def pytest_runtest_logstart(nodeid: str) -> None:
    _note(nodeid, "started", "")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _note(report.nodeid, "failed", report.longreprtext)
    elif hasattr(report, "wasxfail"):
        _note(report.nodeid, "xfailed", report.wasxfail)
    elif report.skipped:
        _note(
            report.nodeid,
            "skipped",
            str(report.longrepr[2]).removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else "",
        )
    elif report.when == "call":
        _note(report.nodeid, "passed", "")


def _note(nodeid: str, outcome: str, text: str) -> None:
    if OUTCOMES in os.environ:
        with Path(os.environ[OUTCOMES]).open("a") as file:
            file.write(json.dumps([nodeid, outcome, text]) + "\n")


def run_child(config: pytest.Config, nodeids: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The outcomes of the tests that a child has begun, at least of the first."""
    options = ["-q", "-p", "no:cacheprovider", f"--rootdir={config.rootpath}"]
    if config.getoption("--slow", False):
        options.append("--slow")
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder, "outcomes")
        with Path(folder, "output").open("w+b") as output:
            child = subprocess.Popen(
                [sys.executable, "-m", "pytest", *options, *nodeids],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=config.rootpath,
                env=os.environ | {OUTCOMES: str(notes)},
            )
            try:
                code = child.wait(SECONDS)
                end = f"died of {signal.Signals(-code).name}" if code < 0 else f"left with {code}"
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                end = f"was killed after {SECONDS} s"
            output.seek(0)
            printed = output.read().decode(errors="replace")[-5000:]
        lines = notes.read_text().splitlines() if notes.exists() else []
    found: dict[str, tuple[str, str]] = {}
    unfinished = "failed", f"its process {end}\n{printed}"
    for nodeid, outcome, text in map(json.loads, lines):
        if outcome == "started":
            found[nodeid] = unfinished
        elif found[nodeid] == unfinished or outcome == "failed":
            found[nodeid] = outcome, text
    return {nodeids[0]: unfinished} | found
