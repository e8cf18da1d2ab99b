"""What a training would take, before anything is bought or queued.

    python -m dist_colorize.plan --gpus 64 --images 1e9 --batch 4096
    python -m dist_colorize.plan --gpus 8 --images 1.3e6 --throughput 2000 --image-kb 110 train.micro_batch=32
    python -m dist_colorize.plan --gpus 8 --images 1.3e6 --config RUN/config.yaml

Memory and traffic come from the real network, loss and optimizer, run on tensors without contents. How fast a GPU is
cannot be known that way: give `--throughput` as measured (`images_per_second` in a run's metrics.jsonl) to get hours.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dist_colorize import config
from dist_colorize.errors import UserError, run_command
from dist_colorize.footprint import checkpoint_bytes, memory, traffic
from dist_colorize.optimisation import TrainConfig
from dist_colorize.recipe import Recipe
from dist_colorize.resources import resource

PROBE = 64 << 20
"""Bytes written to learn how fast the run folder's disk takes a checkpoint."""


@dataclass(frozen=True)
class Cluster:
    """What the plan is for."""

    gpus: int
    images: int
    throughput: float | None
    """Photographs per second, over all GPUs."""
    image_bytes: float
    """Mean size of a file."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, required=True, help="GPUs in all: the world size")
    parser.add_argument("--images", type=float, required=True, help="photographs in the data set, such as 1.3e6")
    parser.add_argument("--batch", type=int, help="photographs per step over all GPUs; short for train.global_batch")
    parser.add_argument("--throughput", type=float, metavar="IMAGES/S", help="measured, over all GPUs; gives hours")
    parser.add_argument("--image-kb", type=float, default=110.0, help="mean size of a file, in kB (default: 110)")
    parser.add_argument("--config", default=resource("configs") / "final.yaml", help="recipe (default: final.yaml)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")
    arguments = parser.parse_args(argv)
    for name in ("gpus", "images", "throughput", "image_kb"):
        value = getattr(arguments, name)
        if value is not None and not 1 <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be a number from 1 on, got {value:g}")
    batch = [] if arguments.batch is None else [f"train.global_batch={arguments.batch}"]
    recipe = config.load(Recipe, arguments.config, [*arguments.overrides, *batch])
    cluster = Cluster(arguments.gpus, int(arguments.images), arguments.throughput, arguments.image_kb * 1000)
    for title, lines in plan(recipe, cluster).items():
        print(title)
        width = max(map(len, lines))
        for name, value in lines.items():
            print(f"  {name:{width}}  {value}")


def plan(recipe: Recipe, cluster: Cluster) -> dict[str, dict[str, str]]:
    """Section -> line -> value, as printed."""
    train = recipe.train
    if train.precision == "auto":
        train = replace(train, precision="bf16")
    local = train.local_batch(cluster.gpus)
    together = min(train.micro_batch or local, local)
    return {
        "steps": _steps(recipe, cluster, local, together),
        f"memory of each GPU, {train.precision} (besides what CUDA, NCCL and DALI keep)": _memory(
            recipe, train, together
        ),
        "traffic and storage": _movement(recipe, train, cluster),
        "checkpoints": _checkpoints(recipe, cluster),
    }


def _steps(recipe: Recipe, cluster: Cluster, local: int, together: int) -> dict[str, str]:
    train = recipe.train
    seen = train.steps * train.global_batch
    lines = {
        "steps": f"{train.steps:,} of {train.global_batch:,} photographs: {local} per GPU"
        + (f", {together} at a time" if together < local else ""),
        "epochs": f"{seen / cluster.images:.3g} ({seen:,} crops of {cluster.images:,} photographs)",
    }
    if cluster.throughput:
        hours, rate = seen / cluster.throughput / 3600, f"{cluster.throughput:,.0f} images/s"
        lines["time"] = f"{hours:,.1f} hours at {rate}: {hours * cluster.gpus:,.0f} GPU hours"
    else:
        lines["time"] = "not known: give --throughput as measured"
    return lines


def _memory(recipe: Recipe, train: TrainConfig, together: int) -> dict[str, str]:
    needed = memory(recipe.model, train, together, recipe.data.crop, "cuda")
    lines = {name: _bytes(value) for name, value in vars(needed).items() if name not in ("logits", "average")}
    if needed.average:
        lines["average"] = _bytes(needed.average)
    lines["peak"] = lines.pop("peak")
    lines["avoided"] = f"{_bytes(needed.logits)} for each copy of the logits, which never exist"
    return lines


def _movement(recipe: Recipe, train: TrainConfig, cluster: Cluster) -> dict[str, str]:
    reduced = traffic(recipe.model, train)
    # a ring all-reduce sends each byte 2 (n - 1) / n times (Patarasuk and Yuan 2009)
    ring = reduced * 2 * (cluster.gpus - 1) / cluster.gpus
    lines = {
        "all-reduced": f"{_bytes(reduced)} per step, {_bytes(ring)} sent by each GPU in a ring",
        "data set": f"{_bytes(cluster.images * cluster.image_bytes)} at {cluster.image_bytes / 1000:g} kB a photograph",
        "read per step": _bytes(train.global_batch * cluster.image_bytes),
    }
    if cluster.throughput:
        rate = _bytes(cluster.throughput * cluster.image_bytes)
        lines["storage"] = f"{cluster.throughput:,.0f} files and {rate} per second"
        lines["network"] = f"{_bytes(ring * cluster.throughput / train.global_batch)} per second and GPU"
    return lines


def _checkpoints(recipe: Recipe, cluster: Cluster) -> dict[str, str]:
    size = checkpoint_bytes(recipe.model, recipe.train)
    root = Path(recipe.run.dir or recipe.run.root)
    speed = write_speed(root)
    every = recipe.checkpoint.every
    lines = {
        "size": f"{_bytes(size)}, {recipe.checkpoint.keep} kept and the best",
        "writing": f"{size / speed:.2g} s at {_bytes(speed)} per second as measured in {root}, beside the training",
        "in all": f"{recipe.train.steps // every} of them, one every {every:,} steps",
    }
    if cluster.throughput:
        seconds = every * recipe.train.global_batch / cluster.throughput
        lines["in all"] += f" or {seconds / 60:.1f} minutes: what a power cut can cost"
    return lines


def write_speed(folder: Path) -> float:
    """Bytes per second, to the disk and not only to its cache, of the folder or the nearest one that exists above."""
    folder = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            start = time.perf_counter()
            file.write(os.urandom(PROBE))
            file.flush()
            os.fsync(file.fileno())
            return PROBE / (time.perf_counter() - start)
    except OSError as error:
        raise UserError(f"run.root: {folder} cannot be written to ({error.strerror}); give another run.root") from None


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} PB"


if __name__ == "__main__":
    run_command(main)
