"""A recipe: everything that determines a run. Each section is a dataclass that lives beside the code it configures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dist_colorize import config
from dist_colorize.checkpoint import CheckpointConfig
from dist_colorize.color.rebalance import LossConfig
from dist_colorize.data import DataConfig
from dist_colorize.distributed import DistributedConfig
from dist_colorize.evaluation import EvaluateConfig
from dist_colorize.models import ModelConfig
from dist_colorize.optimisation import TrainConfig
from dist_colorize.resources import resource
from dist_colorize.run_folder import RunConfig
from dist_colorize.slurm.settings import SlurmConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


def load_recipe(description: str, argv: Sequence[str] | None = None) -> Recipe:
    """The recipe that the command line names: `[--config FILE] [key=value ...]`, quickstart when it names none."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="keys, their defaults and meaning:\n\n" + config.describe(Recipe),
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=resource("configs") / "quickstart.yaml",
        help="YAML recipe, or RUN/config.yaml to repeat or continue a run (default: configs/quickstart.yaml)",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that win over the file: data.root=/photos train.lr=3e-4",
    )
    arguments = parser.parse_args(argv)
    return config.load(Recipe, arguments.config, arguments.overrides)


def recipe_of(run: Path) -> Recipe:
    """The recipe that a run was made with: the `config.yaml` in its folder."""
    return config.load(Recipe, run / "config.yaml")
