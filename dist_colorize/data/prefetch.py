"""Runs an iterator in a thread of its own, a bounded number of items ahead of its consumer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T], Iterator[T]):
    """Iterates over `items`, up to `depth` of them ready ahead.

    An exception in `items` is raised by the `next()` that would have given the failing item. `close()` stops the thread
    after the item it is working on and closes `items` there; closing twice, or early, is fine.

    All of the thread's work is done within `context`: the place for what is set per thread, such as the CUDA device.
    """

    def __init__(self, items: Iterator[T], depth: int, context: AbstractContextManager[object] | None = None) -> None:
        self._items, self._context = items, context or nullcontext()
        self._ready: queue.Queue[T | _End] = queue.Queue(depth)
        self._closed = threading.Event()
        self._end: _End | None = None
        # A daemon: an exception elsewhere must not leave the process hanging on a full queue.
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        if self._end is None and not self._closed.is_set():
            item = self._ready.get()
            if not isinstance(item, _End):
                return item
            self._end = item
        if self._end is not None and self._end.error is not None:
            raise self._end.error
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._closed.set()
        while self._thread.is_alive():
            self._drop()  # makes room for a put that waits
            self._thread.join(0.01)
        self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _drop(self) -> None:
        try:
            while True:
                self._ready.get_nowait()
        except queue.Empty:
            pass

    def _work(self) -> None:
        error: BaseException | None = None
        try:
            with self._context:
                try:
                    for item in self._items:
                        self._ready.put(item)
                        if self._closed.is_set():
                            break
                finally:
                    close = getattr(self._items, "close", None)
                    if close is not None:
                        close()
        except BaseException as raised:
            error = raised
        if not self._closed.is_set():
            self._ready.put(_End(error))


class _End:
    """What follows the last item."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error
