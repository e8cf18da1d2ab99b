"""Streams: a thread's own, behind what another one has queued. A record of CUDA's calls stands for CUDA here."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest
import torch

from dist_colorize.postprocess.streams import Streams


class Calls:
    """What torch.cuda is asked, in order, as (stream, what)."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.made = 0
        self.current = threading.local()


@pytest.fixture
def calls(monkeypatch) -> Calls:
    record = Calls()

    class Stream:
        def __init__(self, device: torch.device) -> None:
            record.made += 1
            self.name = f"stream {record.made} of {device}"

        def wait_event(self, event: str) -> None:
            record.seen.append((self.name, f"waits for {event}"))

        def record_event(self) -> str:
            return f"the end of {self.name}"

    @contextmanager
    def stream(chosen: Stream):
        record.current.stream = chosen
        yield
        record.current.stream = None

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
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
    assert calls.seen == [("stream 2 of cuda:1", "waits for the end of stream 1 of cuda:1")]
    assert calls.made == 2


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
