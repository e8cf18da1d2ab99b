"""A test that crashes its process fails, alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import rank_environment

TESTS = """
import ctypes, os, pytest
pytestmark = pytest.mark.own_process
def test_before(): assert os.getppid() == int(os.environ["PARENT"])
def test_crash(): ctypes.string_at(0)
def test_after(): pass
def test_wrong(): assert 1 + 1 == 3
def test_skipped(): pytest.skip("not here")
def test_expected(): pytest.xfail("known")
"""


def test_a_crash_is_one_failure_and_the_other_tests_have_their_own_outcomes(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "import os\n"
        "from own_process import *\n"
        "os.environ.setdefault('PARENT', str(os.getpid()))\n"
        "def pytest_configure(config): config.addinivalue_line('markers', 'own_process')\n"
    )
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", "test_it.py"]
    env = rank_environment({"PYTHONPATH": str(Path(__file__).parent)})
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env, timeout=120, check=False)
    summary = [line for line in done.stdout.splitlines() if "test_it.py" in line and line.split()[0].isupper()]
    assert {(line.split()[0], line.partition("::")[2].split()[0]) for line in summary if "::" in line} == {
        ("PASSED", "test_before"),
        ("PASSED", "test_after"),
        ("FAILED", "test_crash"),
        ("FAILED", "test_wrong"),
        ("XFAIL", "test_expected"),
    }, done.stdout
    assert any("not here" in line for line in done.stdout.splitlines() if line.startswith("SKIPPED"))
    assert "its process died of SIGSEGV" in done.stdout
    assert "assert (1 + 1) == 3" in done.stdout
