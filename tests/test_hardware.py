"""What a machine offers: its cores, and its fastest precision."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import rank_environment

from dist_colorize.distributed import DistributedConfig, session
from dist_colorize.hardware import default_precision, usable_cores, use_ieee_fp32


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp32")])
def test_precision_follows_the_processor(monkeypatch: pytest.MonkeyPatch, has_bf16: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bf16, "amx_bf16": False})
    assert default_precision(torch.device("cpu")) == expected


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp16")])
def test_precision_follows_the_gpu(monkeypatch: pytest.MonkeyPatch, has_bf16: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert default_precision(torch.device("cuda")) == expected


def test_usable_cores_respects_the_affinity() -> None:
    everything = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(everything)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, everything)
    assert 1 <= usable_cores() <= len(everything)


@pytest.mark.parametrize(
    ("given", "cores"),
    [
        ({"SLURM_CPUS_PER_TASK": "3", "SLURM_TASKS_PER_NODE": "2(x4)"}, 6),
        ({"SLURM_CPUS_PER_TASK": "3"}, 3),
        ({"SLURM_CPUS_PER_TASK": "40", "SLURM_TASKS_PER_NODE": "1"}, 16),
        ({"SLURM_TASKS_PER_NODE": "2(x4)"}, 16),  # SLURM was not asked for a number
    ],
)
def test_usable_cores_are_those_that_slurm_gave(
    given: dict[str, str], cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_TASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Path, "read_text", lambda path: "max 100000")  # no container's quota
    assert usable_cores() == cores


PRECISIONS = """
import torch
from dist_colorize.hardware import use_ieee_fp32
from torch.backends import cuda, cudnn
{}
print(cudnn.allow_tf32, cuda.matmul.allow_tf32, torch.get_float32_matmul_precision())
print(cudnn.conv.fp32_precision == "tf32", cudnn.rnn.fp32_precision == "tf32", cuda.matmul.fp32_precision == "tf32")
with cudnn.flags(enabled=True, allow_tf32=False):
    print(cudnn.conv.fp32_precision == "tf32")
print(cudnn.allow_tf32, cudnn.conv.fp32_precision == "tf32")
"""


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("", "True True high\nTrue True True\nFalse\nTrue True\n"),  # torch as it is in NVIDIA's containers
        ("use_ieee_fp32()", "False False highest\nFalse False False\nFalse\nFalse False\n"),
    ],
)
def test_fp32_is_ieee_single_precision_by_both_of_torchs_interfaces(code: str, expected: str) -> None:
    environment = rank_environment({"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"})
    command = [sys.executable, "-W", "error", "-c", PRECISIONS.format(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (expected, "")


def test_a_session_computes_in_ieee_single_precision() -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    with session(DistributedConfig(device="cpu")):
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.gpu
def test_products_and_convolutions_on_a_gpu_are_those_of_ieee_single_precision() -> None:
    """TF32 would be off by some 3e-4 of the largest value, fp32 by some 1e-6."""
    use_ieee_fp32()
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator, dtype=torch.float64) for _ in range(2))
    image = torch.randn(2, 64, 32, 32, generator=generator, dtype=torch.float64)
    weight = torch.randn(64, 64, 3, 3, generator=generator, dtype=torch.float64)
    for exact, found in (
        (left @ right, left.cuda().float() @ right.cuda().float()),
        (F.conv2d(image, weight), F.conv2d(image.cuda().float(), weight.cuda().float())),
    ):
        assert (found.cpu().double() - exact).abs().max() < 3e-5 * exact.abs().max()
