"""Three optimizer steps on a fixed global batch, whatever the world size; rank 0 saves losses and weights.

With `poison` as the fourth override the last rank has NaN in its share of the second step.
"""

from __future__ import annotations

import sys

import torch

from dist_colorize import config
from dist_colorize.color.gamut import BINS
from dist_colorize.distributed import DistributedConfig, session
from dist_colorize.models import ModelConfig, TrainingModule, build, initialise
from dist_colorize.models.objectives import RebalancedCrossEntropy
from dist_colorize.optimisation import Optimisation, TrainConfig


def main(result: str, *overrides: str) -> None:
    settings = {"steps": 10, "global_batch": 8, "warmup": 2, "precision": "fp32"}
    settings |= dict(zip(("precision", "micro_batch", "ema"), (eval_or_text(o) for o in overrides), strict=False))
    train = config.build(TrainConfig, settings, "test")
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = ModelConfig(width=0.125, encoder="scratch")
    network = build(model)
    initialise(network, model, torch.rand(4, 1, 32, 32, generator=generator) * 100)
    objective = RebalancedCrossEntropy(torch.rand(BINS, generator=generator) * 4 + 0.1)
    with session(DistributedConfig(device="cpu")) as world:
        optimisation = Optimisation(TrainingModule(network, objective), train, world)
        local = train.local_batch(world.size)
        mine = slice(world.rank * local, (world.rank + 1) * local)
        losses, skipped, weights = [], [], []
        for step in range(3):
            lightness = torch.rand(8, 1, 32, 32, generator=generator) * 100
            # ranks differ in how rare their colours are: a mean of the ranks' means would show
            ab = torch.randn(8, 2, 32, 32, generator=generator) * torch.linspace(2, 40, 8).view(8, 1, 1, 1)
            if overrides[3:] and step == 1 and world.rank == world.size - 1:
                lightness[mine] *= float("nan")
            losses.append(optimisation.step(step, lightness[mine], ab[mine]).item())
            skipped.append(optimisation.skipped.tolist())
            weights.append({name: value.clone() for name, value in network.state_dict().items()})
        weights_of_all = world.gather_objects(weights[-1])
        if world.is_leader:
            state = optimisation.state_dict()
            saved = {"losses": losses, "model": state["model"], "ema": state["ema"], "skipped": skipped}
            saved |= {"before": weights[0], "after": weights[1], "weights_of_all": weights_of_all}
            torch.save(saved, result)


def eval_or_text(text: str) -> object:
    return None if text == "null" else int(text) if text.isdigit() else float(text) if "." in text else text


if __name__ == "__main__":
    main(*sys.argv[1:])
