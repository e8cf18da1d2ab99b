"""Which photographs a command line means, and where each result goes: below the output folder, no two in one place.

IN                       result
portrait.jpg             OUT/portrait.jpg
archive/ (1931/a.png)    OUT/1931/a.png
'scans/**/*.tif'         OUT/ and the path from scans/ on
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dist_colorize.errors import UserError
from dist_colorize.postprocess.encode import FORMATS, output_name
from dist_colorize.postprocess.images import Source
from dist_colorize.text import printable

SUFFIXES = FORMATS.keys() | {".bmp", ".gif", ".avif", ".heic", ".heif"}
"""What counts as a photograph in a folder; a file that is named itself may be called anything."""
WILDCARDS = "*?["


@dataclass(frozen=True)
class Job:
    """One photograph to colorize."""

    source: Source
    target: Path
    """The result. The confidence map and the others lie beside it, named after it."""
    name: str
    """What reports call it; printable."""

    def beside(self, what: str, suffix: str) -> Path:
        """photo.jpg -> photo.jpg.confidence.png: the whole name, since a photo.tif may be its neighbour."""
        return self.target.with_name(f"{self.target.name}.{what}{suffix}")


def plan(arguments: Sequence[str], output: Path) -> tuple[list[Job], list[str]]:
    """The jobs that files, folders and patterns stand for, in order of their names, and complaints.

    Raises UserError when two photographs would be written to one place, a result would replace its own photograph, or
    nothing at all was found.
    """
    found: list[tuple[Path, Path]] = []
    complaints = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            found += ((file, file.relative_to(path)) for file in walk(path, output))
        elif os.path.lexists(path):
            found.append((path, Path(path.name)))
        elif any(sign in argument for sign in WILDCARDS):
            matches = list(_matches(argument, output))
            found += matches
            if not matches:
                complaints.append(f"{printable(argument)}: matches no photograph")
        else:
            complaints.append(f"{printable(argument)}: no such file or folder")
    if not found:
        raise UserError("; ".join(complaints) or f"no photographs in {', '.join(map(printable, arguments))}")
    return place(found, output), complaints


def place(found: Iterable[tuple[Source, Path | str]], output: Path) -> list[Job]:
    """Jobs for pairs of (photograph, path relative to the output folder); see `plan` for what is refused."""
    root = output.resolve()
    taken: dict[Path, Source] = {}
    jobs = []
    for source, relative in sorted(found, key=lambda pair: str(pair[1])):
        target = inside(root, relative)
        if target in taken:
            if _same(taken[target], source):
                continue
            raise UserError(
                f"{_describe(taken[target])} and {_describe(source)} would both be written to {printable(target)}: "
                "give the folder that holds both, or colorize them one by one into different --output folders"
            )
        if isinstance(source, Path) and target.exists() and target.samefile(source):
            raise UserError(f"{printable(source)} would be replaced by its own result: give another --output")
        taken[target] = source
        jobs.append(Job(source, target, _describe(source)))
    return jobs


def inside(root: Path, relative: Path | str) -> Path:
    """The place of a result below `root` (resolved). UserError when `..`, an absolute path or a symlink leads out."""
    parts = PurePosixPath(relative).parts
    if not parts or PurePosixPath(relative).is_absolute() or ".." in parts:
        raise UserError(f"{printable(relative)} is no path inside the output folder")
    target = root.joinpath(*parts[:-1], output_name(parts[-1]))
    if not target.parent.resolve().is_relative_to(root):
        raise UserError(f"{printable(target.parent)} is a link that leads out of the output folder: remove the link")
    return target


def walk(folder: Path, skip: Path) -> Iterator[Path]:
    """The photographs below a folder, sorted. Each folder counts once, links included; `skip` and dot files do not."""
    seen = {_identity(skip)} if skip.is_dir() else set()
    pending = [folder]
    while pending:
        here = pending.pop()
        if _identity(here) in seen and here != folder:
            continue
        seen.add(_identity(here))
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"folder {printable(here)} cannot be read: {error.strerror}") from None
        folders = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(Path(entry.path))
            elif Path(entry.name).suffix.lower() in SUFFIXES:
                yield Path(entry.path)
        pending += reversed(folders)


def _matches(pattern: str, output: Path) -> Iterator[tuple[Path, Path]]:
    """What a pattern matches, with the paths from its first wildcard's folder on; folders stand for what is in them."""
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if any(sign in part for sign in WILDCARDS))
    base = Path(*parts[:fixed])
    for match in sorted(glob.glob(pattern, recursive=True)):  # noqa: PTH207 - Path.glob takes no absolute patterns
        path = Path(match)
        if not path.is_dir():
            yield path, path.relative_to(base)
        elif "**" not in pattern:
            yield from ((file, file.relative_to(base)) for file in walk(path, output))


def _same(one: Source, other: Source) -> bool:
    if isinstance(one, Path) and isinstance(other, Path):
        return os.path.realpath(one) == os.path.realpath(other)
    return one == other


def _describe(source: Source) -> str:
    return printable(source if isinstance(source, Path) else source.name)


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
