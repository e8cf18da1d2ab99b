"""The index of a data set on disk: one memory-mapped array per column, one row per usable photograph.

Opening it reads nothing: a data set of any size costs no memory until rows are asked for, and all ranks of a machine
share the pages. Rows are sorted by a hash of the file name. So the first share of the rows is a random choice of files
that stays the same when others are added: that is the validation split.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_colorize.data.inspect import FORMATS, Facts
from dist_colorize.data.scan import Candidate, read_part
from dist_colorize.errors import UserError

VERSION = 1

DTYPES = {
    "names": np.uint8,
    "name_ends": np.int64,
    "shard": np.int32,
    "offset": np.int64,
    "length": np.int64,
    "width": np.int32,
    "height": np.int32,
    "format": np.uint8,
    "key": np.uint64,
}


@dataclass(frozen=True, eq=False)
class Photographs:
    """The usable photographs below `root`, or a stretch of their rows."""

    root: str
    """Absolute path of the data."""
    fingerprint: str
    """sha256 over names, byte counts, widths and heights in row order; the same wherever the data lie."""
    index: str
    """Fingerprint of the whole index, of which these may be a stretch."""
    shards: tuple[str, ...]
    """Tar shards, relative to the root."""
    names: NDArray[np.uint8]
    """All names, one after the other, as the bytes that the file system gave."""
    name_ends: NDArray[np.int64]
    """[N + 1]: row i is called names[name_ends[i] : name_ends[i + 1]]."""
    shard: NDArray[np.int32]
    """[N] place in `shards`, -1 for a file of its own."""
    offset: NDArray[np.int64]
    """[N] first byte within the shard."""
    length: NDArray[np.int64]
    """[N] bytes."""
    width: NDArray[np.int32]
    """[N] pixels as displayed, after EXIF's rotation."""
    height: NDArray[np.int32]
    """[N] pixels as displayed, after EXIF's rotation."""
    format: NDArray[np.uint8]
    """[N] place in data.inspect.FORMATS."""
    key: NDArray[np.uint64]
    """[N] ascending: hash of the name."""

    def __len__(self) -> int:
        return len(self.key)

    def name(self, row: int) -> str:
        """Relative name of a row; what is not UTF-8 in it as surrogate escapes."""
        return os.fsdecode(self.names[self.name_ends[row] : self.name_ends[row + 1]].tobytes())

    def format_name(self, row: int) -> str:
        """ "JPEG", "PNG", "WebP", "TIFF" or "BMP"."""
        return FORMATS[self.format[row]]

    def read(self, row: int) -> bytes:
        """The encoded image. OSError when it has gone, or changed since it was indexed."""
        shard = int(self.shard[row])
        path = Path(self.root, self.shards[shard] if shard >= 0 else self.name(row))
        return read_part(path, int(self.offset[row]), int(self.length[row]), whole=shard < 0)

    def rows(self, start: int, stop: int) -> Photographs:
        """Rows start..stop-1 as an index of their own, with its own fingerprint; copies nothing."""
        if (start, stop) == (0, len(self)):
            return self
        part = slice(start, stop)
        columns = {name: getattr(self, name)[part] for name in DTYPES if name not in ("names", "name_ends")}
        fingerprint = sha256(f"{self.fingerprint} rows {start}:{stop}".encode()).hexdigest()
        ends = self.name_ends[start : stop + 1]
        return dataclasses.replace(self, fingerprint=fingerprint, name_ends=ends, **columns)

    def split(self, fraction: float) -> tuple[Photographs, Photographs]:
        """(training, validation): the files whose hash lies in the first `fraction` validate, at least one of them.

        A file keeps its side when others come or go. UserError when there are too few files for two sides.
        """
        if not fraction:
            return self, self.rows(0, 0)
        if len(self) < 2:
            raise UserError(f"{self.root}: one photograph cannot be split; set data.val_fraction=0, or data.val_root")
        count = int(np.searchsorted(self.key, np.uint64(int(fraction * 2**64))))
        count = min(max(count, 1), len(self) - 1)
        return self.rows(count, len(self)), self.rows(0, count)


def write_columns(folder: Path, root: str, shards: list[str], rows: list[tuple[Candidate, Facts]]) -> dict[str, Any]:
    """Write the rows into an existing empty folder, sorted; returns the description, which is written last of all."""
    names = [os.fsencode(candidate.name) for candidate, _ in rows]
    key = np.array([name_key(name) for name in names], dtype=np.uint64)
    order = sorted(range(len(rows)), key=lambda i: (key[i], names[i], rows[i][0].offset))
    lengths = np.array([len(names[i]) for i in order], dtype=np.int64)
    columns: dict[str, NDArray[Any]] = {
        "names": np.frombuffer(b"".join(names[i] for i in order), dtype=np.uint8),
        "name_ends": np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)]),
        "key": key[order],
    }
    for column, owner in {"shard": 0, "offset": 0, "length": 0, "width": 1, "height": 1, "format": 1}.items():
        columns[column] = np.array([getattr(rows[i][owner], column) for i in order], dtype=DTYPES[column])
    digest = sha256()
    for column in ("names", "name_ends", "length", "width", "height"):
        digest.update(columns[column].astype(columns[column].dtype.newbyteorder("<")).tobytes())
    for column, dtype in DTYPES.items():
        np.save(folder / f"{column}.npy", columns[column].astype(dtype))
    return {"version": VERSION, "root": root, "fingerprint": digest.hexdigest(), "shards": shards, "usable": len(rows)}


def open_index(folder: Path) -> Photographs:
    """The index that a folder holds, memory-mapped. UserError when it holds none, or one of another version."""
    try:
        about = describe(folder)
        columns = {name: _map(folder / f"{name}.npy") for name in DTYPES}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: not an index, or a damaged one ({error}); "
            "build it again with python -m dist_colorize.index ROOT --rebuild"
        ) from error
    fingerprint = about["fingerprint"]
    return Photographs(about["root"], fingerprint, fingerprint, tuple(about["shards"]), **columns)


def describe(folder: Path) -> dict[str, Any]:
    """What index.json says. OSError or ValueError when it is missing, damaged or of another version."""
    about: dict[str, Any] = json.loads((folder / "index.json").read_text("utf-8"))
    if not isinstance(about, dict) or about.get("version") != VERSION:
        raise ValueError("written by another version of dist_colorize")
    return about


def name_key(name: bytes) -> int:
    """A 64-bit hash by which files are sorted: the same on every machine."""
    return int.from_bytes(blake2b(name, digest_size=8).digest(), "little")


def _map(path: Path) -> NDArray[Any]:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return np.asarray(array)  # a plain view of the mapping: np.memmap's own slicing is several times slower
