"""Scores trained runs on photographs whose colours are known.

    python -m dist_colorize.evaluate runs/RUN                        # its own validation photographs
    python -m dist_colorize.evaluate runs/A runs/B data.val_root=/photos/val
    python -m dist_colorize.evaluate runs/RUN evaluate.preset=blend
    python -m dist_colorize.evaluate runs/A runs/B --report evaluate.pictures=24
    torchrun --nproc_per_node=8 -m dist_colorize.evaluate runs/RUN   # the photographs shared out over 8 GPUs

Each run is taken with the recipe it was trained with (RUN/config.yaml), changed by the overrides, and its newest
whole checkpoint. The table goes to the screen, and with its protocol to RUN/evaluation.json; the scores of each
photograph to RUN/photographs.jsonl; pictures to RUN/panels/final.png. --report writes report.html into the first run's
folder: one file for any browser, without network, that shows all the runs named.

Exit codes: 0 finished, 75 interrupted by a signal, 1 failed, 2 bad usage.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from dist_colorize import config
from dist_colorize.color.rebalance import LossConfig, class_weights, prior
from dist_colorize.data import Photographs, evaluation_batches, open_photographs
from dist_colorize.data.histogram import count_colours
from dist_colorize.data.preflight import decoding_device
from dist_colorize.distributed import World, session
from dist_colorize.errors import UserError, run_command
from dist_colorize.evaluation import Evaluation, evaluate, protocol, write_evaluation
from dist_colorize.files import write_atomically
from dist_colorize.postprocess.stages import load_preset
from dist_colorize.postprocess.trained import find_trained
from dist_colorize.recipe import Recipe
from dist_colorize.report import Page, write_report
from dist_colorize.stopping import StopFlag
from dist_colorize.text import printable

COMPARED = ("data", "photographs_are", "size", "preparation", "photographs")
"""Parts of the protocol that must agree before two tables compare."""


def main(argv: Sequence[str] | None = None) -> None:
    runs, overrides, report = _arguments(argv)
    recipes = [config.load(Recipe, run / "config.yaml", overrides) for run in runs]
    pages: list[Page] = []
    with session(recipes[0].distributed) as world, StopFlag() as stop:
        for run, recipe in zip(runs, recipes, strict=True):
            result, validation = score(run, recipe, world, stop)
            if world.is_leader:
                how = protocol(recipe.data, recipe.evaluate.preset)
                names = [printable(validation.name(one.sample)) for one in result.photographs]
                write_evaluation(run, result, how)
                write_photographs(run, result, names)
                print(f"{run}\n{_words(how | {'photographs': result.count})}\n{result.table()}", flush=True)
                print(f"pictures: {run / 'panels' / 'final.png'}", flush=True)
                pages.append(Page(run.name, result, how | {"photographs": result.count}, names))
        if world.is_leader:
            _warn_where_tables_differ(pages)
            if report:
                write_report(runs[0] / "report.html", pages)
                print(f"report: {runs[0] / 'report.html'}", flush=True)


def score(run: Path, recipe: Recipe, world: World, stop: StopFlag) -> tuple[Evaluation, Photographs]:
    """Every metric of a run's newest network on the validation photographs of the recipe; a collective."""
    preset = load_preset(recipe.evaluate.preset)
    _, validation = open_photographs(recipe.data, world, stop)
    data = decoding_device(recipe.data, world, stop)
    # rarity of colours among the photographs that are scored: the same for every method and world size
    cells = count_colours(validation, data, 1.0, world, stop)
    rarity = class_weights(prior(cells, LossConfig()), LossConfig.rebalance)
    network = find_trained(run).network.to(world.device)
    batches = evaluation_batches(validation, data, world, recipe.evaluate.batch)
    result = evaluate(network, batches, preset, world, recipe.evaluate.pictures, stop, rarity)
    return result, validation


def write_photographs(run: Path, result: Evaluation, names: Sequence[str]) -> None:
    """Writes `photographs.jsonl`: a line per photograph with its name, scores and, of a classifier, top1 and top5."""
    lines = [
        json.dumps({"name": name, "scores": one.scores, **one.classifier})
        for name, one in zip(names, result.photographs, strict=True)
    ]
    write_atomically(run / "photographs.jsonl", "".join(line + "\n" for line in lines).encode())


def _words(how: dict[str, object]) -> str:
    return "\n".join(f"  {name.replace('_', ' ')}: {value}" for name, value in how.items())


def _warn_where_tables_differ(pages: Sequence[Page]) -> None:
    for page in pages[1:]:
        other = [name for name in COMPARED if page.protocol[name] != pages[0].protocol[name]]
        if other:
            print(f"warning: {page.name} and {pages[0].name} differ in {', '.join(other)}: do not compare their tables")


def _arguments(argv: Sequence[str] | None) -> tuple[list[Path], list[str], bool]:
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
    parser.add_argument("--report", action="store_true", help="also write report.html into the first run's folder")
    parsed = parser.parse_intermixed_args(argv)
    given = parsed.arguments
    # a folder may hold an equals sign; a key never holds a slash
    overrides = [
        text for text in given if "=" in text and "/" not in text.partition("=")[0] and not Path(text).is_dir()
    ]
    runs = [Path(text) for text in given if text not in overrides]
    if not runs:
        raise UserError("name at least one run folder to evaluate: python -m dist_colorize.evaluate runs/RUN")
    return runs, overrides, parsed.report


if __name__ == "__main__":
    run_command(main)
