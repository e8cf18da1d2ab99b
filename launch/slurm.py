#!/usr/bin/env python3
"""Submits training to a SLURM cluster: one task per GPU, and no nursing from then on.

    python launch/slurm.py --nodes 4                                          # the quickstart on 4 nodes
    python launch/slurm.py --nodes 4 --config configs/final.yaml data.root=/photos --time 12:00:00 --follow
    python launch/slurm.py --nodes 4 --dry-run                                # shows the batch script, submits nothing
    python launch/slurm.py run.dir=runs/RUN                                   # goes on where RUN stopped
    python launch/slurm.py --sweep train.lr=1e-3,3e-4 loss.rebalance=0.25,0.5 # one run for each combination
    python launch/slurm.py --nodes 2 --job evaluate runs/RUN                  # the same launcher for other commands
    python launch/slurm.py --nodes 2 --job postprocess --checkpoint runs/RUN archive/ --output colorized

A job that meets its time limit, is preempted, loses a node or fails is queued again and goes on from its newest
checkpoint, within `slurm.requeues` and `slurm.retries`; scancel ends it for good. Every option is also a field of the
recipe's `slurm` section. The code that runs is a copy of what is here now.

Exit codes: 0 submitted (with --follow: finished), 1 a followed job failed, 2 bad usage or refused by the cluster,
75 --follow was interrupted; the job goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

if (Path(__file__).resolve().parents[1] / "dist_colorize").is_dir():  # a checkout: its code, not an installed one
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dist_colorize import config, schema
from dist_colorize.errors import FAILURE, INTERRUPTED, OK, UserError, run_command
from dist_colorize.recipe import Recipe
from dist_colorize.resources import resource
from dist_colorize.slurm import follow, partition, sweep
from dist_colorize.slurm.settings import SlurmConfig
from dist_colorize.slurm.snapshot import code_root, take_snapshot
from dist_colorize.slurm.submission import Submission, batch_script, submit
from dist_colorize.slurm.task import Task

QUICKSTART = resource("configs", "quickstart.yaml")
INSTALLED = "dist_colorize.launch.slurm"
JOBS = ("train", "evaluate", "postprocess")
ME = f"python {shlex.quote(sys.argv[0])}" if __name__ == "__main__" and not __package__ else f"python -m {INSTALLED}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be written before a submission, and the submission."""

    submission: Submission
    recipes: dict[Path, str]
    """Text of each file that tasks read their settings from."""
    snapshot: bool


def main(argv: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else list(argv)
    options, command = _parse(given)
    plan = _training(options, given) if options.job == "train" else _command(options, command, given)
    submission = plan.submission
    if options.dry_run:
        _show(submission)
        return OK
    jobs = _submit(plan)
    for line in _report(submission, jobs):
        print(line, flush=True)
    if not options.follow:
        return OK
    logs = {job: submission.log(job) for job in jobs}
    try:
        last = follow.follow(logs)
    except KeyboardInterrupt:
        print(f"\nno longer following; the job goes on. To stop it: scancel {_array(jobs)}")
        return INTERRUPTED
    return OK if all(state.name == "COMPLETED" for state in last.values()) else FAILURE


# ---------------------------------------------------------------- what to submit


def _training(options: argparse.Namespace, given: list[str]) -> Plan:
    """One run, or one run for each combination of --sweep."""
    swept = sweep.combinations(options.sweep) if options.sweep else [[]]
    recipes = [config.load(Recipe, options.config, [*options.overrides, *more]) for more in swept]
    slurm = partition.resolve(recipes[0].slurm)
    if options.config == QUICKSTART and "train.global_batch=" not in " ".join(given):
        recipes = [_shared_by(recipe, partition.tasks(slurm)) for recipe in recipes]
    for recipe in recipes:
        recipe.train.local_batch(partition.tasks(slurm))  # an error now, not when the job has waited for a day
    base, stamp = _run_folder(recipes[0]), f"{datetime.now():%Y%m%d-%H%M%S-%f}"
    runs = [base / sweep.folder_name(i, more) for i, more in enumerate(swept)] if options.sweep else [base]
    for run in runs:
        _require_free(run, slurm)
    folder = base / "slurm" / stamp
    texts, tasks = {}, []
    for run, recipe in zip(runs, recipes, strict=True):
        file = run / "slurm" / stamp / "recipe.yaml"
        own = dataclasses.replace(
            recipe,
            run=dataclasses.replace(recipe.run, dir=str(run)),
            slurm=dataclasses.replace(recipe.slurm, dependency=None),  # of this submission, not of a later one
        )
        texts[file] = config.dump(own)
        tasks.append(Task("dist_colorize.train", ("--config", str(file)), str(folder), slurm.interface))
    code = code_root() if options.no_snapshot else folder / "code"
    name = recipes[0].run.name
    roots = [root for recipe in recipes for root in (recipe.data.root, recipe.data.val_root) if root]
    data = [Path(root).absolute() for root in dict.fromkeys(roots) if Path(root).exists()]
    resumes = [f"{ME} {shlex.quote(f'run.dir={run}')}" for run in runs]
    submission = Submission(slurm, name, folder, code, tasks, list(runs), resumes, data)
    return Plan(submission, texts, not options.no_snapshot)


def _shared_by(recipe: Recipe, tasks: int) -> Recipe:
    """The quickstart with a batch that this many ranks can share; its own is made for a few."""
    batch = math.ceil(recipe.train.global_batch / tasks) * tasks
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, global_batch=batch))


