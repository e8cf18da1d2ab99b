"""The training step: the same at every world size, and equal to the plain weighted mean on one process."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_colorize.color.gamut import BINS
from dist_colorize.errors import UserError
from dist_colorize.models import ModelConfig, TrainingModule, build, initialise
from dist_colorize.models.objectives import RebalancedCrossEntropy
from dist_colorize.optimisation import TrainConfig

WORKER = Path(__file__).parent / "workers" / "steps.py"
Torchrun = Callable[..., "subprocess.CompletedProcess[str]"]


def run(torchrun: Torchrun, folder: Path, ranks: int, *overrides: str) -> dict[str, Any]:
    result = folder / f"{ranks}-{'-'.join(overrides)}.pt"
    done = torchrun(ranks, WORKER, result, *overrides)
    assert done.returncode == 0, done.stderr
    loaded: dict[str, Any] = torch.load(result, weights_only=True)
    return loaded


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from conftest import run_torchrun

    return run(run_torchrun, tmp_path_factory.mktemp("alone"), 1)


@pytest.mark.parametrize(("ranks", "micro_batch"), [(2, "null"), (4, "null"), (1, "2"), (2, "1")])
def test_step_does_not_depend_on_world_size_or_accumulation(
    torchrun: Torchrun, tmp_path: Path, alone: dict[str, Any], ranks: int, micro_batch: str
) -> None:
    """Adam divides by the gradient's size, so a weight may move by lr in the direction of rounding noise."""
    found = run(torchrun, tmp_path, ranks, "fp32", micro_batch)
    assert found["losses"] == pytest.approx(alone["losses"], rel=2e-5)
    assert furthest(found["model"], alone["model"]) < 1e-4


def test_bf16_follows_fp32(torchrun: Torchrun, tmp_path: Path, alone: dict[str, Any]) -> None:
    assert run(torchrun, tmp_path, 1, "bf16")["losses"] == pytest.approx(alone["losses"], rel=2e-3)


def test_moving_average_lags_behind(torchrun: Torchrun, tmp_path: Path, alone: dict[str, Any]) -> None:
    found = run(torchrun, tmp_path, 1, "fp32", "null", "0.9")
    assert furthest(found["model"], alone["model"]) == 0
    assert 0 < furthest(found["ema"], found["model"]) < 0.01


def test_first_loss_and_update_equal_the_plain_computation(alone: dict[str, Any]) -> None:
    """One process, torch's own cross entropy with mean reduction over the batch, clipping and Adam by the book."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    config = ModelConfig(width=0.125, encoder="scratch")
    network = build(config)
    initialise(network, config, torch.rand(4, 1, 32, 32, generator=generator) * 100)
    weights = torch.rand(BINS, generator=generator) * 4 + 0.1
    module = TrainingModule(network, RebalancedCrossEntropy(weights))
    train = TrainConfig(steps=10, warmup=2)
    adam = torch.optim.Adam(network.parameters())
    for step in range(3):
        lightness = torch.rand(8, 1, 32, 32, generator=generator) * 100
        ab = torch.randn(8, 2, 32, 32, generator=generator) * torch.linspace(2, 40, 8).view(8, 1, 1, 1)
        labels = module.objective.gamut.nearest(torch.nn.functional.avg_pool2d(ab, 2)).long()
        loss = torch.nn.functional.cross_entropy(network(lightness), labels, weights)
        assert loss.item() == pytest.approx(alone["losses"][step], rel=2e-5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adam.param_groups[0]["lr"] = train.learning_rate(step)
        adam.step()
        adam.zero_grad()
    assert furthest(network.state_dict(), alone["model"]) < 1e-4


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    config = TrainConfig(steps=100, warmup=10, lr=1.0)
    rates = [config.learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[10] == pytest.approx(1) and max(rates) == pytest.approx(1)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 1e-3
    assert TrainConfig(steps=100, warmup=0, schedule="constant", lr=0.5).learning_rate(99) == 0.5


def test_global_batch_must_be_shared_evenly() -> None:
    assert TrainConfig(global_batch=12).local_batch(3) == 4
    with pytest.raises(UserError, match=r"train.global_batch=10 cannot be shared by 4 ranks.*train.global_batch=8"):
        TrainConfig(global_batch=10).local_batch(4)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"lr": 0.0}, {"clip": -1.0}, {"ema": 1.0}, {"micro_batch": 0}, {"seed": -1}]
)
def test_impossible_values_name_the_field(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainConfig(**wrong)


def test_nan_on_one_rank_skips_the_step_on_all(torchrun: Torchrun, tmp_path: Path, alone: dict[str, Any]) -> None:
    """Rank 1 alone sees NaN, in the second step: all ranks have the weights of the first and third then."""
    found = run(torchrun, tmp_path, 2, "fp32", "1", "null", "poison")
    assert found["skipped"] == [[0, 0], [1, 1], [1, 0]]
    assert found["losses"][0] == pytest.approx(alone["losses"][0], rel=2e-5)
    assert found["losses"][1] != found["losses"][1]
    assert all(torch.isfinite(weight).all() for weight in found["model"].values())
    for mine in found["weights_of_all"]:
        assert furthest(mine, found["model"]) == 0
    assert furthest(found["before"], found["after"]) == 0
