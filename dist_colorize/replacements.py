"""Photographs that could not be used although the index has them: each is listed once, whichever ranks met it."""

from __future__ import annotations

from collections.abc import Iterable

from dist_colorize.data.loader import Replaced
from dist_colorize.distributed import World
from dist_colorize.tracking import Run


class Replacements:
    """What replaced.jsonl in the run folder says, the same on every rank."""

    def __init__(self, run: Run, world: World) -> None:
        self._run, self._world = run, world
        self._listed: set[tuple[str, str]] = world.broadcast_object(run.replaced_before())

    def share(self, step: int, own: Iterable[Replaced]) -> int:
        """Lists what this or another rank has met since; returns how many are listed. A collective."""
        fresh = [one for one in own if (one.root, one.name) not in self._listed]
        if self._world.agree(bool(fresh)):
            met = {(one.root, one.name): one.reason for some in self._world.gather_objects(fresh) for one in some}
            self._run.replaced(step, [{"root": r, "name": name, "reason": why} for (r, name), why in met.items()])
            self._listed.update(met)
        return len(self._listed)
