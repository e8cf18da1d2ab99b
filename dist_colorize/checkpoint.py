"""Checkpoints that are whole or absent, whatever happens while one is written.

    save(folder, step, {"model": model.state_dict(), ...}, keep=3)
    found = newest(folder)        # (state, path, what was skipped and why), None where there is none yet

    with Writer(folder, keep=3) as writer:
        writer.save(step, state)  # copies the state and returns; a thread writes


A checkpoint gets its name only when every byte of it is on the disk and has been read back. It ends with a digest of
itself, so damage is noticed on loading. It holds tensors and plain values only and is loaded with `weights_only=True`:
a file from a stranger cannot run code.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import sys
import threading
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from dist_colorize.errors import RunFailed, UserError
from dist_colorize.files import TEMPORARY, link_atomically, replacing

LATEST, BEST = "latest", "best"
"""Symbolic links beside the checkpoints: to the newest one, and to the one that validated best."""

FORMAT = 1
"""Version of the layout, under the key `format` of every checkpoint."""

# The digest is the comment that a zip archive may end with. The CRC32 sums of torch's archives are not enough: they
# cover neither the headers nor the directory, and with one flipped bit there torch loads uninitialised memory.
_MARK = b"dist_colorize blake2b "
_DIGEST_BYTES = 16
_COMMENT_BYTES = len(_MARK) + 2 * _DIGEST_BYTES


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and how many to keep."""

    every: int = 1000
    """Optimizer steps from one checkpoint to the next; the last step is always saved."""
    keep: int = 3
    """Checkpoints that stay in the run folder: the newest ones. The one that validated best stays as well."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1 step, got {self.every}")
        if self.keep < 1:
            raise ValueError(f"keep must be at least 1 checkpoint, got {self.keep}")


class SaveError(RunFailed):
    """A checkpoint could not be written; those written before it are as they were."""


def save(folder: Path, step: int, state: Mapping[str, Any], keep: int = 3) -> Path:
    """Write `folder/step-XXXXXXXX.pt` and point `folder/latest` at it; returns its path.

    `state` may hold tensors on any device, numbers, strings, bytes, None, and dicts, lists and tuples of them; the keys
    `format` and `step` are added. Of the checkpoints up to this step the newest `keep` stay, and the one that `best`
    points at. Later ones are left alone: they are damaged (or this run would have gone on from them) and will be
    overwritten when their step comes.

    Raises SaveError when the disk is full or the folder cannot be written, TypeError for a value that could not be
    loaded again.
    """
    path = _save(folder, step, _portable(dict(state), "state"))
    _prune(folder, step, keep)
    return path


class Writer:
    """Saves one run's checkpoints in the background, at most one at a time.

    `save` copies the state and returns; a thread writes it. A save that fails says so on stderr and is over: older
    checkpoints are as they were, training goes on, and the next `save` tries again.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.failure: SaveError | None = None
        """Why the last save failed; None where it did not."""
        self.stall = 0.0
        """Seconds for which `save` has held its callers up since `read_stall` was called."""
        self._thread: threading.Thread | None = None

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Copies the state; a thread then does what the function `save` does.

        Waits for the save before it, if that is still being written: there is never more than one copy in memory.
        Raises TypeError for a value that could not be loaded again.
        """
        start = time.monotonic()
        self.wait()
        copied = _portable(dict(state), "state")
        # No daemon: a process that ends waits for what it has promised to write.
        self._thread = threading.Thread(target=self._write, args=(step, copied), name="checkpoint")
        self._thread.start()
        self.stall += time.monotonic() - start

    def mark_best(self, step: int) -> None:
        """Keeps the checkpoint of this step, which was the last to be saved, until another one is the best."""
        if self.wait() is None:
            try:
                link_atomically(self.folder / BEST, f"step-{step:08d}.pt")
            except OSError as error:
                print(f"WARNING: {_why_not_saved(self.folder / BEST, error)}", file=sys.stderr, flush=True)

    def wait(self) -> SaveError | None:
        """Returns when the last save is on the disk, or with the reason why it is not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self.failure

    def read_stall(self) -> float:
        """Seconds for which `save` held its callers up since this was last asked."""
        stall, self.stall = self.stall, 0.0
        return stall

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wait()

    def _write(self, step: int, state: dict[str, Any]) -> None:
        self.failure = None
        try:
            _save(self.folder, step, state)
            _prune(self.folder, step, self.keep)
        except SaveError as error:
            self.failure = error
        except Exception as error:  # this thread must not die unheard
            self.failure = SaveError(f"cannot save step {step}: {type(error).__name__}: {error}")
        if self.failure is not None:
            print(f"WARNING: {self.failure}; trying again at the next checkpoint", file=sys.stderr, flush=True)


def _save(folder: Path, step: int, portable: dict[str, Any]) -> Path:
    path = folder / f"step-{step:08d}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(TEMPORARY):
            stale.unlink(missing_ok=True)
        with replacing(path) as temporary:
            _write(temporary, {**portable, "format": FORMAT, "step": step})
            _check(temporary)
        link_atomically(folder / LATEST, path.name)  # for people and scripts; `newest` does not rely on it
    except OSError as error:
        raise SaveError(_why_not_saved(path, error)) from error
    except _Damaged as error:
        raise SaveError(f"{path} did not read back as it was written ({error}); check this disk") from error
    return path


