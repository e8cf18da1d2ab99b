"""A copy of the code that is submitted, so that editing the checkout while a job waits in the queue changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import dist_colorize

PACKAGE = Path(dist_colorize.__file__).resolve().parent
BESIDE = ("configs", "kernels", "launch")
"""Folders that a checkout has beside the package; an installed package has them inside."""


def code_root() -> Path:
    """The folder that must be on PYTHONPATH to run the code that runs now."""
    return PACKAGE.parent


def take_snapshot(target: Path) -> Path:
    """Copy the package to `target`, which becomes a folder for PYTHONPATH; returns it.

    What numba has compiled comes along (in __pycache__), so that the tasks need not do it again.
    """
    leave_out = shutil.ignore_patterns("*.pyc", ".*")
    shutil.copytree(PACKAGE, target / PACKAGE.name, ignore=leave_out)
    for folder in BESIDE:
        if not (PACKAGE / folder).is_dir() and (code_root() / folder).is_dir():
            shutil.copytree(code_root() / folder, target / folder, ignore=leave_out)
    return target
