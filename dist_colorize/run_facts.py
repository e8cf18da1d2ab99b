"""What run folders say of themselves: state, steps, settings, scores. Reads only."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from dist_colorize.errors import UserError
from dist_colorize.tracking import flatten

SILENCE = timedelta(minutes=10)
"""A run on another machine that has not renewed its status for so long is no longer running."""
IDENTITY = ("run.dir", "run.root", "run.name")
"""Settings that say where a run lies, not what it is."""


@dataclass(frozen=True)
class RunFacts:
    """What a run folder says of itself."""

    path: Path
    state: str
    step: int | None
    """Of the last checkpoint or log line."""
    settings: dict[str, Any]
    """By dotted key."""
    scores: dict[str, dict[str, float]]
    """Stage -> metric -> value; empty for a run that was never evaluated."""
    updated: datetime
    protocol: dict[str, Any]
    """What the scores were computed on; empty while they are those of the last validation."""

    @property
    def scored_on(self) -> str:
        """The protocol in short: two runs' scores compare only where this is the same."""
        if not self.protocol:
            return "last validation" if self.scores else "-"
        facts = self.protocol
        return f"{facts.get('photographs')} of {facts.get('data')} at {facts.get('size')} px, {facts.get('preset')}"

    @property
    def steps(self) -> int | None:
        """How many it was to make."""
        return self.settings.get("train.steps")

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl or validation.jsonl."""
        return read_lines(self.path / name)


def read_run(path: Path) -> RunFacts | None:
    """The run in a folder; None where it holds none."""
    if path.is_symlink() or not (path / "config.yaml").is_file() or not (path / "checkpoints").is_dir():
        return None
    try:
        settings = flatten(yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")) or {})
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
        settings = {}
    status = read_json(path / "status.json")
    updated = _time(status.get("updated")) or datetime.fromtimestamp((path / "config.yaml").stat().st_mtime, UTC)
    state = str(status.get("state", "failed"))
    if state == "running" and not _lives(status, updated):
        state = "failed"
    logged = [line["step"] for line in read_lines(path / "metrics.jsonl")[-1:]]
    steps = [step for step in (status.get("step"), *logged) if isinstance(step, int)]
    evaluation = read_json(path / "evaluation.json")
    scores = evaluation.get("scores") or {}
    if not scores:
        scores = next((line["scores"] for line in read_lines(path / "validation.jsonl")[-1:]), {})
    return RunFacts(path, state, max(steps, default=None), settings, scores, updated, evaluation.get("protocol") or {})


def find_runs(root: Path) -> list[RunFacts]:
    """The runs below a folder, oldest first."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; name the folder of your runs with --root")
    found = [read_run(path) for path in sorted(root.iterdir()) if path.is_dir()]
    return sorted((run for run in found if run is not None), key=lambda run: run.updated)


def differing(runs: Sequence[RunFacts]) -> dict[str, list[Any]]:
    """Dotted key -> its value in each run, for the settings that are not the same in all of them."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in IDENTITY)
    table = {key: [run.settings.get(key, "(not set)") for run in runs] for key in keys}
    return {key: values for key, values in table.items() if any(value != values[0] for value in values)}


def score(run: RunFacts, stage: str, metric: str) -> float | None:
    """A run's score, None where it has none."""
    return run.scores.get(stage, {}).get(metric)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a .jsonl file; none where there is no file."""
    found = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                fact = json.loads(line)
            except ValueError:
                continue
            if isinstance(fact, dict) and isinstance(fact.get("step"), int):
                found.append(fact)
    return found


def _lives(status: Mapping[str, Any], updated: datetime) -> bool:
    if status.get("host") != socket.gethostname():
        return datetime.now(UTC) - updated < SILENCE
    try:
        os.kill(int(status.get("pid", 0)) or -1, 0)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True


def read_json(path: Path) -> dict[str, Any]:
    """The object in a .json file; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _time(text: Any) -> datetime | None:
    try:
        found = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def size_of(path: Path) -> str:
    """Megabytes in a folder."""
    sizes = (file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
    return f"{sum(sizes) / 1e6:.1f}"
