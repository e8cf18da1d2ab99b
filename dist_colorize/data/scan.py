"""Every file under a root that may be a photograph: in folders, behind symlinks, inside uncompressed tar shards.

Nothing is opened that is not a regular file (a FIFO would wait for ever), and nothing is ever unpacked to the disk: a
member of a tar shard is a stretch of bytes in the shard.
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from dist_colorize.data.inspect import OTHER_SUFFIXES, USABLE_SUFFIXES, Rejected, sniff
from dist_colorize.errors import UserError

_COMPRESSED_TAR = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A stretch of bytes that may be an image."""

    name: str
    """Relative to the root, '/' between folders and after the shard: "shards/0001.tar/cat.jpg". Bytes that are not
    UTF-8 are surrogate escapes, as everywhere in Python's file functions."""
    shard: int
    """Place in Scan.shards; -1 for a file of its own."""
    offset: int
    """First byte within the shard; 0 for a file of its own."""
    length: int


@dataclass(slots=True)
class Scan:
    """What a walk through the root found."""

    candidates: list[Candidate] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)
    """Relative names of the tar shards."""
    rejected: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason)"""
    watched: list[tuple[str, int, int]] = field(default_factory=list)
    """(relative name, modification time in ns, bytes) of every folder and shard: what makes an index stale."""
    ignored: int = 0
    """Files that do not look like images by their names: captions, licences."""


def scan(root: Path, skip: Path | None, stop: Callable[[], bool]) -> Scan:
    """Walk `root`, but not `skip` (where the index itself is kept). UserError when the root cannot be listed.

    Returns early, with what it has, when `stop()` turns true.
    """
    found = Scan()
    skipped = _identity(skip.stat()) if skip is not None and skip.is_dir() else None
    seen: set[tuple[int, int]] = set()
    # Real folders first: a folder that is also behind a symlink is called by its real name, whatever sorts first.
    folders: list[str] = [""]
    linked: list[str] = []
    while (folders or linked) and not stop():
        folder = folders.pop() if folders else linked.pop()
        path = root / folder
        try:
            status = path.stat()
            if _identity(status) == skipped:
                continue
            if _identity(status) in seen:
                if folder:
                    found.rejected.append((folder, "a symlink to a folder that is listed already (or a loop)"))
                continue
            seen.add(_identity(status))
            # The time is taken before the listing: a file that arrives in between makes the index stale, not wrong.
            found.watched.append((folder, status.st_mtime_ns, 0))
            with os.scandir(path) as entries:
                listing = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if not folder:
                raise UserError(
                    f"{root}: cannot list the data folder: {error.strerror}; check its permissions"
                ) from error
            found.rejected.append((folder, f"cannot list the folder: {error.strerror}"))
            continue
        for entry in listing:
            name = f"{folder}/{entry.name}" if folder else entry.name
            try:
                if entry.is_dir():
                    (linked if entry.is_symlink() else folders).append(name)
                    continue
                _add_file(found, root, name, entry.stat())
            except OSError as error:
                broken = entry.is_symlink() and isinstance(error, FileNotFoundError)
                found.rejected.append((name, "a broken symlink" if broken else f"cannot be read: {error.strerror}"))
    return found


def read_part(path: Path | str, offset: int, count: int, whole: bool) -> bytes:
    """`count` bytes of a regular file from `offset`; `whole` says that they must be all of it. OSError when not."""
    # O_NONBLOCK: a file that has become a named pipe since it was listed must not stop us here.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("is no longer a regular file")
        if (whole and status.st_size != count) or status.st_size < offset + count:
            raise OSError(f"has changed since it was indexed: {status.st_size} bytes")
        parts, at = [], offset
        while at < offset + count:  # one pread returns at most 2 GiB, or less on some network file systems
            parts.append(os.pread(descriptor, offset + count - at, at))
            if not parts[-1]:
                raise OSError("became shorter while it was read")
            at += len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)
    finally:
        os.close(descriptor)


def _add_file(found: Scan, root: Path, name: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "not a regular file")
        found.rejected.append((name, f"{kind}, not a file"))
        return
    lower = name.lower()
    if lower.endswith(_COMPRESSED_TAR):
        found.rejected.append(
            (name, "a compressed shard: unpack it to a plain .tar, whose members can be read directly")
        )
    elif lower.endswith(".tar"):
        found.watched.append((name, status.st_mtime_ns, status.st_size))
        found.shards.append(name)
        path = root / name
        for candidate in _members(found, path, name, len(found.shards) - 1, status.st_size):
            _add_candidate(found, path, candidate)
    else:
        _add_candidate(found, root / name, Candidate(name, -1, 0, status.st_size))


def _add_candidate(found: Scan, path: Path, candidate: Candidate) -> None:
    """Keep what is called like an image, or has no suffix and begins like one."""
    suffix = PurePosixPath(candidate.name).suffix.lower()
    head = b"" if suffix else read_part(path, candidate.offset, min(16, candidate.length), whole=False)
    if suffix in USABLE_SUFFIXES or suffix in OTHER_SUFFIXES or sniff(head):
        found.candidates.append(candidate)
    else:
        found.ignored += 1


def _members(found: Scan, path: Path, name: str, shard: int, size: int) -> Iterator[Candidate]:
    """The regular files of a tar archive (ustar, GNU long names, PAX) that lie wholly inside it."""
    try:
        archive = tarfile.open(path, "r:")  # noqa: SIM115 (closed below; "r:" is plain tar only)
    except (tarfile.TarError, ValueError) as error:
        found.rejected.append((name, f"not a plain tar archive: {error}"))
        return
    with archive:
        try:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep every member it has seen
                full_name = f"{name}/{member.name}"
                if member.issparse() or member.islnk() or member.issym():
                    found.rejected.append((full_name, "a link or a sparse file inside a tar archive"))
                elif member.isreg() and member.offset_data + member.size > size:
                    found.rejected.append((full_name, "cut off: the archive ends inside this member"))
                elif member.isreg():
                    yield Candidate(full_name, shard, member.offset_data, member.size)
        except (tarfile.TarError, ValueError, OSError):
            pass  # judged by what stands where the reading ended
        # tarfile takes a damaged header for the end of the archive. A true end is a block of zeros.
        with open(path, "rb") as file:
            file.seek(archive.offset)
            mark = file.read(tarfile.BLOCKSIZE)
        if mark != bytes(tarfile.BLOCKSIZE):
            found.rejected.append(
                (name, f"cut off or damaged near byte {min(archive.offset, size)}: the rest is not used")
            )


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


MAX_BYTES = 1 << 31
"""A larger file is not read into memory to see whether it is a photograph."""


def read_candidate(root: Path, shards: list[str], candidate: Candidate) -> bytes:
    """The bytes of a candidate; Rejected when they cannot be had."""
    path = f"{root}/{shards[candidate.shard] if candidate.shard >= 0 else candidate.name}"
    if candidate.length > MAX_BYTES:
        raise Rejected("too large: more than 2 GiB")
    try:
        return read_part(path, candidate.offset, candidate.length, whole=candidate.shard < 0)
    except OSError as error:
        raise Rejected(f"cannot be read: {error.strerror or error}") from error
