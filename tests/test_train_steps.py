"""The collectives of a training step, and which of them the host waits for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import DEVICES
from test_train import TINY

from dist_colorize import train
from dist_colorize.optimisation import Optimisation


class Collectives:
    """Events in order: "step" begins, "reduce" (blocks), "ask 3", "answer 3" (blocks), "objects" (blocks)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self._asked = 0
        reduce, step = dist.all_reduce, Optimisation.step

        def all_reduce(tensor: torch.Tensor, operation: Any, async_op: bool = False) -> Any:
            if not async_op:
                self.events.append("reduce")
                return reduce(tensor, operation)
            self._asked += 1
            self.events.append(f"ask {self._asked}")
            return Pending(reduce(tensor, operation, async_op=True), self._asked, self.events)

        def counted(optimisation: Optimisation, *args: Any) -> torch.Tensor:
            self.events.append("step")
            return step(optimisation, *args)

        monkeypatch.setattr(dist, "all_reduce", all_reduce)
        monkeypatch.setattr(Optimisation, "step", counted)
        for name in ("all_gather_object", "broadcast_object_list"):
            genuine = getattr(dist, name)
            monkeypatch.setattr(dist, name, lambda *a, g=genuine, **k: (self.events.append("objects"), g(*a, **k))[1])


class Pending:
    def __init__(self, work: dist.Work, number: int, events: list[str]) -> None:
        self._work, self._number, self._events = work, number, events

    def wait(self) -> bool:
        self._events.append(f"answer {self._number}")
        return bool(self._work.wait())


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_waits_for_its_own_sums_and_for_what_was_asked_a_step_before(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the latency of the stop flag is hidden behind a whole step. On a GPU the host does not wait for the sums."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    collectives = Collectives(monkeypatch)
    settings = ["train.steps=9", "train.log_every=100", "train.validate_every=0", "checkpoint.every=100"]
    train.main([*TINY, *settings, f"distributed.device={device}", f"run.dir={tmp_path / 'run'}"])
    torch.set_num_threads(threads)

    steps = " ".join(collectives.events).split(" step ")[3:-1]  # the first step and the last one are logged
    first = int(steps[0].split()[2])
    assert steps == [f"reduce ask {first + step} answer {first + step - 1}" for step in range(6)]
