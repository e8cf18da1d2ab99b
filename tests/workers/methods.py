"""Two optimizer steps of every method on a fixed global batch, whatever the world size; rank 0 saves the results."""

from __future__ import annotations

import sys

import torch

from dist_colorize.color.gamut import BINS
from dist_colorize.distributed import DistributedConfig, session
from dist_colorize.models import METHODS, ModelConfig, TrainingModule, build, initialise
from dist_colorize.optimisation import Optimisation, TrainConfig


def main(result: str) -> None:
    train = TrainConfig(steps=10, global_batch=4, warmup=2, precision="fp32")
    found = {}
    with session(DistributedConfig(device="cpu")) as world:
        for method in METHODS:
            torch.manual_seed(0)
            generator = torch.Generator().manual_seed(1)
            model = ModelConfig(method=method, width=0.0625, encoder="scratch")
            network = build(model)
            initialise(network, model, torch.rand(4, 1, 32, 32, generator=generator) * 100)
            objective = METHODS[method](torch.rand(BINS, generator=generator) * 4 + 0.1)
            optimisation = Optimisation(TrainingModule(network, objective), train, world)
            local = train.local_batch(world.size)
            mine = slice(world.rank * local, (world.rank + 1) * local)
            losses = []
            for step in range(2):
                lightness = torch.rand(4, 1, 32, 32, generator=generator) * 60 + 20
                # ranks differ in how rare their colours are: a mean of the ranks' means would show
                ab = torch.randn(4, 2, 32, 32, generator=generator) * torch.linspace(2, 30, 4).view(4, 1, 1, 1)
                losses.append(optimisation.step(step, lightness[mine], ab[mine]).item())
            found[method] = {"losses": losses, "model": optimisation.state_dict()["model"]}
        if world.is_leader:
            torch.save(found, result)


if __name__ == "__main__":
    main(sys.argv[1])
