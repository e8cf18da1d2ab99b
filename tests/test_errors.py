"""Each way to leave a command: its exit code, and what its user reads."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import rank_environment


def leave(body: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    program = f"from dist_colorize.errors import *\ndef main():\n    {body}\nrun_command(main)"
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=rank_environment(env),
        check=False,
    )


@pytest.mark.parametrize(
    ("body", "code", "stderr"),
    [
        ("pass", 0, ""),
        ("return 1", 1, ""),
        ("raise UserError('data.root: no such folder')", 2, "error: data.root: no such folder\n"),
        ("raise Interrupted('step 7 is saved')", 75, "interrupted: step 7 is saved\n"),
        ("raise KeyboardInterrupt", 75, "interrupted\n"),
    ],
)
def test_exit_code_and_one_line(body: str, code: int, stderr: str) -> None:
    done = leave(body)
    assert (done.returncode, done.stderr) == (code, stderr)


def test_a_bug_keeps_its_traceback() -> None:
    done = leave("return 1 // 0")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr


def test_one_rank_alone_is_named_and_a_shared_error_is_printed_once_per_node() -> None:
    second = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    first = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    assert leave("raise UserError('x')", second).stderr == "[rank 1] error: x\n"
    assert leave("raise UserError('x', shared=True)", first).stderr == "error: x\n"
    assert leave("raise Interrupted('x')", first).stderr == "interrupted: x\n"
    assert leave("raise Interrupted('x')", second).stderr == ""
    silent = leave("raise UserError('x', shared=True)", second)
    assert (silent.stderr, silent.returncode) == ("", 2)


def test_a_reader_that_leaves_early_is_no_error() -> None:
    program = "from dist_colorize.errors import *\nrun_command(lambda: print('line\\n' * 200000))"
    done = subprocess.run(
        ["bash", "-c", f'set -o pipefail; {sys.executable} -c "$PROGRAM" | head -1'],
        capture_output=True,
        text=True,
        env={**rank_environment(), "PROGRAM": program},
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("line\n", "", 0)
