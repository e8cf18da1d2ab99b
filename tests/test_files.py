"""A file is replaced whole or not at all, whatever its name and the umask."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from dist_colorize.files import link_atomically, remove_stale, replacing, write_atomically


def test_the_longest_name_works_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 127 + "x")  # 255 bytes, the most that Linux takes
    write_atomically(path, b"one")
    write_atomically(path, b"two", durable=False)
    assert path.read_bytes() == b"two" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "file", b"")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask


def test_threads_do_not_disturb_each_other(tmp_path: Path) -> None:
    def work(number: int) -> None:
        for _ in range(20):
            write_atomically(tmp_path / "file", bytes([number]) * 5000, durable=False)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = (tmp_path / "file").read_bytes()
    assert len(content) == 5000 and len(set(content)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_after_a_failure_the_old_content_stays(tmp_path: Path) -> None:
    def fail_halfway(path: Path) -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(b"ne")
            raise ValueError("halfway")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="halfway"):
        fail_halfway(path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_what_a_kill_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    killed = os.fork()
    if not killed:
        with replacing(tmp_path / "one") as temporary:
            temporary.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(killed, 0)
    (tmp_path / ".someone else's.tmp").touch()
    assert len(list(tmp_path.iterdir())) == 2
    with replacing(tmp_path / "two") as temporary:
        temporary.write_bytes(b"whole")
        remove_stale(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".someone else's.tmp", "two"]
    assert (tmp_path / "two").read_bytes() == b"whole"


def test_a_link_moves_in_one_step(tmp_path: Path) -> None:
    for target in ("one", "two"):
        link_atomically(tmp_path / "link", target)
        assert (tmp_path / "link").readlink() == Path(target)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]
