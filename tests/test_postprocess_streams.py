"""Streams: a thread's own, behind what another one has queued. A record of CUDA's calls stands for CUDA here."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dist_colorize.postprocess import __main__ as postprocess
from dist_colorize.postprocess.__main__ import Worker
from dist_colorize.postprocess.colorizer import Prediction
from dist_colorize.postprocess.images import Photograph
from dist_colorize.postprocess.inputs import Job
from dist_colorize.postprocess.streams import Streams


class Calls:
    """What torch.cuda is asked, in order, as (stream, what); and what each thread has chosen."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.made = 0
        self.current = threading.local()

    @property
    def device(self) -> str:
        """The device of this thread: without a choice it is GPU 0, as CUDA has it."""
        return getattr(self.current, "device", "cuda:0")

    def work(self, stream: str, what: str) -> None:
        """Something that makes a context on the thread's device."""
        assert stream.endswith(self.device), f"{stream} {what} in a thread of {self.device}"
        self.seen.append((stream, what))


@pytest.fixture
def calls(monkeypatch) -> Calls:
    record = Calls()

    class Stream:
        def __init__(self, device: torch.device) -> None:
            record.made += 1
            self.name = f"stream {record.made} of {device}"
            record.work(self.name, "is made")

        def wait_event(self, event: str) -> None:
            record.work(self.name, f"waits for {event}")

        def record_event(self) -> str:
            return f"the end of {self.name}"

    @contextmanager
    def stream(chosen: Stream):
        # as torch: what was current on the thread's device is made current again, which opens that device
        before, record.current.stream = record.device, chosen
        yield
        record.work(f"the default stream of {before}", "is current again")
        record.current.stream = None

    @contextmanager
    def device(chosen: torch.device):
        # leaving it opens no device: torch only notes which one is to be current
        before, record.current.device = record.device, str(chosen)
        yield
        record.current.device = before

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: record.current.stream)
    return record


def test_a_thread_has_one_stream_and_waits_for_the_event_of_another(calls):
    streams, events = Streams(torch.device("cuda", 1)), []

    def predict() -> None:
        for _ in range(2):
            with streams.own():
                events.append(streams.mark())

    thread = threading.Thread(target=predict)
    thread.start()
    thread.join()
    with streams.own(after=events[1]):
        assert calls.current.stream.name == "stream 2 of cuda:1"
    assert events == ["the end of stream 1 of cuda:1"] * 2
    waits = [call for call in calls.seen if "waits" in call[1]]
    assert waits == [("stream 2 of cuda:1", "waits for the end of stream 1 of cuda:1")]
    assert calls.made == 2 and calls.device == "cuda:0"


def test_every_thread_of_the_command_works_on_the_device_of_its_backend(calls, monkeypatch, tmp_path):
    """Network and stages in one thread, painting in two others; none has chosen a device by itself."""

    def on_its_device(what: str) -> None:
        calls.work(f"{what} on cuda:1", f"runs in {threading.current_thread().name}")

    class Colorizer:
        backend = SimpleNamespace(device=torch.device("cuda", 1))

        def predict_together(self, looks: list[str]) -> list[Prediction]:
            on_its_device("network")
            return [Prediction([("raw", torch.zeros(2, 1, 1))], torch.zeros(1, 1)) for _ in looks]

        def paint(self, photograph: Photograph, ab: torch.Tensor) -> np.ndarray:
            on_its_device("painting")
            return photograph.pixels

    monkeypatch.setattr(postprocess, "write_picture", lambda path, pixels, like: None)
    asked = SimpleNamespace(confidence=False, raw=True, panel=False)
    worker = Worker(Colorizer(), asked)
    photograph = Photograph(np.zeros((1, 1, 3), np.uint8), None)
    with ThreadPoolExecutor(1, "network") as network, ThreadPoolExecutor(2, "painter") as painters:
        done = network.submit(worker.compute, [(photograph, "look")] * 2).result()
        jobs = [Job(tmp_path / f"{name}.png", tmp_path / f"out-{name}.png", name) for name in "ab"]
        list(painters.map(worker.store, jobs, done))
    ran = [call for call in calls.seen if "runs in" in call[1]]
    assert [what for what, _ in ran] == ["network on cuda:1"] + ["painting on cuda:1"] * 4
    assert all("network_0" in where or "painter_" in where for _, where in ran)


def test_on_the_cpu_nothing_is_asked_of_cuda(calls):
    streams = Streams(torch.device("cpu"))
    with streams.own(after=None):
        assert streams.mark() is None
    assert calls.made == 0


@pytest.mark.gpu
def test_what_one_thread_queues_another_reads_when_it_is_there():
    device = torch.device("cuda", 0)
    streams = Streams(device)
    with streams.own():
        matrix = torch.full((4096, 4096), 1 / 4096, device=device)
        for _ in range(20):  # long enough that a reader which does not wait comes too early
            matrix = matrix @ matrix
        ready = streams.mark()
    found = []

    def read() -> None:
        with streams.own(after=ready):
            found.append(matrix.cpu())

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    torch.testing.assert_close(found[0], torch.full((4096, 4096), 1 / 4096))
