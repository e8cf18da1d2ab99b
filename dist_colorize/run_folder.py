"""The folder of a run: a new one, the one that is given, or the one that torchrun's first attempt made."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import socket
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from dist_colorize.errors import UserError
from dist_colorize.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run keeps what it writes."""

    dir: str | None = None
    """The run folder itself: a new one, or one to go on from. Empty: a new folder below `root`."""
    root: str = "runs"
    """Folder of all runs."""
    name: str = "colorize"
    """First part of a new run folder's name; time and a digest of the config follow."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.+-]{1,100}", self.name) or self.name.startswith("."):
            raise ValueError(f'name must be letters, digits and ._+- without a dot in front, got "{self.name}"')
        if self.dir == "":
            raise ValueError("dir must be a folder, or null for a new one")


def make_run_folder(config: RunConfig, recipe_yaml: str, attempts: Path | None) -> Path:
    """Decide on the run folder, make it and print it.

    Its config.yaml becomes `recipe_yaml`; another one that is there already is kept as config.1.yaml, ...
    Workers that `torchrun --max-restarts` starts again find the folder of their first attempt in `attempts`, also
    without `dir`. Raises UserError when the folder cannot be made.
    """
    digest = hashlib.blake2b(recipe_yaml.encode("utf-8", "surrogateescape"), digest_size=3).hexdigest()
    path = Path(config.dir or Path(config.root) / f"{config.name}-{datetime.now():%Y%m%d-%H%M%S}-{digest}")
    try:
        if attempts and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) and attempts.exists():
            path = Path(config.root, attempts.read_text(encoding="utf-8"))
        elif not config.dir:
            path = _new_folder(path)
            if attempts:
                write_atomically(attempts, path.name.encode())
        for part in ("checkpoints", "tensorboard", "panels"):
            (path / part).mkdir(parents=True, exist_ok=True)
        _write_config(path, recipe_yaml)
    except OSError as error:
        key = "run.dir" if config.dir else "run.root"
        raise UserError(f"cannot make the run folder {path}: {error.strerror or error}; set {key}") from error
    print(f"run: {path}", flush=True)
    return path


def attempts_file(config: RunConfig) -> Path | None:
    """Where the attempts of one torchrun note the run folder; None where it is given or nothing starts workers again.

    A hidden file in the folder of all runs. torchrun names a job by --rdzv-id, or by a random one (--standalone);
    where it has no name, its own process is one.
    """
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    if config.dir or job is None:
        return None
    if job == "none":
        job = f"{socket.gethostname()} {os.getppid()}"
    return Path(config.root, f".torchrun-{hashlib.blake2b(job.encode(), digest_size=6).hexdigest()}")


def _new_folder(path: Path) -> Path:
    """Make a folder that nobody has: two runs may start in the same second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1000):
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with contextlib.suppress(FileExistsError):
            candidate.mkdir()
            return candidate
    raise FileExistsError(f"{path} and 999 more are there already")


def _write_config(path: Path, recipe_yaml: str) -> None:
    current = path / "config.yaml"
    if current.exists() and current.read_text(encoding="utf-8") != recipe_yaml:
        number = next(n for n in range(1, sys.maxsize) if not (path / f"config.{n}.yaml").exists())
        shutil.copy2(current, path / f"config.{number}.yaml")
    write_atomically(current, recipe_yaml.encode())
