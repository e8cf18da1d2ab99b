"""Keeps order among many runs.

    python -m dist_colorize.runs                              # every run: state, steps, best score, what differs
    python -m dist_colorize.runs compare runs/A runs/B        # differing settings, curves at the same steps
    python -m dist_colorize.runs compare runs/A runs/B --report both.html
    python -m dist_colorize.runs best --metric ciede2000      # the best first
    python -m dist_colorize.runs prune --state failed         # shows what it would delete, and asks

A run folder's name says experiment, date and a digest of the config. Runs are looked for below ./runs (--root).
A run that says it is running but whose process is gone counts as failed. Scores are those of evaluation.json, or of
the last validation while there is none.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from dist_colorize.curves import curves, sparkline
from dist_colorize.errors import UserError, run_command
from dist_colorize.metrics import METRICS
from dist_colorize.run_facts import RunFacts, differing, find_runs, read_json, read_run, score, size_of

STATES = ("running", "finished", "interrupted", "failed")


def list_runs(arguments: argparse.Namespace) -> None:
    runs = find_runs(arguments.root)
    if not runs:
        print(f"no runs in {arguments.root}")
        return
    rows = []
    differences = differing(runs)
    for i, run in enumerate(runs):
        best = [score(run, "final", metric) for metric in ("psnr", "mse")]
        what = ", ".join(f"{_short(key, differences)}={_text(values[i])}" for key, values in differences.items())
        rows.append([run.path.name, run.state, _progress(run), *map(_number, best), what])
    print(_table(["run", "state", "step", "PSNR (dB)", "MSE", "differs in"], rows))


def compare(arguments: argparse.Namespace) -> None:
    runs = []
    for path in arguments.runs:
        run = read_run(path)
        if run is None:
            raise UserError(f"{path} holds no run (config.yaml and checkpoints/)")
        runs.append(run)
    names = [run.path.name for run in runs]
    settings = [[key, *map(_text, values)] for key, values in differing(runs).items()]
    print("settings that differ\n" + (_table(["", *names], settings) if settings else "  none"))
    facts = [
        ["state", *(run.state for run in runs)],
        ["step", *map(_progress, runs)],
        ["scored on", *(run.scored_on for run in runs)],
    ]
    for name, metric in METRICS.items():
        values = [score(run, "final", name) for run in runs]
        if any(value is not None for value in values):
            facts.append([f"{metric.label}, final", *map(_number, values)])
    print("\nresults\n" + _table(["", *names], facts))
    found = curves([(run.path.name, run.lines("metrics.jsonl"), run.lines("validation.jsonl")) for run in runs])
    for curve in found:
        print(f"\n{curve.title}")
        print(_table(["step", *map(str, curve.sampled_steps())], [[n, *row] for n, row in curve.sampled(_number)]))
        print(
            _table(
                ["", "", "least", "last"],
                [[n, sparkline(y), _number(min(y)), _number(y[-1])] for n, _, y in curve.lines],
            )
        )
    if arguments.report:
        from dist_colorize.report import Comparison, write_page

        pages = [_page(run) for run in runs if run.scores]
        page = Comparison(["", *names], settings + facts, [{"title": c.title, "svg": c.svg()} for c in found])
        write_page(arguments.report, "Comparison of runs", [one for one in pages if one], page)
        print(f"\nreport: {arguments.report}")


def best(arguments: argparse.Namespace) -> None:
    metric = METRICS.get(arguments.metric)
    if metric is None or not metric.better:
        ranked = ", ".join(name for name, one in METRICS.items() if one.better)
        raise UserError(f"--metric {arguments.metric}: runs can be ranked by {ranked}")
    scored = [(run, score(run, arguments.stage, arguments.metric)) for run in find_runs(arguments.root)]
    known = sorted(((v, run) for run, v in scored if v is not None), key=lambda pair: -metric.better * pair[0])
    if not known:
        raise UserError(
            f"no run in {arguments.root} has {arguments.metric} of {arguments.stage}: run "
            "python -m dist_colorize.evaluate RUN first"
        )
    rows = [[run.path.name, _number(value), run.state, _progress(run), run.scored_on] for value, run in known]
    print(_table(["run", metric.label, "state", "step", "scored on"], rows))


def prune(arguments: argparse.Namespace) -> None:
    """Deletes run folders: those that were shown, after the user typed yes, if nothing about them has changed since."""
    now = datetime.now(UTC)
    chosen = []
    for path in arguments.runs:
        run = read_run(path)
        if run is None:
            raise UserError(f"{path} holds no run: nothing is deleted")
        chosen.append(run)
    if not arguments.runs:
        if not arguments.state and arguments.older is None:
            raise UserError("say which runs: name them, or give --state failed, --older DAYS")
        chosen = find_runs(arguments.root)
    chosen = [
        run
        for run in chosen
        if (not arguments.state or run.state in arguments.state)
        and (arguments.older is None or now - run.updated > timedelta(days=arguments.older))
    ]
    working = [run.path.name for run in chosen if run.state == "running"]
    if working:
        print(f"left alone, as they are running: {', '.join(working)}")
    chosen = [run for run in chosen if run.state != "running"]
    if not chosen:
        print("nothing to delete")
        return
    rows = [[str(r.path), r.state, _progress(r), _number(score(r, "final", "psnr")), size_of(r.path)] for r in chosen]
    print(_table(["delete", "state", "step", "PSNR (dB)", "MB"], rows))
    try:
        answer = input(f"type yes to delete these {len(chosen)} folders: ")
    except EOFError:
        answer = ""
    if answer.strip() != "yes":
        print("nothing deleted")
        return
    for run in chosen:
        # a run may have been resumed while the question stood
        after = read_run(run.path)
        if after is None or after.state != run.state or after.updated != run.updated:
            print(f"left alone, as it has changed since: {run.path}")
            continue
        try:
            shutil.rmtree(run.path)
        except OSError as error:
            raise UserError(f"{run.path} cannot be deleted: {error}") from None
        print(f"deleted {run.path}")


def _page(run: RunFacts) -> dict[str, Any] | None:
    """A run as the report's template takes it, from its evaluation.json: without pictures."""
    found = read_json(run.path / "evaluation.json")
    if not found.get("intervals"):
        return None
    value, ends = found.get("classifier", {}), found.get("classifier_intervals", {})
    return {
        "name": run.path.name,
        "scores": found["scores"],
        "intervals": found["intervals"],
        "classifier": {name: [value[name], *ends[name]] for name in value},
        "protocol": {name: text for name, text in found["protocol"].items() if name not in METRICS},
        "photographs": [],
    }


