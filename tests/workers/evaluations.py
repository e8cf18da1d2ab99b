"""Evaluates an untrained network on five random photographs, whatever the world size; rank 0 saves the result."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from dist_colorize.color.gamut import BINS
from dist_colorize.data import Batch, DataConfig
from dist_colorize.distributed import DistributedConfig, World, session
from dist_colorize.evaluation import evaluate, protocol, write_evaluation
from dist_colorize.models import ModelConfig, build, initialise
from dist_colorize.postprocess.stages import load_preset

PHOTOGRAPHS, LOCAL, SIZE = 5, 2, 32


def batches(world: World) -> Iterator[Batch]:
    """As data.evaluation_batches makes them: shares in stretches, padding of weight 0 and sample -1."""
    generator = torch.Generator().manual_seed(5)
    lightness = torch.rand(PHOTOGRAPHS, 1, SIZE, SIZE, generator=generator) * 100
    ab = torch.randn(PHOTOGRAPHS, 2, SIZE // 8, SIZE // 8, generator=generator) * 25
    ab = torch.nn.functional.interpolate(ab, SIZE, mode="bilinear")
    total = LOCAL * world.size
    for start in range(0, PHOTOGRAPHS, total):
        rows = torch.arange(start + world.rank * LOCAL, start + (world.rank + 1) * LOCAL)
        real = rows < PHOTOGRAPHS
        shown = torch.where(real, rows, 0)
        yield Batch(lightness[shown], ab[shown], real.float(), torch.where(real, rows, -1))


def main(folder: str, method: str) -> None:
    torch.manual_seed(0)
    model = ModelConfig(method=method, width=0.0625, encoder="scratch")
    network = build(model)
    initialise(network, model, torch.rand(4, 1, SIZE, SIZE) * 100)
    torch.nn.init.normal_(network.head.weight, std=0.5)
    with session(DistributedConfig(device="cpu", threads=1)) as world:
        weights = torch.linspace(0.5, 2, BINS)
        result = evaluate(network.eval(), batches(world), load_preset("final"), world, 2, None, weights)
        if world.is_leader:
            place = Path(folder)
            (place / "panels").mkdir()
            write_evaluation(place, result, protocol(DataConfig(), "final"))
            each = [[one.sample, one.scores, dict(one.classifier)] for one in result.photographs]
            facts = {"each": each, "pictures": len(result.pictures), "table": result.table()}
            (place / "each.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
