"""Trains as a user does, through torchrun, and does to it what happens to trainings: steps of .ci/gpu.

    python -m benchmarks.gpu_train life bf16 --work FOLDER      # kill -9, resume, SIGTERM, resume; or fp16
    python -m benchmarks.gpu_train no-sync --work FOLDER        # five steps that must not wait for the GPU
    python -m benchmarks.gpu_train rate gpu --work FOLDER       # images/s with data.device=gpu; or cpu

FOLDER is what gpu_data has made. Run folders are FOLDER/runs/NAME; they are made anew.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu_data import ENCODER
from benchmarks.gpu_runner import CHECKOUT, Place, cannot, fact, place_parser
from dist_colorize.errors import INTERRUPTED
from dist_colorize.run_facts import read_json, read_lines

POLL_SECONDS = 0.005
LIFE_SECONDS = 120.0
"""For one life of a run, on slow processors as well."""


@dataclass(frozen=True)
class Size:
    """How much there is to do."""

    steps: int
    killed_at: int
    """The first life is killed when this step is done and a checkpoint is whole."""
    stopped_at: int
    """The second life gets its SIGTERM when this step is done."""
    checkpoint_every: int
    batch: int
    crop: int
    rated_steps: int
    """Of a run that is only to show how fast it is."""


FULL = Size(steps=60, killed_at=15, stopped_at=35, checkpoint_every=5, batch=32, crop=224, rated_steps=300)
DRY = Size(steps=20, killed_at=4, stopped_at=12, checkpoint_every=4, batch=4, crop=32, rated_steps=8)


def main() -> None:
    parser = place_parser(__doc__)
    parser.add_argument("step", choices=["life", "no-sync", "rate"])
    parser.add_argument("word", nargs="?", help="precision for life; gpu or cpu for rate")
    arguments = parser.parse_args()
    place, size = Place(arguments.work, arguments.dry), DRY if arguments.dry else FULL
    if arguments.step == "life":
        life(place, size, arguments.word)
    elif arguments.step == "no-sync":
        no_sync(place, size)
    else:
        rate(place, size, arguments.word)


def settings(place: Place, size: Size, run: Path) -> list[str]:
    """The recipe of every run here: the final method at full width on the photographs of gpu_data."""
    return [
        f"--config={CHECKOUT / 'configs' / 'final.yaml'}",
        f"run.dir={run}",
        f"data.root={place.work / 'photographs'}",
        f"data.val_root={place.work / 'validation'}",
        "data.val_fraction=0",
        f"data.crop={size.crop}",
        f"model.encoder={place.work / ENCODER}",
        f"train.global_batch={size.batch}",
        "train.validate_every=0",
        "train.warmup=5",
        "evaluate.pictures=2",
        *(["distributed.device=cpu"] if place.dry else ["distributed.device=cuda", "distributed.backend=nccl"]),
    ]


# ---------------------------------------------------------------- a run that is killed, stopped and goes on


def life(place: Place, size: Size, precision: str) -> None:
    """Three lives of one run: kill -9 in the middle, SIGTERM in the middle, to the end. AssertionError where one of
    them ends otherwise than it should, or the steps they leave are not those of a run that was never cut."""
    if place.dry:
        cannot(f"{precision}, decoding by DALI on the GPU, NCCL: need a GPU; this was fp32 and gloo")
    run = fresh(place.work / "runs" / precision)
    recipe = settings(place, size, run)
    recipe += [f"train.steps={size.steps}", f"train.precision={'fp32' if place.dry else precision}"]
    recipe += ["train.ema=0.99", "train.log_every=1"]
    recipe += [f"checkpoint.every={size.checkpoint_every}", "checkpoint.keep=2"]

    first = Life(recipe, run, "first")
    first.wait_until(lambda: steps_of(run) >= size.killed_at and any((run / "checkpoints").glob("step-*.pt")))
    started = first.seconds
    first.end_rank(signal.SIGKILL)
    assert first.exit_codes() == (1, -signal.SIGKILL), first.exit_codes()
    killed_at = steps_of(run)
    assert killed_at < size.steps, "the run was over before it was killed"

    second = Life(recipe, run, "second")
    # metrics.jsonl holds the first life's steps until this one makes its own
    second.wait_until(lambda: second.has_made_a_step() and steps_of(run) >= size.stopped_at)
    second.end_rank(signal.SIGTERM)
    assert second.exit_codes() == (1, INTERRUPTED), second.exit_codes()
    assert read_json(run / "status.json")["state"] == "interrupted"
    stopped_at = steps_of(run)

    third = Life(recipe, run, "third")
    assert third.exit_codes() == (0, None), third.exit_codes()
    assert third.resumed_from() == stopped_at, f"SIGTERM after step {stopped_at}, resumed from {third.resumed_from()}"

    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, size.steps + 1)), [line["step"] for line in lines]
    assert all(math.isfinite(line["loss"]) for line in lines if not line["skipped"]), lines
    assert read_json(run / "status.json")["state"] == "finished"
    assert "final" in read_json(run / "evaluation.json")["scores"]
    assert lines[-1]["skipped"] < size.steps / 4, f"{lines[-1]['skipped']} steps skipped"
    fact(
        killed_at=killed_at,
        resumed_from=second.resumed_from(),
        stopped_at=stopped_at,
        exit_codes="1 (rank -9), 1 (rank 75), 0",
        loss=f"{lines[0]['loss']:.3f} to {lines[-1]['loss']:.3f}",
        skipped=lines[-1]["skipped"],
        replaced=lines[-1]["replaced"],
        first_steps_after_s=round(started, 1),
    )


class Life:
    """One torchrun of one rank. Its output goes into RUN-NAME.txt beside the run folder, and to stdout at its end."""

    def __init__(self, recipe: list[str], run: Path, name: str) -> None:
        self._run, self._file = run, run.parent / f"{run.name}-{name}.txt"
        self._begin = time.monotonic()
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
        with open(self._file, "wb") as output:
            self._process = subprocess.Popen(
                [*torchrun, "-m", "dist_colorize.train", *recipe], stdout=output, stderr=output
            )

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._begin

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """AssertionError where the process ends first, or it takes too long."""
        while not condition():
            assert self._process.poll() is None, f"the run ended before it was cut:\n{self._text()}"
            assert self.seconds < LIFE_SECONDS, f"not there after {LIFE_SECONDS:g} s:\n{self._text()}"
            time.sleep(POLL_SECONDS)

    def end_rank(self, number: signal.Signals) -> None:
        """Sends a signal to the rank, once it has made a step; torchrun is to hear of it by itself."""
        os.kill(read_json(self._run / "status.json")["pid"], number)

    def exit_codes(self) -> tuple[int, int | None]:
        """Waits for the end: the code of torchrun, and the rank's as torchrun tells it where that is not 0."""
        code = self._process.wait(max(1.0, LIFE_SECONDS - self.seconds))
        print(f"---- {self._file.stem}\n{self._text()}", flush=True)
        told = re.search(r"exitcode\s*: (-?\d+)", self._text())
        return code, int(told[1]) if told else None

    def resumed_from(self) -> int | None:
        """The step of the checkpoint that this life went on from."""
        told = re.search(r"resuming from .*, step (\d+)", self._text())
        return int(told[1]) if told else None

    def has_made_a_step(self) -> bool:
        """Of a life that went on from a checkpoint."""
        return "back at work" in self._text()

    def _text(self) -> str:
        return self._file.read_text(encoding="utf-8", errors="replace")


