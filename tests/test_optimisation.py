"""The training step: the same at every world size, and equal to the plain weighted mean on one process."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICES
from torch.utils._python_dispatch import TorchDispatchMode

from dist_colorize.color.gamut import BINS
from dist_colorize.distributed import DistributedConfig, session
from dist_colorize.errors import UserError
from dist_colorize.models import METHODS, ModelConfig, TrainingModule, build, initialise
from dist_colorize.models.objectives import RebalancedCrossEntropy
from dist_colorize.optimisation import Optimisation, TrainConfig

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


def test_moving_average_is_the_one_by_the_book(torchrun: Torchrun, tmp_path: Path, alone: dict[str, Any]) -> None:
    found = run(torchrun, tmp_path, 1, "fp32", "null", "0.9")
    assert furthest(found["model"], alone["model"]) == 0
    first, second, third = (found[name] for name in ("before", "after", "model"))
    for name, average in found["ema"].items():
        after_two = 0.9 * first[name].double() + 0.1 * second[name].double()
        torch.testing.assert_close(average.double(), 0.9 * after_two + 0.1 * third[name].double(), rtol=1e-6, atol=1e-7)
    assert 0 < furthest(found["ema"], found["model"]) < 0.01


class HostReads(TorchDispatchMode):
    """Notes operations that make the host wait for a GPU: numbers read from tensors, tensors made from numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def optimisation(device: str, model: ModelConfig, **settings: Any) -> Iterator[Optimisation]:
    """One rank, a narrow network with random weights."""
    torch.manual_seed(0)
    network = build(model)
    torch.nn.init.normal_(network.head.weight, std=0.1)
    module = TrainingModule(network, METHODS[model.method](torch.linspace(0.2, 3, BINS)))
    with session(DistributedConfig(device=device)) as world:
        config = TrainConfig(**{"steps": 10, "global_batch": 4, "warmup": 2, "precision": "fp32"} | settings)
        yield Optimisation(module.to(world.device), config, world)


def crops(device: torch.device, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lightness, ab = torch.rand(4, 1, 32, 32, generator=generator), torch.randn(4, 2, 32, 32, generator=generator)
    return 100 * lightness.to(device), 20 * ab.to(device)


NARROW = ModelConfig(width=0.125, encoder="a file")
"""The encoder is frozen, as for a pretrained one."""


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_reads_nothing_back_from_the_device(method: str, precision: str) -> None:
    model = replace(NARROW, method=method)
    with optimisation("cpu", model, ema=0.9, precision=precision, micro_batch=2) as one:
        batch = crops(one.world.device)
        one.step(0, *batch)
        with HostReads() as reads:
            one.step(1, *batch)
    assert reads.found == []


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("method", METHODS)
def test_five_steps_never_wait_for_the_gpu(method: str, precision: str) -> None:
    with optimisation("cuda", replace(NARROW, method=method), ema=0.9, precision=precision, micro_batch=2) as one:
        batch = crops(one.world.device)
        one.step(0, *batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for number in range(1, 6):
                one.step(number, *batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert one.skipped.tolist() == [0, 0]


@pytest.mark.parametrize("device", DEVICES)
def test_the_average_holds_frozen_weights_once(device: str) -> None:
    with optimisation(device, NARROW, ema=0.9) as one:
        one.step(0, *crops(one.world.device))
        network, average = one.module.network, one.network
        for name, weight in network.named_parameters():
            shared = average.get_parameter(name).data_ptr() == weight.data_ptr()
            assert shared == name.startswith("encoder.") == (name not in one.state_dict()["ema"])
        assert torch.equal(network.head.weight, average.head.weight)
        one.step(1, *crops(one.world.device, 1))
        assert not torch.equal(network.head.weight, average.head.weight)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_batch_with_nan_changes_no_bit(device: str, precision: str) -> None:
    with optimisation(device, NARROW, precision=precision) as one:
        lightness, ab = crops(one.world.device)
        one.step(0, lightness, ab)
        before = {name: weight.clone() for name, weight in one.module.state_dict().items()}
        one.step(1, lightness * float("nan"), ab)
        assert one.skipped.tolist() == [1, 1]
        assert all(torch.equal(weight, before[name]) for name, weight in one.module.state_dict().items())
        scale = one.scaler.get_scale()
        assert precision != "fp16" or scale == 2.0**15  # halved once
        assert torch.isfinite(one.step(2, lightness, ab))
        assert one.skipped.tolist() == [1, 0]
        assert furthest(before, one.module.state_dict()) > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("then", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("now", ["bf16", "fp16", "fp32"])
def test_every_precision_resumes_every_other(device: str, then: str, now: str) -> None:
    with optimisation(device, NARROW, precision=then, ema=0.9) as one:
        for number in range(3):
            one.step(number, *crops(one.world.device, number))
        state = copy.deepcopy(one.state_dict())
    with optimisation(device, NARROW, precision=now, ema=0.9) as other:
        other.load_state_dict(state)
        assert furthest(state["model"], other.module.network.state_dict()) == 0
        assert furthest(state["ema"], other.state_dict()["ema"]) == 0
        loss = other.step(3, *crops(other.world.device, 3))
    assert torch.isfinite(loss) and other.skipped.tolist() == [0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2), ("fp16", 5e-3)])
def test_a_gpu_trains_as_the_cpu_does(precision: str, tolerance: float) -> None:
    losses = {}
    for device, own in (("cpu", "fp32"), ("cuda", precision)):
        with optimisation(device, NARROW, precision=own, micro_batch=2) as one:
            losses[device] = [one.step(n, *crops(one.world.device, n)).item() for n in range(5)]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=tolerance)


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