def _command(options: argparse.Namespace, command: list[str], given: list[str]) -> Plan:
    """Evaluation or post-processing: the command's own arguments, run by every task, which share the work."""
    if options.sweep:
        raise UserError("--sweep is for training")
    recipe = config.load(Recipe, options.config, options.overrides)
    slurm = partition.resolve(recipe.slurm)
    folder = Path(recipe.run.root).absolute() / f"slurm-{options.job}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    task = Task(f"dist_colorize.{options.job}", tuple(command), str(folder), slurm.interface)
    code = code_root() if options.no_snapshot else folder / "code"
    named = [Path(word).absolute() for word in command if Path(word).exists()]
    submission = Submission(slurm, options.job, folder, code, [task], [None], [f"{ME} {shlex.join(given)}"], named)
    return Plan(submission, {}, not options.no_snapshot)


def _run_folder(recipe: Recipe) -> Path:
    """The run folder of a run, or the folder of a sweep's runs; decided here, so that the job always finds it again."""
    if recipe.run.dir:
        return Path(recipe.run.dir).absolute()
    digest = hashlib.blake2b(config.dump(recipe).encode("utf-8", "surrogateescape"), digest_size=3).hexdigest()
    name = f"{recipe.run.name}-{datetime.now():%Y%m%d-%H%M%S}-{digest}"
    root = Path(recipe.run.root).absolute()
    taken = (root / (name if number == 1 else f"{name}-{number}") for number in range(1, 1000))
    return next(path for path in taken if not path.exists())


def _require_free(run: Path, slurm: SlurmConfig) -> None:
    """Raise UserError when a job still waits or runs for this run folder: two would spoil each other's files."""
    still = follow.alive([file.read_text().strip() for file in run.glob("slurm/*/job")])
    numbers = [job.split()[0] for job in still]
    if not all(number in re.findall(r"[\d_]+", slurm.dependency or "") for number in numbers):
        raise UserError(
            f"run.dir={run}: job {', '.join(still)} works on it; stop it with scancel {' '.join(numbers)}, or queue up "
            f"behind it with --dependency afterany:{':'.join(numbers)}"
        )


# ---------------------------------------------------------------- doing it


def _submit(plan: Plan) -> list[str]:
    """Write code and settings, submit, return the job ids; leaves nothing behind when the cluster refuses."""
    submission = plan.submission
    new = next((p for p in [*reversed(submission.folder.parents), submission.folder] if not p.exists()), None)
    try:
        submission.folder.mkdir(parents=True)
        for file, text in plan.recipes.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        if plan.snapshot:
            take_snapshot(submission.code)
        jobs = submit(submission)
    except BaseException as error:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {submission.folder}: {error.strerror or error}; set run.root") from error
        raise
    for file, job in zip(plan.recipes, jobs, strict=False):  # commands other than training have no recipe
        (file.parent / "job").write_text(f"{job}\n")
    return jobs


def _show(submission: Submission) -> None:
    """The dry run: what sbatch would get, and what each task would run."""
    print(batch_script(submission))
    count = partition.tasks(submission.config)
    print(f"# each of {count} tasks{' of each job' if len(submission.tasks) > 1 else ''} runs:")
    for task in submission.tasks:
        print(f"#   python -m {task.module} {shlex.join(task.arguments)}")
    print("# dry run: nothing was written or submitted")


