"""Builds the index of a data set, keeps it in the user's cache, and notices when it is out of date."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

from tqdm import tqdm

from dist_colorize.data.columns import VERSION, describe, open_index, write_columns
from dist_colorize.data.inspect import Facts
from dist_colorize.data.inspectors import inspect_all
from dist_colorize.data.scan import Candidate, Scan, scan
from dist_colorize.errors import Interrupted, UserError
from dist_colorize.text import printable

KEPT = 4
"""Earlier indexes of a folder that stay beside the current one, for runs that began with them."""

Rejection = tuple[str, str]
"""Name relative to the root, and the reason."""


def ensure_index(
    root: Path,
    min_side: int,
    parent: Path | None = None,
    progress: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Path:
    """The folder of an index of `root` that is up to date, built now when there is none. Errors as build_index."""
    folder = index_folder(root, min_side, parent)
    return folder if is_fresh(folder) else build_index(root, min_side, parent, progress, stop)


def index_folder(root: Path, min_side: int, parent: Path | None = None) -> Path:
    """Where the index of `root` is kept: below `parent`, or in the user's cache folder."""
    _require_folder(root)
    settings = f"{VERSION}\0{min_side}\0".encode() + os.fsencode(root.resolve())
    return (parent or cache_folder() / "index").absolute() / sha256(settings).hexdigest()[:20]


def index_of(folder: Path, fingerprint: str) -> Path | None:
    """Where the index with this fingerprint is, if it is the one in `folder` or was so not long ago; else None.

    Whether the photographs have changed since does not matter. An earlier index that is asked for stays longer.
    """
    for place in (folder, _kept(folder, fingerprint)):
        with contextlib.suppress(OSError, ValueError, KeyError):
            if describe(place)["fingerprint"] == fingerprint:
                with contextlib.suppress(OSError):  # another user's
                    os.utime(place)
                return place
    return None


def cache_folder() -> Path:
    """The folder of this program in the user's cache (XDG_CACHE_HOME, by default ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dist_colorize"


def is_fresh(folder: Path) -> bool:
    """Whether `folder` holds an index, and no folder or shard that it was made from has changed since.

    Files that are replaced in place under their old name are not seen; reading one later fails, and it is substituted.
    """
    try:
        root = describe(folder)["root"]
        watched = json.loads((folder / "watched.json").read_text("utf-8"))
        for name, modified, size in watched:
            status = Path(root, name).stat()
            if status.st_mtime_ns != modified or (not stat.S_ISDIR(status.st_mode) and status.st_size != size):
                return False
        open_index(folder)
    except (OSError, ValueError, KeyError, UserError):
        return False
    return True


def build_index(
    root: Path,
    min_side: int,
    parent: Path | None = None,
    progress: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Scan `root` and write its index; returns the folder, whose old content is replaced at once and as a whole.

    The old index is kept for a while: see `index_of`.

    Raises UserError when the root cannot be listed or holds nothing usable, or when the index cannot be written;
    Interrupted soon after `stop()` turns true. `progress` draws a bar on stderr.
    """
    folder = index_folder(root, min_side, parent)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        found = scan(root, skip=folder.parent, stop=stop)
        rows: list[tuple[Candidate, Facts]] = []
        rejected = found.rejected
        with (
            tqdm(total=len(found.candidates), unit="file", desc="index", disable=not progress, smoothing=0.05) as bar,
            contextlib.closing(inspect_all(root, found, min_side, stop)) as results,
        ):
            for candidate, result in results:
                if isinstance(result, Facts):
                    rows.append((candidate, result))
                else:
                    rejected.append((candidate.name, result))
                bar.update()
        rejected.sort()
        if stop():
            raise Interrupted("while the photographs were indexed; the next start begins again")
        if not rows:
            raise UserError(_nothing_usable(root, found, rejected))
        with _new_folder(folder) as new:
            about = write_columns(new, os.fspath(root.resolve()), found.shards, rows)
            (new / "watched.json").write_text(json.dumps(found.watched), "utf-8")
            with open(new / "rejected.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps({"name": name, "reason": reason}) + "\n" for name, reason in rejected)
            about |= {"ignored": found.ignored, "rejected": Counter(_kind(reason) for _, reason in rejected)}
            (new / "index.json").write_text(json.dumps(about, indent=2), "utf-8")
    except OSError as error:
        raise UserError(
            f"{folder.parent}: cannot write the index ({error.strerror or error}); name a writable folder with "
            "--output (in a recipe: data.index_dir) or with the environment variable XDG_CACHE_HOME"
        ) from error
    return folder


def rejections(folder: Path) -> Iterator[Rejection]:
    """What was left out of an index, sorted by name."""
    with open(folder / "rejected.jsonl", encoding="utf-8") as file:
        for line in file:
            entry = json.loads(line)
            yield entry["name"], entry["reason"]


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends well."""
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield new
        new.chmod(0o755)
        while True:
            try:
                new.rename(folder)
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            _set_aside(folder, new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _set_aside(folder: Path, new: Path) -> None:
    """Move the index in `folder` out of the way of the new one, and forget all but the newest of those moved so far.

    Whoever has an index open keeps its mapped pages. Another process may be doing the same.
    """
    old = new.with_name(new.name + ".old")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(old)
    with contextlib.suppress(OSError, ValueError, KeyError):  # none, or a damaged one
        fingerprint = describe(old)["fingerprint"]
        if fingerprint != describe(new)["fingerprint"]:
            with contextlib.suppress(OSError):  # it is kept already
                old.rename(_kept(folder, fingerprint))
            os.utime(_kept(folder, fingerprint))
    shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        kept = sorted(folder.parent.glob(f"{folder.name}.*"), key=lambda place: place.stat().st_mtime)
        for place in kept[:-KEPT]:
            shutil.rmtree(place, ignore_errors=True)


def _kept(folder: Path, fingerprint: str) -> Path:
    return folder.with_name(f"{folder.name}.{fingerprint[:20]}")


def _require_folder(root: Path) -> None:
    try:
        status = root.stat()
    except OSError as error:
        raise UserError(f"{root}: cannot open the data folder ({error.strerror}); check data.root") from error
    if not stat.S_ISDIR(status.st_mode):
        raise UserError(f"{root}: not a folder; name the folder that holds the photographs or the tar shards")


def _kind(reason: str) -> str:
    """The part of a reason by which rejections are counted."""
    return reason.split(":")[0]


def by_reason(rejected: dict[str, int]) -> str:
    """A line for each reason, the most frequent first."""
    return "".join(f"\n{count:10,}  {reason}" for reason, count in Counter(rejected).most_common())


def _nothing_usable(root: Path, found: Scan, rejected: list[Rejection]) -> str:
    if not rejected:
        others = f"; none of its {found.ignored:,} files is called like one" if found.ignored else ""
        return f"{root}: no photographs here (JPEG, PNG, WebP, TIFF, BMP, or tar shards of them){others}"
    counts = by_reason(Counter(_kind(reason) for _, reason in rejected))
    name, reason = rejected[0]
    return f"{root}: no usable photograph; left out: {len(rejected):,}{counts}\nfor example {printable(name)}: {reason}"
