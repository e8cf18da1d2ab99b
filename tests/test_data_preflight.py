"""The trial decode in a child process: whatever becomes of the child is a reason, and all ranks conclude the same."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dist_colorize import evaluate, train
from dist_colorize.data import preflight
from dist_colorize.data.columns import Photographs
from dist_colorize.data.config import DataConfig
from dist_colorize.errors import FAILURE, OK, Interrupted, UserError
from dist_colorize.models import ModelConfig
from dist_colorize.recipe import Recipe
from dist_colorize.stopping import StopFlag


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (python("pass"), None),
        (python("import ctypes; ctypes.string_at(0)"), "died of SIGSEGV"),
        (python("import os; os.abort()"), "died of SIGABRT"),
        (python("import sys; print('noise\\nthe reason\\n', file=sys.stderr); sys.exit(3)"), "left with 3: the reason"),
        (python("import sys; sys.exit(1)"), "left with 1: no reason given"),
        (["/no/such/program"], "could not be started: No such file or directory"),
    ],
)
def test_what_becomes_of_the_child_is_told_in_a_few_words(command: Sequence[str], expected: str | None) -> None:
    assert preflight.failure(command, 60) == expected


def test_a_child_that_hangs_is_ended() -> None:
    assert preflight.failure(python("import time; time.sleep(600)"), 0.3) == "took more than 0.3 s"
    assert not children()


def test_a_wish_to_stop_ends_the_child_at_once() -> None:
    assert preflight.failure(python("import time; time.sleep(600)"), 600, lambda: True) == "was stopped"
    assert not children()


def children() -> str:
    return "".join(file.read_text() for file in Path("/proc/self/task").glob("*/children"))


def crops_of(image: np.ndarray, right: int = 0) -> list[np.ndarray]:
    return [image[y : y + height, x + right :][:, :width] for y, x, height, width in preflight.CROPS]


def test_the_cpu_decodes_the_trials_crops_as_pillow_does_and_a_pixel_aside_is_noticed() -> None:
    image = np.asarray(Image.open(BytesIO(preflight.jpeg())))
    crops = preflight.decode("cpu", None)
    assert preflight.greatest_difference(crops, crops_of(image)) == 0
    shifted = crops_of(np.roll(image, 1, axis=1))
    assert preflight.greatest_difference(crops, shifted) > 10 * preflight.TOLERANCE
    assert preflight.greatest_difference(crops, crops[:-1]) == 255


@pytest.mark.parametrize("wrong", [False, True])
def test_the_command_leaves_with_0_where_the_gpu_agrees_with_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: bool
) -> None:
    decode = preflight.decode
    asked = []

    def fake(device: Any, gpu: int | None, hw_decoder_load: float = 0.0) -> list[np.ndarray]:
        asked.append((device, gpu, hw_decoder_load))
        return [crop[::-1] if wrong and device == "gpu" else crop for crop in decode("cpu", None)]

    monkeypatch.setattr(preflight, "decode", fake)
    assert preflight.main(["3", "--hw-decoder-load", "0.5"]) == (FAILURE if wrong else OK)
    assert asked == [("gpu", 3, 0.5), ("cpu", None, 0.0)]
    assert ("wrong pixels, off by" in capsys.readouterr().err) == wrong


def test_a_machine_without_a_driver_gives_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.setattr(preflight, "_answers", {})
    found = preflight.own_failure(0, 0.0)
    assert found and found.startswith("left with 1: ")
    monkeypatch.setattr(preflight, "failure", lambda *_: pytest.fail("tried a second time"))
    assert preflight.own_failure(0, 0.0) == found


@pytest.mark.gpu
def test_the_gpu_here_agrees_with_the_cpu() -> None:
    """With what setup.py allows (nvImageCodec 0.8) there is no reason to decode on the CPU."""
    assert preflight.own_failure(0, DataConfig.hw_decoder_load) is None


# ------------------------------------------------------------ what the ranks make of it


class Ranks:
    """Ranks of a run as threads, two on each node. Rank r has GPU r, so that a trial can tell who asks for it."""

    def __init__(self, count: int = 4) -> None:
        self.count = count
        self.agreed = 0
        self._meeting, self._items = threading.Barrier(count, timeout=60), [None] * count
        self.stops = [StopFlag() for _ in range(count)]

    def world(self, rank: int) -> Any:
        def gather(item: Any) -> list[Any]:
            self._items[rank] = item
            self._meeting.wait()
            items = list(self._items)
            self._meeting.wait()
            return items

        def agree(flag: bool) -> bool:
            self.agreed += 1
            return any(gather(flag))

        return SimpleNamespace(
            rank=rank,
            local_rank=rank % 2,
            is_leader=rank == 0,
            device=torch.device("cuda", rank),
            gather_objects=gather,
            agree=agree,
        )

    def decide(self, config: DataConfig) -> list[Any]:
        """What decoding_device returns or raises on each rank."""

        def work(rank: int) -> Any:
            try:
                return preflight.decoding_device(config, self.world(rank), self.stops[rank])
            except (UserError, Interrupted) as error:
                return error

        with ThreadPoolExecutor(self.count) as threads:
            return list(threads.map(work, range(self.count)))


def test_where_one_of_two_nodes_fails_all_ranks_decode_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def trial(gpu: int, load: float, stopped: Callable[[], bool]) -> str | None:
        asked.append((gpu, load))
        return "died of SIGSEGV" if gpu == 2 else None

    monkeypatch.setattr(preflight, "own_failure", trial)
    monkeypatch.setattr(preflight.socket, "gethostname", lambda: "node")
    config = DataConfig(crop=48, hw_decoder_load=0.25)
    assert Ranks().decide(config) == [DataConfig(crop=48, hw_decoder_load=0.25, device="cpu")] * 4
    assert sorted(asked) == [(0, 0.25), (2, 0.25)]  # the first rank of each node
    assert capsys.readouterr().out == (
        "all ranks decode on the CPU: on GPU 2 of node a trial decode of JPEG crops died of SIGSEGV\n"
    )


def test_a_gpu_that_was_asked_for_and_fails_is_an_error_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "own_failure", lambda gpu, load, stopped: "took more than 120 s")
    for error in Ranks().decide(DataConfig(device="gpu")):
        assert isinstance(error, UserError) and error.shared
        assert "took more than 120 s (and on 1 more nodes); set data.device=cpu" in str(error)


@pytest.mark.parametrize("device", ["auto", "gpu"], ids=["auto", "asked for"])  # a test called gpu would want one
def test_gpus_that_pass_change_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], device: Any
) -> None:
    monkeypatch.setattr(preflight, "own_failure", lambda gpu, load, stopped: None)
    assert Ranks().decide(DataConfig(device=device)) == [DataConfig(device=device)] * 4
    assert capsys.readouterr().out == ""


def test_a_long_trial_keeps_no_rank_in_one_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the others would time out where one node is slow."""
    ranks = Ranks()

    def trial(gpu: int, load: float, stopped: Callable[[], bool]) -> None:
        while gpu == 2 and ranks.agreed < 8 * ranks.count:
            time.sleep(0.01)

    monkeypatch.setattr(preflight, "own_failure", trial)
    monkeypatch.setattr(preflight, "POLL_SECONDS", 0.01)
    assert ranks.decide(DataConfig()) == [DataConfig()] * 4