def _report(submission: Submission, jobs: list[str]) -> list[str]:
    """What the user needs from here on."""
    last = partition.tasks(submission.config) - 1
    first_log = submission.log(jobs[0])
    lines = [f"job: {_array(jobs)}" + (f" ({len(jobs)} runs)" if len(jobs) > 1 else "")]
    if submission.runs[0] is not None:
        experiment = len(jobs) > 1
        lines.append(f"experiment: {submission.runs[0].parent}" if experiment else f"run: {submission.runs[0]}")
        lines += [f"  {job}: {run}" for job, run in zip(jobs, submission.runs, strict=True)] if experiment else []
    lines += [
        f"script: {submission.folder / f'{_array(jobs)}_submission.sh'}",
        f"log: {first_log}" + (f"; of the other ranks: {jobs[0]}_1 .. {last}_log.out beside it" if last else ""),
        f"follow: tail -F {shlex.quote(str(first_log))}",
        f"state: squeue -j {_array(jobs)}",
        f"stop for good: scancel {_array(jobs)}",
        f"stop, save and queue again: scancel --signal=USR2 {_array(jobs)}",
    ]
    return lines + [f"resume: {resume}" for resume in submission.resumes]


def _array(jobs: list[str]) -> str:
    """The id that stands for all jobs."""
    return jobs[0].partition("_")[0]


# ---------------------------------------------------------------- command line


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's options, and the arguments of the command behind --job."""
    command: list[str] = []
    if "--job" in argv[:-1]:  # what follows the name belongs to that command
        at = argv.index("--job")
        argv, command = argv[: at + 2], argv[at + 2 :]
    what, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog=ME,
        description=what,
        epilog=f"examples:\n\n{more}\nKeys of overrides: python -m dist_colorize.train --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the training")
    parser.add_argument(
        "--config", metavar="FILE", help="YAML recipe (default: of run.dir, or configs/quickstart.yaml)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the batch script and the tasks, submit nothing")
    parser.add_argument(
        "--follow", action="store_true", help="show state and progress to the end; Ctrl-C leaves the job"
    )
    parser.add_argument("--no-snapshot", action="store_true", help="run the code as it is when the job starts")
    parser.add_argument("--sweep", nargs="+", metavar="key=a,b", help="one run for each combination of values")
    parser.add_argument(
        "--job",
        choices=JOBS,
        default="train",
        metavar="NAME ...",
        help="train, or evaluate or postprocess with arguments",
    )
    group = parser.add_argument_group("what is asked of the cluster (the recipe's slurm section)")
    meanings = schema.meanings(SlurmConfig)
    for field in dataclasses.fields(SlurmConfig):
        flag, meaning = "--" + field.name.replace("_", "-"), meanings.get(field.name, "").replace("%", "%%")
        if field.name == "exclusive":
            group.add_argument(flag, dest="slurm_exclusive", action="store_const", const="true", help=meaning)
        elif field.name == "setup":
            group.add_argument(flag, dest="slurm_setup", action="append", metavar="LINE", help=meaning)
        else:
            group.add_argument(flag, dest=f"slurm_{field.name}", metavar="X", help=meaning)
    options = parser.parse_intermixed_args(argv)  # overrides and options in any order
    if options.job == "train" and command:
        options.overrides += command
    for field in dataclasses.fields(SlurmConfig):
        value = getattr(options, f"slurm_{field.name}")
        if value is not None:
            # JSON is YAML, and keeps a text a text
            options.overrides.append(f"slurm.{field.name}={json.dumps(value) if field.name == 'setup' else value}")
    options.config = options.config or _default_config(options.overrides)
    return options, command


def _default_config(overrides: list[str]) -> Path:
    """The newest recipe of the run folder that the overrides name, else the quickstart."""
    folders = [o.partition("=")[2] for o in overrides if o.startswith("run.dir=")]
    if folders:
        run = Path(folders[-1])
        found = sorted(run.glob("slurm/*/recipe.yaml")) or [run / "config.yaml"]
        if found[-1].exists():
            return found[-1]
    return QUICKSTART


if __name__ == "__main__":
    run_command(main)
