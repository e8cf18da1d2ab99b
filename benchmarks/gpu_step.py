"""The training step of the final network on a GPU against the plain PyTorch step, and where its time goes.

    python -m benchmarks.gpu_step                                    # 224 px, bf16, batches of 32, 8 and 64
    python -m benchmarks.gpu_step --batches 32 --rounds 9 --photographs /photos
    python -m benchmarks.gpu_step --device cpu --batches 1 --side 64 # the same code where there is no GPU

The peers are the plain step of benchmarks/step.py in NCHW, in channels last, and in channels last through torch.compile
(network and loss together); compiling takes most of a minute, so that peer is measured at the first batch size only.
All have the same weights, labels and decoder, so their losses must agree. Times are those of CUDA events around several
steps, contestants in turn, medians. Memory is what torch has allocated at most, weights and optimizer included, while a
contestant makes its first steps.

Which kernels belong to a part of our step is read from the moment at which they are launched: torch's profiler knows
the ranges of dist_colorize.profiling on the main thread, while autograd launches the backward pass from its own.
What no thread of the step launches, DALI does: it counts as data.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_runner import cannot, fact, section
from benchmarks.harness import ROUNDS, machine, table, take_turns, wall_seconds
from benchmarks.step import SIZE, WARMUP, Precision, Step, Work, check_losses_agree, our_step, plain_step, training
from dist_colorize.data import DataConfig
from dist_colorize.data.config import SAMPLE_ROOT
from dist_colorize.distributed import DistributedConfig, World, session
from dist_colorize.hardware import cpu_has_bf16
from dist_colorize.profiling import RANGES

OURS, FIRST_PEER, COMPILED = "ours", "plain, NCHW", "plain, channels last, compiled"
STEPS_A_TURN = 10
"""On a GPU; one on a CPU."""
TRACED_STEPS = 5
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Relative difference of losses that should be equal."""
ELSEWHERE = "between the ranges"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 8, 64], help="photographs of a step")
    parser.add_argument("--side", type=int, default=SIZE, help="of the photographs, in pixels")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--photographs", default=SAMPLE_ROOT, metavar="FOLDER", help="of the profile by part")
    arguments = parser.parse_args()
    print(machine("torch", "torchvision", "triton"), flush=True)
    with session(DistributedConfig(device=arguments.device)) as world:
        precision: Precision = "bf16" if world.device.type == "cuda" or cpu_has_bf16() else "fp32"
        works = [Work(images, precision, world.device, arguments.side) for images in arguments.batches]
        for number, work in enumerate(works):
            compare(work, world, arguments.rounds, compiled=number == 0)
        data = DataConfig(root=arguments.photographs, crop=arguments.side)
        parts(works[0], world, data)


# ---------------------------------------------------------------- against the plain step


def compare(work: Work, world: World, rounds: int, compiled: bool) -> None:
    """Prints the table of one batch size. SystemExit where a contestant does other work than the rest.

    compiled: with the peer that torch.compile makes, which takes most of a minute.
    """
    contestants: dict[str, Callable[[], Step]] = {
        FIRST_PEER: partial(plain_step, work),
        "plain, channels last": partial(plain_step, work, torch.channels_last),
        COMPILED: partial(plain_step, work, torch.channels_last, compiled=True),
        OURS: partial(our_step, work, world),
    }
    if not compiled:
        del contestants[COMPILED]
    torch._dynamo.reset()  # else it would compile for batches of any size from the second one on
    steps: dict[str, Step] = {}
    peaks: dict[str, float | str] = {}
    for name, build in contestants.items():
        try:
            steps[name], peaks[name] = built(build, work.device)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            cannot(f"{name}: {str(error).strip().splitlines()[0]}")
    check_losses_agree(steps, FIRST_PEER, dict.fromkeys(steps, TOLERANCE[work.precision]))

    turns, clock = (STEPS_A_TURN, cuda_seconds) if work.device.type == "cuda" else (1, wall_seconds)
    times = take_turns({name: partial(repeat, step, turns) for name, step in steps.items()}, rounds, clock)
    best = min((name for name in steps if name != OURS), key=times.of)
    rows = [
        [name, turns * work.images / seconds, 1000 * seconds / turns, times.ratio(name, best), peaks[name]]
        for name, seconds in ((name, times.of(name)) for name in steps)
    ]
    head = ["step", "images/s", "ms", f"x {best}", "peak, MiB"]
    section(f"### Training step, batch {work.images}, {work.side} px, {work.precision}\n\n{table(head, rows)}")
    speed = turns * work.images / times.of(OURS)
    fact(**{f"batch {work.images}": f"{speed:.4g} images/s, {times.ratio(OURS, best):.3g} x {best}"})


