"""What a plan promises, against what a real run takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from test_faults import make_photographs
from test_train import TINY

from dist_colorize import train
from dist_colorize.distributed import DistributedConfig, session
from dist_colorize.footprint import checkpoint_bytes, memory, traffic
from dist_colorize.models import METHODS, ModelConfig, TrainingModule, build
from dist_colorize.optimisation import Optimisation, TrainConfig
from dist_colorize.recipe import recipe_of

FP32 = TrainConfig(precision="fp32")


def trained_bytes(model: ModelConfig) -> int:
    return sum(parameter.nbytes for parameter in build(model).parameters() if parameter.requires_grad)


@pytest.mark.slow
def test_memory_is_what_a_real_step_takes() -> None:
    promised = memory(ModelConfig(), FP32, 4, 224, "cpu")
    # the allocator gives large blocks back at once; by default it learns to keep them
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    worker = Path(__file__).parent / "workers" / "peak.py"
    command = [sys.executable, str(worker), "4", "224"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=300)
    assert int(done.stdout) == pytest.approx(promised.peak, rel=0.15)


def test_memory_of_activations_grows_with_the_batch_and_shrinks_with_precision() -> None:
    one, four = (memory(ModelConfig(width=0.25), FP32, images, 64, "cpu") for images in (1, 4))
    assert four.activations == pytest.approx(4 * one.activations, rel=0.05)
    assert (four.weights, four.gradients, four.optimizer) == (one.weights, one.gradients, one.optimizer)
    half = memory(ModelConfig(width=0.25), TrainConfig(precision="bf16"), 4, 64, "cpu")
    assert 0.5 < half.activations / four.activations < 0.8
    # 32 x 32 cells of 313 logits of 4 bytes
    assert four.logits == 4 * 32 * 32 * 313 * 4


def test_memory_on_a_gpu_follows_its_group_norm() -> None:
    """CUDA's GroupNorm answers in fp32 under autocast, and in NCHW: the loss must then copy its rows."""
    images, side = 8, 224
    cpu, gpu = (memory(ModelConfig(), TrainConfig(precision="bf16"), images, side, d) for d in ("cpu", "cuda"))
    # elements of the three outputs, 256, 128 and 64 channels at strides 8, 4 and 2
    outputs = [images * channels * (side // stride) ** 2 for channels, stride in ((256, 8), (128, 4), (64, 2))]
    # each is 2 bytes wider, as is what goes into GroupNorm; the next convolutions keep bf16 copies of the first two
    assert gpu.activations - cpu.activations == pytest.approx(4 * sum(outputs) + 2 * sum(outputs[:2]), rel=0.05)
    cpu, gpu = (memory(ModelConfig(), FP32, images, side, d) for d in ("cpu", "cuda"))
    # the same is kept, but GroupNorm and the loss work on copies in another layout
    assert gpu.activations == cpu.activations and gpu.peak - cpu.peak >= 4 * outputs[-1]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_is_what_a_real_step_takes_on_a_gpu(precision: Literal["fp32", "bf16"]) -> None:
    config = TrainConfig(precision=precision, global_batch=8)
    promised = memory(ModelConfig(), config, 8, 224, "cuda")
    with session(DistributedConfig(device="cuda")) as world:
        before = torch.cuda.memory_allocated()
        module = TrainingModule(build(ModelConfig()), METHODS["final"](torch.ones(313)).to(world.device))
        optimisation = Optimisation(module.to(world.device), config, world)
        torch.cuda.reset_peak_memory_stats()
        for number in range(3):
            lightness = torch.full((8, 1, 224, 224), 50.0, device=world.device)
            optimisation.step(number, lightness, lightness.expand(-1, 2, -1, -1))
        taken = torch.cuda.max_memory_allocated() - before
    # cuDNN's workspaces come on top; those of fp32 convolutions are large
    assert 0.85 * promised.peak < taken < (1.5 if precision == "bf16" else 2.5) * promised.peak


@pytest.mark.parametrize(
    "model", [ModelConfig(), ModelConfig(width=0.25, encoder="scratch"), ModelConfig(method="mse")]
)
def test_fixed_memory_is_that_of_the_parameters(model: ModelConfig) -> None:
    trained = trained_bytes(model)
    promised = memory(model, TrainConfig(precision="fp32", ema=0.9), 1, 32, "cpu")
    assert promised.gradients == trained
    # two moments, and a step count for each parameter
    assert 2 * trained <= promised.optimizer <= 2 * trained + 1000
    assert promised.average == trained
    assert promised.peak > promised.weights + promised.gradients + promised.optimizer + promised.average


@pytest.mark.parametrize("model", [ModelConfig(width=0.25), ModelConfig(width=0.25, encoder="scratch")])
def test_only_gradients_of_what_is_trained_are_sent(model: ModelConfig) -> None:
    # besides: two sums in float64, and what DDP agrees on
    assert 0 <= traffic(model, FP32) - trained_bytes(model) < 1000


def test_size_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    photographs = make_photographs(tmp_path / "photographs", 8)
    run = tmp_path / "run"
    train.main(
        [*TINY, f"data.root={photographs}", f"run.dir={run}", "train.steps=2", "train.ema=0.9", "model.width=0.2"]
    )
    recipe = recipe_of(run)
    size = (run / "checkpoints" / "latest").stat().st_size
    assert size == pytest.approx(checkpoint_bytes(recipe.model, recipe.train), rel=0.05)
