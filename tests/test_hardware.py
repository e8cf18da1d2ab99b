"""What a machine offers: its cores, and its fastest precision."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dist_colorize.hardware import default_precision, usable_cores


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