def _progress(run: RunFacts) -> str:
    return f"{'-' if run.step is None else run.step}/{'-' if run.steps is None else run.steps}"


def _short(key: str, among: Mapping[str, Any]) -> str:
    """The last part of a dotted key, where it is no other key's last part."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in among) == 1 else key


def _text(value: Any) -> str:
    return "null" if value is None else str(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need, the first to the left; the last is not padded."""
    cells = [list(columns), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(r, widths, strict=True)).rstrip() for r in cells
    )


def main(argv: Sequence[str] | None = None) -> None:
    what, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m dist_colorize.runs",
        description=what,
        epilog=f"examples:\n\n{more}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--root", type=Path, default=Path("runs"), help="folder of all runs (default: %(default)s)")
    parser.set_defaults(act=list_runs)
    commands = parser.add_subparsers(title="commands", metavar="list|compare|best|prune")
    commands.add_parser("list", help="every run (the default)").set_defaults(act=list_runs)
    add = commands.add_parser("compare", help="settings and curves of some runs side by side")
    add.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    add.add_argument("--report", type=Path, metavar="FILE", help="also write an HTML page")
    add.set_defaults(act=compare)
    add = commands.add_parser("best", help="runs ranked by a score of the evaluation")
    add.add_argument("--metric", default="psnr", help=f"{', '.join(METRICS)} (default: %(default)s)")
    add.add_argument("--stage", default="final", help="gray, raw, ..., final (default: %(default)s)")
    add.set_defaults(act=best)
    add = commands.add_parser("prune", help="delete runs, after showing them and asking")
    add.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="these; none: all that the options choose")
    add.add_argument("--state", action="append", choices=STATES[1:], help="only runs in this state (may be repeated)")
    add.add_argument("--older", type=float, metavar="DAYS", help="only runs last changed so long ago")
    add.set_defaults(act=prune)
    arguments = parser.parse_args(argv)
    arguments.act(arguments)
    sys.stdout.flush()


if __name__ == "__main__":
    run_command(main)
