"""Scores trained runs on photographs whose colours are known.

    python -m dist_colorize.evaluate runs/RUN                        # its own validation photographs
    python -m dist_colorize.evaluate runs/A runs/B data.val_root=/photos/val
    python -m dist_colorize.evaluate runs/RUN evaluate.preset=blend
    torchrun --nproc_per_node=8 -m dist_colorize.evaluate runs/RUN   # the photographs shared out over 8 GPUs

Each run is taken with the recipe it was trained with (RUN/config.yaml), changed by the overrides, and its newest
whole checkpoint. The table goes to the screen, and with its protocol to RUN/evaluation.json; pictures to
RUN/panels/final.png.

Exit codes: 0 finished, 75 interrupted by a signal, 1 failed, 2 bad usage.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dist_colorize import config
from dist_colorize.data import evaluation_batches, open_photographs
from dist_colorize.distributed import StopFlag, World, session
from dist_colorize.errors import UserError, run_command
from dist_colorize.evaluation import Evaluation, evaluate, protocol, write_evaluation
from dist_colorize.postprocess.stages import load_preset
from dist_colorize.postprocess.trained import find_trained
from dist_colorize.recipe import Recipe


def main(argv: Sequence[str] | None = None) -> None:
    runs, overrides = _arguments(argv)
    recipes = [config.load(Recipe, run / "config.yaml", overrides) for run in runs]
    with session(recipes[0].distributed) as world, StopFlag() as stop:
        for run, recipe in zip(runs, recipes, strict=True):
            result = score(run, recipe, world, stop)
            if world.is_leader:
                write_evaluation(run, result, protocol(recipe.data, recipe.evaluate.preset))
                print(f"{run}: {result.count} photographs\n{result.table()}\npictures: {run / 'panels' / 'final.png'}")


def score(run: Path, recipe: Recipe, world: World, stop: StopFlag) -> Evaluation:
    """The evaluation of a run's newest network on the validation photographs of the recipe; a collective."""
    preset = load_preset(recipe.evaluate.preset)
    _, validation = open_photographs(recipe.data, world, stop)
    network = find_trained(run).network.to(world.device)
    batches = evaluation_batches(validation, recipe.data, world, recipe.evaluate.batch)
    return evaluate(network, batches, preset, world, recipe.evaluate.pictures, stop)


def _arguments(argv: Sequence[str] | None) -> tuple[list[Path], list[str]]:
    what, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m dist_colorize.evaluate",
        description=what,
        epilog=f"examples:\n\n{more}\nKeys are those of python -m dist_colorize.train --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "arguments", nargs="+", metavar="RUN|key=value", help="run folders, and overrides for all of them"
    )
    given = parser.parse_args(argv).arguments
    # a folder may hold an equals sign; a key never holds a slash
    overrides = [
        text for text in given if "=" in text and "/" not in text.partition("=")[0] and not Path(text).is_dir()
    ]
    runs = [Path(text) for text in given if text not in overrides]
    if not runs:
        raise UserError("name at least one run folder to evaluate: python -m dist_colorize.evaluate runs/RUN")
    return runs, overrides


if __name__ == "__main__":
    run_command(main)