def steps_of(run: Path) -> int:
    """The last step in metrics.jsonl."""
    lines = read_lines(run / "metrics.jsonl")
    return int(lines[-1]["step"]) if lines else 0


def fresh(run: Path) -> Path:
    """The path, where nothing is any more."""
    shutil.rmtree(run, ignore_errors=True)
    run.parent.mkdir(parents=True, exist_ok=True)
    return run


# ---------------------------------------------------------------- steps that must not wait


def no_sync(place: Place, size: Size) -> None:
    """Five optimizer steps, accumulated and with a moving average, in which torch refuses every wait for the GPU."""
    import torch

    from benchmarks.step import Precision, Work, class_weights, ours
    from dist_colorize.distributed import DistributedConfig, session
    from dist_colorize.models import METHODS, TrainingModule
    from dist_colorize.optimisation import Optimisation, TrainConfig

    with session(DistributedConfig(device="cpu" if place.dry else "cuda")) as world:
        precision: Precision = "fp32" if place.dry else "bf16"
        config = TrainConfig(
            global_batch=size.batch, micro_batch=size.batch // 2, ema=0.999, warmup=0, precision=precision
        )
        module = TrainingModule(ours(), METHODS["final"](class_weights())).to(world.device)
        optimisation = Optimisation(module, config, world)
        lightness, ab = Work(size.batch, precision, world.device, size.crop).batch()
        losses = [optimisation.step(number, lightness, ab) for number in range(3)]
        if place.dry:
            cannot("torch.cuda.set_sync_debug_mode: needs a GPU")
        else:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        losses += [optimisation.step(number, lightness, ab) for number in range(3, 8)]
        if not place.dry:
            torch.cuda.set_sync_debug_mode("default")
        values = torch.stack(losses).tolist()
        assert values[-1] < values[0], values
        fact(steps_without_a_wait=0 if place.dry else 5, loss=f"{values[0]:.3f} to {values[-1]:.3f}")


# ---------------------------------------------------------------- how fast


def rate(place: Place, size: Size, kind: str) -> None:
    """Images/s of a whole training, decoding included, as metrics.jsonl tells it: the median of its later lines."""
    run = fresh(place.work / "runs" / f"rate-{kind}")
    every = max(1, size.rated_steps // 20)
    recipe = settings(place, size, run)
    recipe += [f"train.steps={size.rated_steps}", f"train.log_every={every}", f"data.device={kind}", "train.ema=null"]
    ended = Life(recipe, run, "only").exit_codes()
    assert ended == (0, None), ended
    lines: list[dict[str, Any]] = read_lines(run / "metrics.jsonl")
    later = lines[len(lines) // 4 :]
    fact(
        images_per_second=median(line["images_per_second"] for line in later),
        data_wait=median(line["data_wait"] for line in later),
        batch=size.batch,
        crop=size.crop,
    )


if __name__ == "__main__":
    main()
