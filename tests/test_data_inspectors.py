"""Processes that look into files: the same results as one process, whatever happens to them."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_colorize.data import inspectors
from dist_colorize.data.inspect import Facts, Rejected, inspect
from dist_colorize.data.inspectors import Result, inspect_all
from dist_colorize.data.scan import Scan, scan

FILES = 300


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of many sizes, and every seventh file is no photograph."""
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(FILES):
        noise = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).resize((40 + number, 64)).save(file, "JPEG")
        (folder / f"{number:03}.jpg").write_bytes(b"text" if number % 7 == 0 else file.getvalue())
    return folder


@pytest.fixture(scope="module")
def found(root: Path) -> Scan:
    return scan(root, None, lambda: False)


def expected(root: Path, found: Scan) -> dict[str, Result]:
    def look(data: bytes) -> Result:
        try:
            return inspect(data, 32)
        except Rejected as error:
            return str(error)

    return {candidate.name: look((root / candidate.name).read_bytes()) for candidate in found.candidates}


def results(root: Path, found: Scan, stop: Callable[[], bool] = lambda: False) -> Iterator[tuple[str, Result]]:
    return ((candidate.name, result) for candidate, result in inspect_all(root, found, 32, stop))


def children(pid: int | str = "self") -> list[int]:
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in lists for child in file.read_text().split()]


def alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_processes_find_what_one_finds(root: Path, found: Scan) -> None:
    before = children()
    seen = list(results(root, found))
    assert len(seen) == FILES
    assert dict(seen) == expected(root, found)
    assert children() == before


def test_a_few_large_files_are_shared_out_too(root: Path, found: Scan, monkeypatch: pytest.MonkeyPatch) -> None:
    few = Scan(candidates=found.candidates[:5])
    before = children()
    first, *others = results(root, few)
    assert children() == before
    monkeypatch.setattr(inspectors, "_BYTES_WORTH_A_PROCESS", few.candidates[1].length)
    shared = results(root, few)
    seen = [next(shared)]
    assert len(children()) >= len(before) + 2
    assert sorted([*seen, *shared]) == sorted([first, *others])


def test_processes_may_be_killed(root: Path, found: Scan) -> None:
    before = set(children())
    seen: dict[str, Result] = {}
    killed = 0
    for name, result in results(root, found):
        seen[name] = result
        if len(seen) % 50 == 0:
            for child in set(children()) - before:
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                    killed += 1
    assert killed > 2
    assert seen == expected(root, found)


def test_a_file_that_crashes_the_decoder_is_named(
    root: Path, found: Scan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Python imports sitecustomize when it starts: here, a Pillow that crashes on one of the files.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, PIL.JpegImagePlugin as plugin\n"
        "accept = plugin.JpegImageFile._open\n"
        "def crash(self):\n"
        "    accept(self)\n"
        "    if self._size == (40 + 123, 64): os.abort()\n"
        "plugin.JpegImageFile._open = crash\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    seen = dict(results(root, found))
    assert seen.pop("123.jpg") == "cannot be decoded: it makes the decoder crash"
    wanted = expected(root, found)
    assert isinstance(wanted.pop("123.jpg"), Facts)
    assert seen == wanted


def test_a_stop_ends_the_processes(root: Path, found: Scan) -> None:
    before = children()
    stopped = False
    rows = results(root, found, lambda: stopped)
    next(rows)
    assert len(children()) > len(before)
    stopped = True
    assert len(list(rows)) < FILES - 1
    assert children() == before


PARENT = """
import sys
from pathlib import Path
from dist_colorize.data.inspectors import inspect_all
from dist_colorize.data.scan import scan
root = Path(sys.argv[1])
rows = inspect_all(root, scan(root, None, lambda: False), 32, lambda: False)
next(rows)
print("begun", flush=True)
sys.stdin.read()
print(sum(1 for _ in rows) + 1)
"""


@pytest.fixture
def parent(root: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", PARENT, str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "begun\n"
        yield process


def test_signals_of_a_cluster_are_the_parents_business(parent: subprocess.Popen[str]) -> None:
    workers = children(parent.pid)
    time.sleep(1)  # they ignore signals as soon as they run
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            os.kill(worker, number)
    out, _ = parent.communicate("", timeout=60)
    assert int(out) == FILES
    assert parent.returncode == 0


def test_no_process_outlives_its_parent(parent: subprocess.Popen[str]) -> None:
    workers = children(parent.pid)
    assert workers
    parent.kill()
    wait_until(lambda: not any(alive(worker) for worker in workers))
