"""What the ranks say to each other in a step, and what they wait for: no answer of the step it was asked in."""

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


class Conversation:
    """What a rank does, in order: "step", "reduce" (it waits), "ask 3", "answer 3" (it waits), "objects" (it waits)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[str] = []
        self._asked = 0
        reduce, step = dist.all_reduce, Optimisation.step

        def spoken(tensor: torch.Tensor, operation: Any, async_op: bool = False) -> Any:
            if not async_op:
                self.said.append("reduce")
                return reduce(tensor, operation)
            self._asked += 1
            self.said.append(f"ask {self._asked}")
            return Heard(reduce(tensor, operation, async_op=True), self._asked, self.said)

        def stepped(optimisation: Optimisation, *args: Any) -> torch.Tensor:
            self.said.append("step")
            return step(optimisation, *args)

        monkeypatch.setattr(dist, "all_reduce", spoken)
        monkeypatch.setattr(Optimisation, "step", stepped)
        for name in ("all_gather_object", "broadcast_object_list"):
            genuine = getattr(dist, name)
            monkeypatch.setattr(dist, name, lambda *a, g=genuine, **k: (self.said.append("objects"), g(*a, **k))[1])


class Heard:
    def __init__(self, work: dist.Work, number: int, said: list[str]) -> None:
        self._work, self._number, self._said = work, number, said

    def wait(self) -> bool:
        self._said.append(f"answer {self._number}")
        return bool(self._work.wait())


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_waits_for_its_own_sums_and_for_what_was_asked_a_step_before(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer has a whole step to travel, however far the ranks are from each other; on a GPU no host waits for the
    sums either."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    conversation = Conversation(monkeypatch)
    settings = ["train.steps=9", "train.log_every=100", "train.validate_every=0", "checkpoint.every=100"]
    train.main([*TINY, *settings, f"distributed.device={device}", f"run.dir={tmp_path / 'run'}"])
    torch.set_num_threads(threads)

    said = " ".join(conversation.said).split(" step ")[3:-1]  # the first step and the last one are logged
    first = int(said[0].split()[2])
    assert said == [f"reduce ask {first + step} answer {first + step - 1}" for step in range(6)]
