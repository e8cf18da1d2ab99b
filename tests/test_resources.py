"""Files that come with the package are found from a checkout and beside an installed package."""

from __future__ import annotations

from pathlib import Path

import pytest

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
