"""Decoding, network and encoding at the same time, in bounded memory.

Threads decode the next photographs while the caller's thread works on one and other threads encode those before it.
What is in memory at any time is bounded in bytes; a photograph larger than the bound goes through alone.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

from dist_colorize.errors import UserError

Work = TypeVar("Work")
Loaded = TypeVar("Loaded")
Done = TypeVar("Done")

IN_FLIGHT = 16
"""At most so many small photographs are in memory."""


class Budget:
    """A number of bytes that may be held at once. Asking for more than the total waits until nobody holds any."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._held = 0
        self._freed = threading.Condition()

    def acquire(self, amount: int) -> None:
        with self._freed:
            self._freed.wait_for(lambda: self._held == 0 or self._held + amount <= self.total)
            self._held += amount

    def release(self, amount: int) -> None:
        with self._freed:
            self._held -= amount
            self._freed.notify_all()


class _Loaded(NamedTuple, Generic[Work, Loaded]):
    work: Work
    cost: int
    loaded: Loaded


class _Finished(NamedTuple, Generic[Work]):
    work: Work
    cost: int
    error: Exception | None
    was_saving: bool


class Flow(Generic[Work, Loaded, Done]):
    """`for work, error in Flow(...).run(works)`: each work once, as completed, with None or its UserError.

    `measure` (bytes that a work needs), `load` and `store` run in threads, `compute` in the caller's. `compute` takes
    several works at a time: as many as are loaded and alike, up to a number; `alike(loaded)` gives what they must have
    in common and that number. It never waits for more of them. Where it raises a UserError for several, each is tried
    by itself. Errors other than UserError are bugs and are raised. `stop()` is asked before a new work begins: what has
    begun is finished, the rest never comes.
    """

    def __init__(
        self,
        measure: Callable[[Work], int],
        load: Callable[[Work], Loaded],
        alike: Callable[[Loaded], tuple[Hashable, int]],
        compute: Callable[[list[Loaded]], list[Done]],
        store: Callable[[Work, Done], None],
        *,
        threads: int,
        bytes_at_once: int,
        stop: Callable[[], bool],
    ) -> None:
        self.measure, self.load, self.store = measure, load, store
        self.alike, self.compute = alike, compute
        self.threads, self.stop = threads, stop
        self._budget = Budget(bytes_at_once)
        self._least = -(-bytes_at_once // IN_FLIGHT)
        self._halted = False
        # None: a loading thread has come to its end
        self._events: queue.SimpleQueue[_Loaded[Work, Loaded] | _Finished[Work] | None] = queue.SimpleQueue()

    def run(self, works: Iterable[Work]) -> Iterator[tuple[Work, UserError | None]]:
        todo, lock = iter(works), threading.Lock()

        def take() -> Work | None:
            with lock:
                return None if self._halted or self.stop() else next(todo, None)

        for _ in range(self.threads):
            threading.Thread(target=self._load_all, args=(take,), daemon=True).start()
        try:
            with ThreadPoolExecutor(self.threads) as savers:
                yield from self._results(savers)
        finally:
            self._halted = True

    def _load_all(self, take: Callable[[], Work | None]) -> None:
        while (work := take()) is not None:
            cost = 0
            try:
                needed = max(self.measure(work), self._least)
                self._budget.acquire(needed)
                cost = needed
                self._events.put(_Loaded(work, cost, self.load(work)))
            except Exception as error:
                self._events.put(_Finished(work, cost, error, was_saving=False))
        self._events.put(None)

    def _save(self, work: Work, cost: int, done: Done) -> None:
        error = None
        try:
            self.store(work, done)
        except Exception as failure:
            error = failure
        self._events.put(_Finished(work, cost, error, was_saving=True))

    def _results(self, savers: ThreadPoolExecutor) -> Iterator[tuple[Work, UserError | None]]:
        loading, saving = self.threads, 0
        waiting: deque[_Loaded[Work, Loaded]] = deque()
        while loading or saving or waiting:
            # All that has happened is looked at before anything is computed: more may be alike
            if waiting and self._events.empty():
                for item, result in self._computed(self._batch(waiting)):
                    if isinstance(result, UserError):
                        self._budget.release(item.cost)
                        yield item.work, result
                    else:
                        savers.submit(self._save, item.work, item.cost, result)
                        saving += 1
                    del item, result  # they hold pixels
                continue
            event = self._events.get()
            if event is None:
                loading -= 1
            elif isinstance(event, _Loaded):
                waiting.append(event)
            else:
                saving -= event.was_saving
                self._budget.release(event.cost)
                if event.error is not None and not isinstance(event.error, UserError):
                    raise event.error
                yield event.work, event.error
            del event  # it holds pixels

    def _batch(self, waiting: deque[_Loaded[Work, Loaded]]) -> list[_Loaded[Work, Loaded]]:
        """Takes the first and those like it."""
        kind, most = self.alike(waiting[0].loaded)
        batch: list[_Loaded[Work, Loaded]] = []
        others: list[_Loaded[Work, Loaded]] = []
        while waiting:
            item = waiting.popleft()
            fits = len(batch) < max(most, 1) and self.alike(item.loaded)[0] == kind
            (batch if fits else others).append(item)
        waiting.extend(others)
        return batch

    def _computed(self, batch: list[_Loaded[Work, Loaded]]) -> Iterator[tuple[_Loaded[Work, Loaded], Done | UserError]]:
        try:
            results = self.compute([item.loaded for item in batch])
        except UserError as error:
            if len(batch) == 1:
                yield batch[0], error
                return
        else:
            yield from zip(batch, results, strict=True)
            return
        for item in batch:
            yield from self._computed([item])
