"""The run folder: decided once, within the folder of all runs. torchrun's later attempts: tests/test_faults.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dist_colorize.errors import UserError
from dist_colorize.run_folder import RunConfig, make_run_folder


def test_a_new_run_has_its_own_folder_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = RunConfig(root=str(tmp_path / "runs"), name="sepia")
    first, second = (make_run_folder(config, "a: 1\n", None) for _ in range(2))
    assert first != second  # also within one second
    assert first.parent == tmp_path / "runs" and re.fullmatch(r"sepia-\d{8}-\d{6}-[0-9a-f]{6}", first.name)
    assert capsys.readouterr().out == f"run: {first}\nrun: {second}\n"
    assert {path.name for path in first.iterdir()} == {"checkpoints", "tensorboard", "panels", "config.yaml"}
    assert (first / "config.yaml").read_text() == "a: 1\n"


def test_a_given_folder_is_used_again_and_older_configs_are_kept(tmp_path: Path) -> None:
    config = RunConfig(dir=str(tmp_path / "deep" / "my run"))
    for text in ("a: 1\n", "a: 1\n", "a: 2\n", "a: 3\n"):
        path = make_run_folder(config, text, None)
    assert path == tmp_path / "deep" / "my run"
    texts = [(path / name).read_text() for name in ("config.yaml", "config.1.yaml", "config.2.yaml")]
    assert texts == ["a: 3\n", "a: 1\n", "a: 2\n"]
    assert not (path / "config.3.yaml").exists()


def test_a_folder_that_cannot_be_made_is_named_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot make the run folder .*file/run: Not a directory; set run.dir"):
        make_run_folder(RunConfig(dir=str(tmp_path / "file" / "run")), "", None)
    with pytest.raises(UserError, match=r"set run\.root"):
        make_run_folder(RunConfig(root=str(tmp_path / "file")), "", None)


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "..", "x" * 101, "a b"])
def test_a_name_cannot_leave_the_folder_of_runs(name: str) -> None:
    with pytest.raises(ValueError, match="name must be letters"):
        RunConfig(name=name)
