"""Looks into many files at once: in processes of their own, as Python's threads would take turns (see below).

Half of the time that a small JPEG takes is spent in Python code, where only one thread can be: two threads were no
faster than one. A process also survives for the others when a damaged file makes a decoder crash.

    for candidate, result in inspect_all(root, found, min_side, stop):
        ...                                            # Facts, or the reason why the file cannot be used

`python -m dist_colorize.data.inspectors` is the other end of the pipe: it reads pickled chunks of candidates from its
standard input and writes lists of results to its standard output, until the input ends or its parent does.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from threading import Event

from dist_colorize.data.inspect import Facts, Rejected, inspect
from dist_colorize.data.scan import Candidate, Scan, read_candidate

Result = Facts | str
"""What the index keeps of a photograph, or the reason why it cannot be used."""

_CHUNK = 32
"""Candidates per question, at most: enough to make the pipe's own cost disappear."""
_FILES_WORTH_A_PROCESS, _BYTES_WORTH_A_PROCESS = 64, 8 << 20
"""With fewer of both for each, processes take longer to start than they save."""
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


def inspect_all(
    root: Path, found: Scan, min_side: int, stop: Callable[[], bool]
) -> Generator[tuple[Candidate, Result], None, None]:
    """Every candidate with its result, in any order. Ends early, soon after `stop()` turns true."""
    candidates = found.candidates
    look = _Look(root, found.shards, min_side)
    work = max(
        len(candidates) // _FILES_WORTH_A_PROCESS,
        sum(candidate.length for candidate in candidates) // _BYTES_WORTH_A_PROCESS,
    )
    # More processes than cores: on network file systems most of the time is waiting for an answer.
    workers = min(32, 2 * len(os.sched_getaffinity(0)), len(candidates), work)
    if workers < 2:
        for candidate in candidates:
            if stop():
                return
            yield candidate, look([candidate])[0]
        return
    size = max(1, min(_CHUNK, len(candidates) // (4 * workers)))
    chunks = (candidates[start : start + size] for start in range(0, len(candidates), size))
    with _Workers(look, workers) as pool:
        yield from pool.map(chunks, stop)


class _Look:
    """Opens and inspects candidates; knows where they are. Pickled once for each process."""

    def __init__(self, root: Path, shards: list[str], min_side: int) -> None:
        self._root, self._shards, self._min_side = root, shards, min_side

    def __call__(self, candidates: list[Candidate]) -> list[Result]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd EXIF blocks and sizes; what matters is an error
            return [self._one(candidate) for candidate in candidates]

    def _one(self, candidate: Candidate) -> Result:
        try:
            return inspect(read_candidate(self._root, self._shards, candidate), self._min_side)
        except Rejected as error:
            return str(error)


class _Workers:
    """As many processes, each asked by a thread that waits for its answer."""

    def __init__(self, look: _Look, count: int) -> None:
        self._closed = Event()
        self._workers = [_Worker(look, self._closed) for _ in range(count)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="index")

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        for worker in self._workers:
            worker.end()
        self._threads.shutdown()

    def map(self, chunks: Iterator[list[Candidate]], stop: Callable[[], bool]) -> Iterator[tuple[Candidate, Result]]:
        """The results of every chunk, as they come."""
        pending: set[Future[list[tuple[Candidate, Result]]]] = set()
        more = True
        while more or pending:
            while more and len(pending) < 2 * len(self._workers):
                chunk = next(chunks, None)
                if chunk is None:
                    more = False
                else:
                    pending.add(self._threads.submit(self._ask, chunk))
            done, pending = wait(pending, timeout=0.1, return_when=FIRST_COMPLETED)
            if stop():
                return
            for task in done:
                yield from task.result()

    def _ask(self, chunk: list[Candidate]) -> list[tuple[Candidate, Result]]:
        worker = self._idle.get()
        try:
            return list(zip(chunk, worker.look(chunk), strict=True))
        finally:
            self._idle.put(worker)


class _Worker:
    """A process that looks at candidates; another takes its place when it dies of one."""

    def __init__(self, look: _Look, closed: Event) -> None:
        self._look, self._closed = look, closed
        self._start()

    def look(self, candidates: list[Candidate]) -> list[Result]:
        for _ in range(2):  # it may have died of something else: a signal, a lack of memory
            try:
                self._send(candidates)
                results: list[Result] = pickle.load(self._pipes[1])
                return results
            except (EOFError, OSError, pickle.UnpicklingError):
                if self._closed.is_set():
                    return [""] * len(candidates)  # nobody reads it
                self.end()
                self._start()
        if len(candidates) == 1:
            return ["cannot be decoded: it makes the decoder crash"]
        half = len(candidates) // 2
        return self.look(candidates[:half]) + self.look(candidates[half:])

    def end(self) -> None:
        """It keeps nothing that could be lost."""
        self._process.kill()
        self._process.wait()
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.close()

    def _start(self) -> None:
        # A session of its own: Ctrl-C at the terminal is for the parent, which ends its workers.
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert self._process.stdin and self._process.stdout
        self._pipes = self._process.stdin, self._process.stdout
        with contextlib.suppress(OSError):  # dead already: the first question will tell
            self._send(self._look)

    def _send(self, thing: object) -> None:
        pickle.dump(thing, self._pipes[0])
        self._pipes[0].flush()


def _serve() -> None:
    for name in _SIGNALS:  # a cluster sends them to every process of a job
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    with contextlib.suppress(EOFError, BrokenPipeError, MemoryError):
        look: _Look = pickle.load(questions)
        while True:
            pickle.dump(look(pickle.load(questions)), answers)
            answers.flush()


if __name__ == "__main__":
    _serve()
