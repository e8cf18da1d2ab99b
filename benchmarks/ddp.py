"""DistributedDataParallel on gloo: what is sent per step, and what a second rank costs.

    python -m benchmarks.ddp                        # 1, 2, 4, 8 ranks of one thread each; width 0.25, 96 px
    python -m benchmarks.ddp --width 1 --side 224   # the full network

The work is the same at every world size: one global batch. One rank with two threads is the peer of two ranks with one
thread each; both use two cores. With more ranks than cores only the bytes mean something.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from statistics import median

import torch

from benchmarks.harness import ROUNDS, machine, table, verdict
from dist_colorize.distributed import DistributedConfig, World, session
from dist_colorize.footprint import Sent
from dist_colorize.models import METHODS, ModelConfig, TrainingModule, build
from dist_colorize.optimisation import Optimisation, TrainConfig

GLOBAL_BATCH, WARMUP, STEPS = 16, 3, 8
WORLDS = (1, 2, 4, 8)
GOAL = 0.10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--side", type=int, default=96, help="of the crops, in pixels")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--as-rank", type=int, metavar="THREADS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_rank:
        with session(DistributedConfig(device="cpu", threads=arguments.as_rank)) as world:
            report = steps(world, arguments.width, arguments.side)
            if world.is_leader:
                print(json.dumps(report))
        return
    print(machine("torch"), flush=True)

    rows = []
    for ranks in WORLDS:
        seen = launch(ranks, 1, arguments.width, arguments.side)
        rows.append([ranks, seen["sent"], seen["trained"], seen["sent"] / seen["trained"]])
    print(table(["ranks", "bytes to collectives in a step", "bytes trained", "ratio"], rows))

    ratios = []
    for number in range(arguments.rounds):
        seconds = {}
        for ranks in ((1, 2), (2, 1))[number % 2]:
            seconds[ranks] = launch(ranks, 2 // ranks, arguments.width, arguments.side)["seconds"]
        ratios.append(seconds[2] / seconds[1])
    overhead = median(ratios) - 1
    print(f"a step of 2 ranks takes {overhead:+.1%} more time than one of 1 rank with 2 threads", end=" ")
    print(f"({verdict(overhead, GOAL, at_most=True)})")


def launch(ranks: int, threads: int, width: float, side: int) -> dict[str, float]:
    """The report of rank 0 of a real torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    settings = ["--as-rank", str(threads), "--width", str(width), "--side", str(side)]
    command = [*torchrun, "-m", "benchmarks.ddp", *settings]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    report: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return report


def steps(world: World, width: float, side: int) -> dict[str, float]:
    """Bytes and the median seconds of a step, which ends when all ranks have made it."""
    torch.manual_seed(0)
    module = TrainingModule(build(ModelConfig(width=width)), METHODS["final"](torch.ones(313)))
    settings = TrainConfig(global_batch=GLOBAL_BATCH, precision="fp32")
    optimisation = Optimisation(module, settings, world)
    local = settings.local_batch(world.size)
    lightness, ab = 100 * torch.rand(local, 1, side, side), 20 * torch.randn(local, 2, side, side)
    with Sent() as sent:
        optimisation.step(0, lightness, ab)
    seconds = []
    for number in range(1, WARMUP + STEPS):
        start = time.perf_counter()
        optimisation.step(number, lightness, ab)
        world.barrier()
        seconds.append(time.perf_counter() - start)
    trained = sum(parameter.nbytes for parameter in optimisation.parameters)
    return {"sent": sent.bytes, "trained": trained, "seconds": median(seconds[WARMUP - 1 :])}


if __name__ == "__main__":
    main()
