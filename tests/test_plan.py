"""The command that says what a training would take."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dist_colorize import plan
from dist_colorize.errors import UserError

SMALL = ["model.width=0.1", "model.encoder=scratch", "data.crop=32"]


def lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    plan.main([*arguments, *SMALL])
    found = (line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  "))
    return dict(re.split(r"  +", line, maxsplit=1) for line in found)


def test_numbers_follow_from_what_was_asked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    told = lines(
        capsys, "--gpus", "64", "--images", "1e6", "--batch", "4096", "--throughput", "20480", f"run.root={tmp_path}",
        "train.steps=1000", "train.micro_batch=16", "checkpoint.every=100",
    )  # fmt: skip
    assert told["steps"] == "1,000 of 4,096 photographs: 64 per GPU, 16 at a time"
    assert told["epochs"] == "4.1 (4,096,000 crops of 1,000,000 photographs)"
    assert told["time"] == "0.1 hours at 20,480 images/s: 4 GPU hours"
    assert told["data set"] == "110 GB at 110 kB a photograph"
    assert told["storage"] == "20,480 files and 2.25 GB per second"
    assert told["in all"].startswith("10 of them, one every 100 steps or 0.3 minutes")


def test_without_a_throughput_no_hours_are_made_up(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    told = lines(capsys, "--gpus", "8", "--images", "1000", f"run.root={tmp_path / 'not' / 'yet'}")
    assert told["time"] == "not known: give --throughput as measured"
    assert "storage" not in told and "network" not in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0", "--images", "10"], "--gpus must be a number from 1 on, got 0"),
        (["--gpus", "8", "--images", "nan"], "--images must be a number from 1 on, got nan"),
        (["--gpus", "8", "--images", "inf"], "--images must be a number from 1 on, got inf"),
        (["--gpus", "3", "--images", "10"], "train.global_batch=256 cannot be shared by 3 ranks"),
        (["--gpus", "8", "--images", "10", "--batch", "12"], "train.global_batch=12 cannot be shared by 8 ranks"),
        (["--gpus", "8", "--images", "10", "--throughput", "-3"], "--throughput must be a number from 1 on, got -3"),
    ],
)
def test_bad_usage_is_named(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        plan.main(arguments)
    assert str(error.value).startswith(message)
