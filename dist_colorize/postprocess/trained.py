"""Finds the trained network that a user means, and the photographs that its run validates on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dist_colorize import checkpoint
from dist_colorize.data import open_photographs
from dist_colorize.distributed import DistributedConfig, session
from dist_colorize.errors import UserError
from dist_colorize.models import restore
from dist_colorize.postprocess.images import Stored
from dist_colorize.recipe import recipe_of
from dist_colorize.stopping import StopFlag


@dataclass(frozen=True)
class Trained:
    """A network ready for use, and where it comes from."""

    network: Any
    file: Path
    """The checkpoint."""
    run: Path | None
    """The run's folder; None for a checkpoint that lies elsewhere."""
    size: int
    """Side of the squares it was trained on, in pixels."""
    skipped: list[str]
    """One line for each newer checkpoint that could not be used."""


def find_trained(where: Path) -> Trained:
    """The newest usable network in a run folder or a checkpoints folder, or the one in a checkpoint file.

    Raises UserError when there is none, or when it is broken or of another architecture.
    """
    skipped: list[str] = []
    if where.is_dir():
        folder = where / "checkpoints" if (where / "checkpoints").is_dir() else where
        found = checkpoint.newest(folder)
        if found is None:
            raise UserError(f"{where} holds no checkpoint: give a run folder, its checkpoints folder or a .pt file")
        state, file, skipped = found
    else:
        state, file = checkpoint.load(where), where
    try:
        network = restore(state)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    parent = file.absolute().parent
    run = parent.parent if parent.name == "checkpoints" and (parent.parent / "config.yaml").is_file() else None
    return Trained(network, file, run, state["config"]["data"]["crop"], skipped)


def newest_run(root: Path) -> Path:
    """The run below `root` whose newest checkpoint is the newest of all."""

    def age(run: Path) -> float:
        return max((file.stat().st_mtime for file in (run / "checkpoints").glob("*.pt")), default=0.0)

    runs = [(age(run), run) for run in root.iterdir() if run.is_dir()] if root.is_dir() else []
    written, run = max(runs, default=(0.0, root))
    if not written:
        raise UserError(
            f"no trained run in {root}/ here: train one (torchrun --nproc_per_node=2 -m dist_colorize.train), "
            "or name one with --checkpoint RUN"
        )
    return run


def photographs_of(run: Path, stop: StopFlag) -> list[Stored]:
    """The photographs that the run validates on; some may lie in tar archives."""
    recipe = recipe_of(run)
    with session(DistributedConfig(device="cpu")) as world:
        _, validation = open_photographs(recipe.data, world, stop)
    return [Stored(validation.name(row), partial(validation.read, row)) for row in range(len(validation))]
