"""One CUDA stream for each thread, so that no thread's wait for its pixels holds up what another one has queued.

streams = Streams(device)
with streams.own():                      # thread 1 queues the network and goes on
    ab, ready = network(batch), streams.mark()
with streams.own(after=ready):           # thread 2 composes and waits for its own pixels only
    pixels = compose(ab).cpu()

On the CPU all of it does nothing. Memory: torch gives a freed tensor's memory to the next one of the stream that made
it. A thread that reads another stream's tensor must therefore wait for its own results before it lets the tensor go;
a copy to the host at the end is such a wait.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Streams:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._mine = threading.local()

    @contextmanager
    def own(self, after: torch.cuda.Event | None = None) -> Iterator[None]:
        """Within it, work goes to this thread's stream, on the device, behind what `after` marks."""
        if self.device.type != "cuda":
            yield
            return
        # In a thread that has chosen no device the way back out of a stream would lead to GPU 0, and torch would take
        # half a gigabyte there for its context.
        with torch.cuda.device(self.device):
            if not hasattr(self._mine, "stream"):
                self._mine.stream = torch.cuda.Stream(self.device)
            with torch.cuda.stream(self._mine.stream):
                if after is not None:
                    self._mine.stream.wait_event(after)
                yield

    def mark(self) -> torch.cuda.Event | None:
        """The point that the current stream has been filled to."""
        return torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None
