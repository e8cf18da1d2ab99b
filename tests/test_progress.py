"""What is shown of a run's progress, and how its speed is measured."""

from __future__ import annotations

import io
import sys

import pytest
import torch

from dist_colorize import progress as module
from dist_colorize.distributed import World
from dist_colorize.progress import Meter, Progress

LEADER = World(0, 0, 1, 1, torch.device("cpu"), "gloo", 1)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


def test_plain_lines_tell_loss_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with Progress("train", LEADER, total=100, done=40) as progress:
        for step in range(60):
            clock.now += 0.5
            progress.update(images=32, loss=torch.tensor(1.0 - step / 100))
    assert capsys.readouterr().err.splitlines() == [
        "train 60/100  loss 0.81, 64 images/s, ETA 0:00:20",
        "train 80/100  loss 0.61, 64 images/s, ETA 0:00:10",
        "train 100/100  loss 0.41, 64 images/s, ETA 0:00:00",
    ]


def test_a_terminal_gets_a_bar_and_the_loss_is_read_only_when_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    class Loss:
        reads = 0

        def __float__(self) -> float:
            Loss.reads += 1
            return 0.25

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    clock = Clock(monkeypatch)
    with Progress("train", LEADER, total=100) as progress:
        for _ in range(100):
            clock.now += 0.125
            progress.update(images=4, loss=Loss())
    assert Loss.reads == 25
    last = terminal.getvalue().split("\r")[-1]
    assert "train 100%" in last
    assert "100/100, loss 0.25, 32 images/s, ETA 0:00:00" in last


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    other = World(1, 1, 2, 2, torch.device("cpu"), "gloo", 1)
    with Progress("train", other, total=1) as progress:
        progress.update(images=4, loss=1)
    assert capsys.readouterr().err == ""


def test_the_meter_measures_rate_and_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("dist_colorize.progress.time.monotonic", lambda: now)
    meter = Meter()
    for _ in range(2):
        with meter.waiting():
            now += 1
        now += 3
        meter.count(images=16)
    assert meter.read() == {"images_per_second": 4.0, "data_wait": 0.25}
    now += 2
    meter.count(images=1)
    assert meter.read() == {"images_per_second": 0.5, "data_wait": 0.0}