def test_a_wish_to_stop_ends_the_trial_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks()

    def trial(gpu: int, load: float, stopped: Callable[[], bool]) -> None:
        ranks.stops[1].request()
        while not stopped():
            time.sleep(0.01)

    monkeypatch.setattr(preflight, "own_failure", trial)
    assert all(isinstance(error, Interrupted) for error in ranks.decide(DataConfig()))
    assert all(stop.requested for stop in ranks.stops)


def test_a_lost_rank_ends_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    def trial(gpu: int, load: float, stopped: Callable[[], bool]) -> None:
        while not stopped():
            time.sleep(0.01)

    def agree(flag: bool) -> bool:
        raise ConnectionError("rank 1 is gone")

    monkeypatch.setattr(preflight, "own_failure", trial)
    world: Any = SimpleNamespace(device=torch.device("cuda", 0), local_rank=0, agree=agree)
    with pytest.raises(ConnectionError):
        preflight.decoding_device(DataConfig(), world, StopFlag())


@pytest.mark.parametrize(("device", "decoder"), [("cpu", "auto"), ("cuda", "cpu")])
def test_where_no_gpu_decodes_nothing_is_tried(monkeypatch: pytest.MonkeyPatch, device: str, decoder: Any) -> None:
    monkeypatch.setattr(preflight, "own_failure", lambda *_: pytest.fail("a trial"))
    config = DataConfig(device=decoder)
    world: Any = SimpleNamespace(device=torch.device(device))  # it has no collectives
    assert preflight.decoding_device(config, world, StopFlag()) is config


class Reached(Exception):
    """With the data section of a recipe that something was called with."""


def test_training_and_evaluation_decode_where_the_trial_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def reach(photographs: Any, config: DataConfig, *_: Any) -> None:
        raise Reached(config)

    decided = DataConfig(crop=48, device="cpu")
    photographs = Photographs("", "", "", (), *(np.zeros(1, np.int64) for _ in range(9)))  # type: ignore[arg-type]
    for module in (train, evaluate):
        monkeypatch.setattr(module, "decoding_device", lambda config, world, stop: decided)
        monkeypatch.setattr(module, "open_photographs", lambda *_: (photographs, photographs))
        monkeypatch.setattr(module, "count_colours", reach)
    monkeypatch.setattr(train, "newest_checkpoint", lambda run, world: None)
    monkeypatch.setattr(train, "Replacements", lambda run, world: None)
    monkeypatch.setattr(train, "Loader", reach)
    world: Any = SimpleNamespace(size=1)
    without_count = dataclasses.replace(Recipe(), model=ModelConfig(method="mse"))
    starts: list[Callable[[], object]] = [
        lambda: train.train(Recipe(), world, None, None),  # type: ignore[arg-type]
        lambda: train.train(without_count, world, None, None),  # type: ignore[arg-type]
        lambda: evaluate.score(Path(), Recipe(), world, None),  # type: ignore[arg-type]
    ]
    for start in starts:
        with pytest.raises(Reached) as reached:
            start()
        assert reached.value.args == (decided,)