def _prune(folder: Path, step: int, keep: int) -> None:
    best = None
    with contextlib.suppress(OSError):  # no best one yet
        best = (folder / BEST).readlink().name
    for _, old in [entry for entry in _entries(folder) if entry[0] <= step][keep:]:
        if old.name != best:
            with contextlib.suppress(OSError):  # what cannot be removed costs space, not work
                old.unlink()


def load(path: Path) -> dict[str, Any]:
    """The state in one checkpoint file, tensors on the CPU.

    Raises UserError when the file is missing, not whole, not a checkpoint of this package, or holds more than data.
    """
    try:
        _check(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror or error}") from None
    except _Damaged as error:
        raise UserError(f"{path} is not a whole checkpoint of dist_colorize: {error}; use another one") from None
    except Exception as error:  # torch's reader raises many kinds for a file that is no archive of tensors
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is refused: it does not hold plain tensors and values ({reason})") from None
    if state["format"] != FORMAT:
        raise UserError(
            f"{path} has format {state['format']}, this dist_colorize reads {FORMAT}; use the other version"
        )
    return state


def newest(folder: Path) -> tuple[dict[str, Any], Path, list[str]] | None:
    """The newest checkpoint that loads: its state, its path, and one line for each newer one that was skipped.

    None where the folder has no checkpoint. Raises UserError where it has some but none can be used: to start afresh
    must then be the user's decision.
    """
    skipped: list[str] = []
    for _, path in _entries(folder):
        try:
            return load(path), path, skipped
        except UserError as error:
            skipped.append(str(error))
    if skipped:
        lines = "\n  ".join(skipped)
        raise UserError(
            f"no checkpoint in {folder} can be used; to start afresh move them away or give another run.dir:\n  {lines}"
        )
    return None


def load_module(module: torch.nn.Module, weights: Mapping[str, torch.Tensor], source: str | Path) -> None:
    """Copy `weights` into `module`; names and shapes must be the same, or a UserError says how they differ."""
    own = module.state_dict()
    differences = [f"{name} is missing" for name in own if name not in weights]
    differences += [f"{name} is unknown here" for name in weights if name not in own]
    differences += [
        f"{name} is {list(weights[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if differences:
        more = f", and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise UserError(
            f"{source} holds another network than the config describes: {', '.join(differences[:3])}{more}; "
            "use the config.yaml of its run, or another run.dir for a new network"
        )
    module.load_state_dict(weights)


def _portable(value: Any, key: str) -> Any:
    """A copy of `value` on the CPU, of exactly the types that a `weights_only` load accepts."""
    if isinstance(value, torch.Tensor):
        # clone: a view would drag the whole storage below it into the file
        return value.detach().clone() if value.device.type == "cpu" else value.detach().cpu()
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, Mapping):
        return {_portable(name, f"{key} key"): _portable(item, f"{key}[{name!r}]") for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_portable(item, f"{key}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    for plain in (int, float, str):
        if isinstance(value, plain):  # e.g. numpy.float64, whose pickle names numpy
            return plain(value)
    raise TypeError(f"{key} is a {type(value).__name__}, which a checkpoint cannot hold: convert it to a tensor")


class _Damaged(Exception):
    """A file is not as it was written."""


class _Sink:
    """A file for torch.save that takes the digest of what it writes, and keeps the first OSError for later.

    torch's archive writer loses an exception of `write` and stops with an unrelated one.
    """

    def __init__(self, file: Any) -> None:
        self.file = file
        self.digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.digest.update(data)
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """Nothing yet: the file is flushed once, before it is synced."""


def _write(path: Path, state: dict[str, Any]) -> None:
    with open(path, "wb") as file:
        sink = _Sink(file)
        torch.save(state, sink)  # type: ignore[arg-type]
        if sink.error is not None:
            with contextlib.suppress(OSError):  # what is still buffered fails again when the file closes
                file.close()
            raise sink.error
        # An archive without a comment ends with the comment's length, two zero bytes.
        file.seek(-2, os.SEEK_END)
        file.write(_COMMENT_BYTES.to_bytes(2, "little") + _MARK + sink.digest.hexdigest().encode())


def _check(path: Path) -> None:
    """Read the file and compare its digest; raises OSError where it cannot be read, _Damaged where it is not whole."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size - _COMMENT_BYTES - 2
        while left > 0:
            block = file.read(min(left, 2**20))
            if not block:
                raise _Damaged("it shrank while it was read")
            digest.update(block)
            left -= len(block)
        end = file.read()
    digest.update(b"\0\0")  # the comment's length as torch wrote it
    if end[: -_DIGEST_BYTES * 2] != _COMMENT_BYTES.to_bytes(2, "little") + _MARK:
        raise _Damaged("its end is missing" if not zipfile.is_zipfile(path) else "it has no digest, others wrote it")
    if end[-_DIGEST_BYTES * 2 :] != digest.hexdigest().encode():
        raise _Damaged("its content does not have the digest that it was saved with")


def _entries(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of each checkpoint in the folder, newest first."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            match = re.fullmatch(r"step-(\d{8,})\.pt", path.name)
            if match:
                found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def _why_not_saved(path: Path, error: OSError) -> str:
    space = ""
    with contextlib.suppress(OSError):
        space = f" ({shutil.disk_usage(path.parent).free / 2**20:.0f} MiB free)"
    return (
        f"cannot save {path}: {error.strerror or error}{space}; "
        "older checkpoints are untouched; make room or make the folder writable, or move the run with run.dir"
    )
