"""Files that come with the package are found from a checkout and beside an installed package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHECKOUT

from dist_colorize import resources
from dist_colorize.errors import UserError


def test_an_installed_folder_comes_before_the_one_beside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site-packages" / "dist_colorize"
    (package / "configs").mkdir(parents=True)
    (package.parent / "configs").mkdir()
    (package.parent / "kernels").mkdir()
    monkeypatch.setattr(resources, "_PACKAGE", package)
    assert (
        resources.resource("configs", "postprocess", "final.yaml") == package / "configs" / "postprocess" / "final.yaml"
    )
    assert resources.resource("kernels") == package.parent / "kernels"


def test_a_missing_folder_names_itself_and_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_PACKAGE", tmp_path / "dist_colorize")
    with pytest.raises(UserError, match=r"kernels.*reinstall"):
        resources.resource("kernels", "decode.cu")


def test_a_wheel_holds_every_file_inside_the_package(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "site-packages"
    shutil.copytree(CHECKOUT, source, ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "runs", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--quiet"]
    done = subprocess.run(
        [*command, "--target", str(target), str(source)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    package = {path.relative_to(target) for path in target.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    expected = {path.relative_to(source) for path in (source / "dist_colorize").rglob("*.py")}
    for folder in ("configs", "kernels"):
        expected |= {Path("dist_colorize", path.relative_to(source)) for path in (source / folder).rglob("*.*")}
    assert {path for path in package if path.parts[0] == "dist_colorize"} >= expected
    assert {path.parts[0].split("-")[0] for path in package} == {"dist_colorize"}  # nothing beside it in site-packages
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            "from dist_colorize.resources import resource; print(resource('configs', 'final.yaml'))",
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
    )
    assert found.stdout.strip() == str(target / "dist_colorize" / "configs" / "final.yaml")
