"""Prints by how many bytes two steps of the final method raise this process's memory, weights included."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from dist_colorize.distributed import DistributedConfig, World, session
from dist_colorize.models import METHODS, ModelConfig, TrainingModule, build
from dist_colorize.optimisation import Optimisation, TrainConfig


def of(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def main(images: int, side: int) -> None:
    with session(DistributedConfig(device="cpu", threads=1)) as world:
        steps(ModelConfig(width=0.1), 1, 16, world)  # what libraries import and allocate once
        before = of("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        steps(ModelConfig(), images, side, world)
        print(of("VmHWM") - before)


def steps(model: ModelConfig, images: int, side: int, world: World) -> None:
    module = TrainingModule(build(model), METHODS["final"](torch.ones(313)))
    optimisation = Optimisation(module, TrainConfig(precision="fp32", global_batch=images), world)
    for number in range(2):
        optimisation.step(number, *batch(images, side))


def batch(images: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((images, 1, side, side), 50.0), torch.zeros(images, 2, side, side)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
