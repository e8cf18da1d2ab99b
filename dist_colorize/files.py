"""Writing files so that a reader finds the old content or the new one, never a part, whatever is killed or full."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY = ".*.tmp"
"""Pattern of the temporary names."""


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary name in the same folder; it becomes `path` when the block ends well, else it is removed.

    `durable`: the new content survives a power loss from here on, for the price of waiting for the disk.
    """
    # A name of its own, and a short one: what is based on `path.name` could be too long for the file system.
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # the kernel takes the umask off
    try:
        with suppress(OSError):  # a file system without locks: remove_stale cannot tell, and leaves it
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield temporary
        if durable:
            sync(temporary)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    finally:
        os.close(descriptor)
    if durable:
        sync(path.parent)


def remove_stale(folder: Path) -> None:
    """Removes the temporary files of processes that were killed; those of living ones are locked and stay."""
    for path in folder.glob(TEMPORARY):
        if re.fullmatch(r"\.[0-9a-f]{16}\.tmp", path.name):
            with suppress(OSError):  # locked, not ours, or just renamed
                descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                finally:
                    os.close(descriptor)


def write_atomically(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Replaces the content of `path`, whole or not at all."""
    with replacing(path, durable=durable) as temporary:
        temporary.write_bytes(content)


def link_atomically(path: Path, target: str) -> None:
    """Makes `path` a symbolic link to `target`, in one step; does nothing where the file system has no links."""
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        temporary.symlink_to(target)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            return
        raise
    try:
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)
