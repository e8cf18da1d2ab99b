"""What this machine computes with: cores, and the precision that its processor or GPU is fastest in."""

from __future__ import annotations

import contextlib
import math
import os
import re
from pathlib import Path
from typing import Literal

import torch


def default_precision(device: torch.device) -> Literal["fp32", "bf16", "fp16"]:
    """The fastest precision that `device` computes in hardware: bf16, else fp16 on a GPU and fp32 on a processor."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if cpu_has_bf16() else "fp32"


def cpu_has_bf16() -> bool:
    """Whether the processor itself multiplies bf16 matrices (AVX512-BF16, Intel AMX); emulation is slower than fp32."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def use_ieee_fp32() -> None:
    """Makes fp32 mean IEEE single precision in this process: no TF32, which keeps 10 bits of each factor's mantissa.

    cuDNN's convolutions use TF32 by default, and NVIDIA's containers ask for it in matrix products too
    (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE). Without it a GPU gives what a CPU gives, up to rounding.
    """
    # By these names both torch's older and newer settings agree afterwards. Where torch.backends.*.fp32_precision is
    # set instead, whatever asks by the older name raises: torch.backends.cudnn.flags, torch.compile's convolutions.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def usable_cores() -> int:
    """Cores of this node that this process and those beside it may use: its affinity, a container's quota where one is
    set, and what SLURM gave to the tasks on a node where it was asked for cores per task."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    if "SLURM_CPUS_PER_TASK" in os.environ:  # SLURM need not bind tasks to their cores
        tasks = re.match(r"\d+", os.environ.get("SLURM_TASKS_PER_NODE", "1"))  # "8(x4)" is 8 on each of 4 nodes
        cores = min(cores, int(os.environ["SLURM_CPUS_PER_TASK"]) * int(tasks[0] if tasks else 1))
    return max(1, cores)
