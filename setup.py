"""What dist_colorize is, what it needs, and which files beside the Python ones belong to it.

    pip install .                                   # CUDA 13 wheels; they work on machines without a GPU as well
    DIST_COLORIZE_CUDA=12 pip install .             # CUDA 12 wheels of DALI and CuPy, for drivers older than 580

torch follows its own index: for CUDA 12 install torch and torchvision from there first, see the README.
Settings of tools (lint, types, tests) stand in pyproject.toml.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent

# Folders at the top level whose files are installed inside dist_colorize, so that they cannot clash with a package of
# the same name. dist_colorize/resources.py finds them in both places.
FOLDERS = {
    "configs": ["*.yaml", "*/*.yaml"],
    "kernels": ["*.cu", "*.cuh"],
    "launch": ["*.sh", "*.sbatch"],
}
present = [folder for folder in FOLDERS if (HERE / folder).is_dir()]

# DALI 2.1 fails on crops of files that EXIF rotates. DALI 2.3 and 2.4 require nvImageCodec 0.9, whose GPU decoder
# crashes on crops of JPEG files (NVIDIA/nvImageCodec#55).
DALI = ">=2.2,<2.3"
CUPY = ">=14"
CUDA_WHEELS = {
    "13": ["nvidia-dali-cuda130" + DALI, "cupy-cuda13x" + CUPY],
    "12": ["nvidia-dali-cuda120" + DALI, "cupy-cuda12x" + CUPY],
}
cuda = os.environ.get("DIST_COLORIZE_CUDA", "13")
if cuda not in CUDA_WHEELS:
    raise SystemExit(f"DIST_COLORIZE_CUDA must be {' or '.join(CUDA_WHEELS)}, got {cuda!r}")

readme = HERE / "README.md"
version = re.search(r'__version__ = "(.+)"', (HERE / "dist_colorize" / "__init__.py").read_text(encoding="utf-8"))
assert version, "dist_colorize/__init__.py has no version"

setup(
    name="dist_colorize",
    version=version[1],
    description="Distributed training of image colorization networks, and their use on whole archives",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["dist_colorize", "dist_colorize.*"]),
        *(f"dist_colorize.{folder}" for folder in present),
    ],
    package_dir={f"dist_colorize.{folder}": folder for folder in present},
    package_data={
        "dist_colorize.report": ["*.html"],
        **{f"dist_colorize.{folder}": FOLDERS[folder] for folder in present},
    },
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",  # VGG16-BN and its pretrained weights
        *CUDA_WHEELS[cuda],  # decoding and augmentation; launch of our kernels and the compiler they need
        "numpy",
        "numba",  # loops over pixels on a CPU, one pass in place of many operators: compiled.py
        "pyyaml",  # config files
        "tensorboard",
        "submitit",  # SLURM
        "scipy",  # the convex hull of the gamut
        "scikit-image",  # photographs of the quickstart; SSIM and CIEDE2000
        "pyvips[binary]",  # photographs in and out, of any type and size
        "tqdm",
        "pillow",  # captions in panels
    ],
    extras_require={
        "benchmarks": ["opencv-python-headless", "kornia"],  # the peers
        "dev": ["pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "types-PyYAML", "nvidia-cuda-nvdisasm"],
    },
    classifiers=[
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Multimedia :: Graphics",
        "Topic :: Scientific/Engineering :: Image Processing",
    ],
)