def built(build: Callable[[], Step], device: torch.device) -> tuple[Step, float | str]:
    """A contestant after its first step, which compiles; and the most memory that it took, in MiB ("-" on a CPU)."""
    if device.type == "cpu":
        step = build()
        step()
        return step, "-"
    before = torch.cuda.memory_allocated(device)
    step = build()
    step()
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(WARMUP):
        step()
    return step, (torch.cuda.max_memory_allocated(device) - before) / 2**20


def repeat(step: Callable[[], object], times: int) -> None:
    for _ in range(times):
        step()


def cuda_seconds(work: Callable[[], object]) -> float:
    """From the moment that the GPU reaches the work to that at which it has done it."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


# ---------------------------------------------------------------- where the time goes


def parts(work: Work, world: World, data: DataConfig) -> None:
    """Prints the milliseconds of each part of a step on photographs: of kernels on a GPU, of the range on a CPU."""
    gpu = work.device.type == "cuda"
    if not gpu:
        cannot("CUDA events, kernels by part, memory of the GPU: need a GPU")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with training(work, world, data) as step, profile(activities=activities) as recorder:
        repeat(step, TRACED_STEPS)
        if gpu:
            torch.cuda.synchronize()
    folder = Path(tempfile.mkdtemp())
    try:
        recorder.export_chrome_trace(str(folder / "trace.json"))
        events = json.loads((folder / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    finally:
        shutil.rmtree(folder)
    found = by_part(events, kernels=gpu)
    total = sum(found.values())
    rows = [[name, found.get(name, 0.0) / TRACED_STEPS, found.get(name, 0.0) / total] for name in (*RANGES, ELSEWHERE)]
    what = "of its kernels on the GPU" if gpu else "on the CPU"
    head = ["part", f"ms a step, {what}", "share"]
    section(f"### Our step by part, batch {work.images}, {work.side} px, {work.precision}\n\n{table(head, rows)}")


def by_part(events: Sequence[dict[str, Any]], kernels: bool) -> dict[str, float]:
    """Milliseconds of each range in a trace of torch's profiler, and ELSEWHERE.

    kernels: of what ran on the GPU (kernels, copies, fills), by the range in which it was launched; else of the ranges
    themselves. Ranges that lie inside another one count for themselves alone.
    """
    ranges = sorted(
        (event["ts"], event["ts"] + event["dur"], event["name"], event["tid"])
        for event in events
        if event.get("cat") == "user_annotation" and event["name"] in RANGES
    )
    found: dict[str, float] = defaultdict(float)
    if not kernels:
        for begin, end, name, _ in ranges:
            found[name] += (end - begin) / 1000
        return dict(found)
    ours = {thread for *_, thread in ranges}
    ours |= {event["tid"] for event in events if str(event.get("name")).startswith("autograd::engine")}
    launches = {
        event["args"]["correlation"]: (event["ts"], event["tid"])
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    begins = [begin for begin, *_ in ranges]
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        moment, thread = launches.get(event["args"].get("correlation"), (None, None))
        name = "data" if moment is not None and thread not in ours else ELSEWHERE
        if moment is not None and thread in ours:
            # the ranges do not overlap: the last that began by then is the only one that may hold the moment
            at = bisect_right(begins, moment) - 1
            if at >= 0 and moment <= ranges[at][1]:
                name = ranges[at][2]
        found[name] += event["dur"] / 1000
    return dict(found)


if __name__ == "__main__":
    main()
