"""What a run saves, when it must, and how it goes on from what it has saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from dist_colorize import checkpoint, config
from dist_colorize.checkpoint import SaveError, Writer
from dist_colorize.distributed import World
from dist_colorize.errors import UserError
from dist_colorize.optimisation import Optimisation
from dist_colorize.recipe import Recipe
from dist_colorize.tracking import Run


def newest_checkpoint(run: Run, world: World) -> dict[str, Any] | None:
    """The newest whole checkpoint of the run folder, the same one on every rank; says what was skipped, and whether
    this world will round otherwise than the one that made it."""

    def find() -> str | None:
        found = checkpoint.newest(run.checkpoints)
        if found is None:
            return None
        state, path, skipped = found
        for line in skipped:
            print(f"skipped: {line}", flush=True)
        print(f"resuming from {path}, step {state['step']}", flush=True)
        then, now = (len(state["rng"]), state["threads"]), (world.size, world.threads)
        if then != now:
            print(
                f"made by {then[0]} ranks of {then[1]} CPU threads, resumed by {now[0]} of {now[1]}: the same samples, "
                "but sums are rounded otherwise (see distributed.threads)",
                flush=True,
            )
        return str(path)

    path = world.wait_for(find)
    return None if path is None else checkpoint.load(Path(path))


def check_same_run(state: Mapping[str, Any], recipe: Recipe, fingerprint: str) -> None:
    """Raises UserError when a resumed run would not be the same run: other data, order, network or loss."""
    if state["fingerprint"] != fingerprint:
        raise UserError(
            f"data.root={recipe.data.root}: the photographs are not those of the checkpoint (fingerprint "
            f"{fingerprint[:12]}, was {state['fingerprint'][:12]}); give those, or another run.dir to start anew",
            shared=True,
        )
    now, then = config.to_dict(recipe), state["config"]
    fixed = {
        "data": ("crop", "scale", "ratio", "flip"),
        "model": tuple(now["model"]),
        "loss": tuple(now["loss"]),
        "train": ("global_batch", "lr", "warmup", "schedule", "clip", "ema", "seed"),
    }
    for section, names in fixed.items():
        for name in names:
            if now[section][name] != then[section][name]:
                raise UserError(
                    f"{section}.{name}={now[section][name]}: the checkpoint was made with {then[section][name]}; set "
                    f"{section}.{name}={then[section][name]}, or give another run.dir to start anew",
                    shared=True,
                )


class Checkpoints:
    """The checkpoints of one run. All methods are collectives; rank 0 writes, in a thread, while training goes on."""

    def __init__(
        self, recipe: Recipe, run: Run, world: World, optimisation: Optimisation, facts: Mapping[str, Any]
    ) -> None:
        """`facts`: what every checkpoint holds besides the state of the optimisation."""
        self._recipe, self._world, self._optimisation = recipe, world, optimisation
        self._facts = {
            **facts,
            "config": config.to_dict(recipe),
            "run": str(run.path),
            "threads": world.threads,
            "precision": optimisation.precision,
        }
        self._writer = Writer(run.checkpoints, recipe.checkpoint.keep)
        self._saved = 0
        self._best: float | None = None

    def restore(self, state: Mapping[str, Any]) -> int:
        """Puts the state of a checkpoint back; returns its step. Says when this run computes in another precision."""
        then, now = state.get("precision"), self._optimisation.precision
        if self._world.is_leader and then not in (None, now):
            scale = "; the loss scale of fp16 starts anew" if now == "fp16" else ""
            print(f"made in {then}, resumed in {now}{scale} (see train.precision)", flush=True)
        self._optimisation.load_state_dict(state)
        torch.set_rng_state(state["rng"][self._world.rank % len(state["rng"])])
        self._saved, self._best = int(state["step"]), state["best"]
        return self._saved

    def save(self, step: int) -> None:
        """Copies the state after `step` steps, and leaves it to be written. A save that fails is told, not raised."""
        settings = self._recipe.train
        state = self._optimisation.state_dict() | {
            **self._facts,
            "step": step,
            "position": step * settings.global_batch,
            "schedule": {"learning_rate": settings.learning_rate(step)},
            "rng": self._world.gather_objects(torch.get_rng_state()),
            "best": self._best,
        }
        if self._world.is_leader:
            self._writer.save(step, state)
        self._saved = step

    def keep_if_best(self, step: int, score: float) -> None:
        """Keeps the state after `step` steps for good while no later one scores higher."""
        if step and (self._best is None or score > self._best):
            self._best = score
            if step != self._saved:
                self.save(step)
            if self._world.is_leader:
                self._writer.mark_best(step)

    def save_before_leaving(self, step: int) -> None:
        """Returns when the state after `step` steps is on the disk; tries once more where its save had failed."""
        if step > self._saved or self._world.wait_for(lambda: self._writer.wait() is not None):
            self.save(step)
        self.finish()

    def finish(self) -> None:
        """Returns when the last save is on the disk; raises SaveError where it failed."""
        failure = self._world.wait_for(lambda: str(self._writer.wait() or ""))
        if failure:
            raise SaveError(failure, shared=True)

    def read_stall(self) -> float:
        """Seconds for which saving has held up this rank since this was last asked."""
        return self._writer.read_stall()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.wait()
