"""What the other steps of .ci/gpu run on: card, driver, packages, commit.

python -m benchmarks.gpu_versions
"""

from __future__ import annotations

import os
import platform
import subprocess

import torch

from benchmarks.gpu_runner import CHECKOUT, fact
from benchmarks.harness import version_of
from dist_colorize import doctor

PACKAGES = {
    "torchvision": ("torchvision",),
    "DALI": ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    "nvImageCodec": ("nvidia-nvimgcodec-cu13", "nvidia-nvimgcodec-cu12"),
    "CuPy": ("cupy-cuda13x", "cupy-cuda12x"),
    "numba": ("numba",),
    "scikit-image": ("scikit-image",),
    "pyvips": ("pyvips",),
    "triton": ("triton",),
}
"""What the table calls a package -> the distributions that may be it."""


def main() -> None:
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        fact(
            card=f"{card.name}, {card.total_memory / 2**30:.0f} GiB, sm_{card.major}{card.minor}",
            driver=doctor._driver_version(),
            NCCL=".".join(map(str, torch.cuda.nccl.version())),
            cuDNN=torch.backends.cudnn.version(),
        )
    fact(torch=torch.__version__, **{name: version(*names) for name, names in PACKAGES.items()})
    fact(Python=platform.python_version(), cores=len(os.sched_getaffinity(0)), commit=commit())


def version(*distributions: str) -> str:
    """Of the first one that is installed."""
    found = [version_of(name) for name in distributions]
    return next((text for text in found if text != "missing"), "missing")


def commit() -> str:
    """The checkout's commit, with a mark where files differ from it; unknown without git."""
    command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
