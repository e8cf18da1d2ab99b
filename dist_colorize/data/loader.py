"""Batches of L and ab on the rank's device, for training and for evaluation.

    order = Order(len(photographs), photographs.fingerprint, seed=0)
    with Loader(photographs, config, order, world, local_batch=8) as loader:
        for batch in loader.batches(start_step=0):      # endless
            train(batch.L, batch.ab)

A thread reads and decodes ahead of the training step. A photograph that cannot be read or decoded any more is reported
once and replaced; the rest of its batch is the same to the bit as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import chain, count
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali.plugin.pytorch import feed_ndarray
from PIL import Image
from torch import Tensor

from dist_colorize.data import pipeline
from dist_colorize.data.columns import Photographs
from dist_colorize.data.config import DataConfig
from dist_colorize.data.order import Order
from dist_colorize.data.plan import PADDING, Plan, evaluation_plan, training_plans
from dist_colorize.data.prefetch import Prefetch
from dist_colorize.distributed import World
from dist_colorize.errors import RunFailed, UserError
from dist_colorize.hardware import usable_cores

ATTEMPTS = 32
"""Substitutes tried for one slot. So many failures in a row mean that the data have gone, not that a file is bad."""
READERS = 8
"""Threads that read files at the same time: on network file systems most of the time is waiting."""
DRAWN = 32
"""Steps whose samples and crops are drawn at a time."""

_log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """B crops of side S, all on the rank's device but `sample`."""

    L: Tensor
    """float32 [B, 1, S, S], 0..100."""
    ab: Tensor
    """float32 [B, 2, S, S]."""
    weight: Tensor
    """float32 [B]: 1, or 0 for padding."""
    sample: Tensor
    """int64 [B] on the CPU: row of the photograph, -1 for padding."""


@dataclass(frozen=True)
class Replaced:
    """A photograph that could not be used although the index has it."""

    root: str
    """The folder that `name` is relative to."""
    name: str
    reason: str


class Loader:
    """Batches of one set of photographs for one rank.

    Args: photographs: what to draw from. config: crops, threads, device. order: made for `len(photographs)`. world:
    rank r of W takes local_batch positions of the stream from (step * W + r) * local_batch on.
    Raises UserError when there are no photographs, or the device is asked for but not there.
    """

    def __init__(
        self, photographs: Photographs, config: DataConfig, order: Order, world: World, local_batch: int
    ) -> None:
        self._decoder = _Decoder(photographs, config, world)
        self._photographs, self._config, self._order = photographs, config, order
        self._world, self._batch = world, local_batch
        self._running: list[Prefetch[Batch]] = []

    @property
    def replaced(self) -> list[Replaced]:
        """What could not be used so far, each file once."""
        return list(self._decoder.replaced)

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """The endless training stream from the batch of `start_step` on."""
        ahead = Prefetch(self._decoder.run(self._plans(start_step), self._batch), self._config.prefetch)
        self._running.append(ahead)
        return _on_current_stream(ahead)

    def first(self, number: int) -> Batch:
        """The crops at positions 0 .. number - 1 of the stream, the same on every rank."""
        positions = np.arange(number, dtype=np.uint64)[None]
        plans = training_plans(self._photographs, self._config, self._order, positions)
        return next(_on_current_stream(self._decoder.run(plans, number)))

    def close(self) -> None:
        """Stop reading ahead."""
        while self._running:
            self._running.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _plans(self, start_step: int) -> Iterator[Plan]:
        for step in count(start_step, DRAWN):
            # [DRAWN, 1] and [B] -> [DRAWN, B]
            starts = (np.arange(step, step + DRAWN)[:, None] * self._world.size + self._world.rank) * self._batch
            positions = (starts + np.arange(self._batch)).astype(np.uint64)
            yield from training_plans(self._photographs, self._config, self._order, positions)


def evaluation_batches(
    photographs: Photographs,
    config: DataConfig,
    world: World,
    local_batch: int,
    replaced: list[Replaced] | None = None,
) -> Iterator[Batch]:
    """Every photograph once, in the order of the rows: its largest middle square, resized to the crop size.

    Each batch of world.size * local_batch rows is shared out over the ranks in stretches. All ranks make the same
    number of batches: what is missing at the end is padding, of weight 0 and sample -1; so is what cannot be read, and
    `replaced` takes it.
    """
    decoder = _Decoder(photographs, config, world, replaced)
    total = world.size * local_batch

    def plans() -> Iterator[Plan]:
        for start in range(0, len(photographs), total):
            rows = start + world.rank * local_batch + np.arange(local_batch)
            yield evaluation_plan(photographs, np.where(rows < len(photographs), rows, PADDING))

    with Prefetch(decoder.run(plans(), local_batch), config.prefetch) as ahead:
        yield from _on_current_stream(ahead)


class _Decoder:
    """Turns plans into batches with a DALI pipeline, which it builds again after a photograph has broken it.

    Which photograph fills a slot depends on the slot's plan and the files alone: damage that a crop does not touch may
    go unseen, so what this rank has met elsewhere must not decide, or other ranks and resumed runs would see other
    photographs. A row that was bad once is only looked at more closely: one that DALI could not decode is tried by
    itself before it can break the pipeline again.
    """

    def __init__(
        self, photographs: Photographs, config: DataConfig, world: World, replaced: list[Replaced] | None = None
    ) -> None:
        if not len(photographs):
            raise UserError(f"{photographs.root}: no photographs in this part of the data; see data.val_fraction")
        self.replaced: list[Replaced] = [] if replaced is None else replaced
        """What could not be used, each file once."""
        self._bad: dict[int, Replaced] = {}
        self._photographs, self._config, self._device = photographs, config, world.device
        self._kind = _decoding_device(config, world.device)
        self._device_id = (world.device.index or 0) if self._kind == "gpu" else None
        self._stream = torch.cuda.Stream(world.device) if world.device.type == "cuda" else None
        self._threads = config.threads or max(1, usable_cores() // world.local_size)

    def run(self, plans: Iterator[Plan], size: int) -> Generator[Batch, None, None]:
        """A batch of `size` slots for each plan."""
        in_work: deque[_Job] = deque()
        with ThreadPoolExecutor(max(READERS, self._threads), thread_name_prefix="read") as workers:
            jobs = (self._read(plan, workers) for plan in plans)
            dali = self._build(jobs, in_work, size)
            while True:
                try:
                    outputs = dali.run()
                except StopIteration:
                    return
                except RuntimeError as error:
                    # DALI fails for the whole batch, and the pipeline with it. The batches in work are sorted out, and
                    # go through a new pipeline before the rest.
                    if not self._replace_undecodable(in_work):
                        raise RuntimeError(f"DALI failed, but each photograph by itself is good: {error}") from error
                    again = list(in_work)
                    in_work.clear()
                    dali = self._build(chain(again, jobs), in_work, size)
                    continue
                yield self._deliver(outputs, in_work.popleft().plan, workers)

    def _build(self, jobs: Iterator[_Job], in_work: deque[_Job], size: int) -> Any:
        def source() -> tuple[Sequence[NDArray[np.uint8]], NDArray[Any], NDArray[Any], NDArray[Any]]:
            job = next(jobs)
            in_work.append(job)
            crops = job.plan.crops
            # [B], [B] -> [B, 2]
            anchor, shape = np.stack([crops.y, crops.x], axis=1), np.stack([crops.height, crops.width], axis=1)
            return job.encoded, anchor, shape, crops.flip.astype(np.int32)

        whole = self._kind == "gpu"
        return pipeline.build(source, size, self._config.crop, self._threads, self._kind, self._device_id, whole)

    def _read(self, plan: Plan, workers: ThreadPoolExecutor) -> _Job:
        return _Job(plan, list(workers.map(lambda slot: self._fill(plan, slot), range(len(plan.row)))))

    def _fill(self, plan: Plan, slot: int) -> NDArray[np.uint8]:
        """The bytes for a slot; what cannot be used makes room for a substitute."""
        for attempt in range(ATTEMPTS + 1):
            if attempt:
                plan.substitute(slot, attempt)
            row = int(plan.row[slot])
            if row == PADDING:
                return _BLANK
            try:
                encoded = np.frombuffer(self._photographs.read(row), dtype=np.uint8)
            except OSError as error:
                self._report(row, f"cannot be read: {error.strerror or error}")
                continue
            if row not in self._bad or self._decodes(plan, slot, encoded):
                return encoded
        raise RunFailed(
            f"{self._photographs.root}: {ATTEMPTS} photographs in a row cannot be used, the last one "
            f"{self._photographs.name(row)!r}: {self._bad[row].reason}; are the data still there? "
            "If they changed, python -m dist_colorize.index ROOT --rebuild"
        )

    def _replace_undecodable(self, in_work: deque[_Job]) -> bool:
        """Try every image of the batches in work by itself; whether any was replaced."""
        found = False
        for job in in_work:
            for slot in range(len(job.encoded)):
                while not self._decodes(job.plan, slot, job.encoded[slot]):
                    self._report(int(job.plan.row[slot]), "cannot be decoded, or has changed since it was indexed")
                    job.encoded[slot] = self._fill(job.plan, slot)
                    found = True
        return found

    def _decodes(self, plan: Plan, slot: int, encoded: NDArray[np.uint8]) -> bool:
        crops = plan.crops
        anchor = np.array([[crops.y[slot], crops.x[slot]]], dtype=np.int32)
        shape = np.array([[crops.height[slot], crops.width[slot]]], dtype=np.int32)
        probe = pipeline.build_probe(lambda: ([encoded], anchor, shape), self._kind, self._device_id)
        try:
            probe.run()
        except RuntimeError:
            return False
        return True

    def _report(self, row: int, reason: str) -> None:
        replaced = Replaced(self._photographs.root, self._photographs.name(row), reason)
        if self._bad.setdefault(row, replaced) is replaced:  # two readers may meet the same file
            self.replaced.append(replaced)
            _log.warning("%r %s; another photograph takes its place", replaced.name, reason)

    def _deliver(self, outputs: Any, plan: Plan, workers: ThreadPoolExecutor) -> Batch:
        # The consumer works in another CUDA stream. What it gets is finished, so that it need not wait for this one.
        with torch.cuda.stream(self._stream):
            if self._kind == "gpu":
                L, a, b = (_on_gpu(output, self._device) for output in outputs)
                # [B, 1, S, S] twice -> [B, 2, S, S]
                ab = torch.cat([a, b], dim=1)
            else:
                from dist_colorize.data.finish import finish_batch  # here, as numba takes long to import

                crops, flips = [np.asarray(crop) for crop in outputs[0]], outputs[1].as_array() != 0
                finished = finish_batch(crops, flips, self._config.crop, workers, self._threads)
                L, ab = (tensor.to(self._device) for tensor in finished)
            weight = torch.from_numpy(plan.weight).to(self._device)
        if self._stream is not None:
            self._stream.synchronize()
        return Batch(L, ab, weight, torch.from_numpy(plan.row))


@dataclass
class _Job:
    plan: Plan
    encoded: list[NDArray[np.uint8]]


def _decoding_device(config: DataConfig, device: torch.device) -> Literal["cpu", "gpu"]:
    if config.device == "gpu" and device.type != "cuda":
        raise UserError("data.device=gpu needs a GPU to train on; set data.device=auto")
    return "gpu" if config.device != "cpu" and device.type == "cuda" else "cpu"


def _on_gpu(output: Any, device: torch.device) -> Tensor:
    """A copy of a batch that DALI made: the next batch overwrites DALI's own memory."""
    dense = output.as_tensor()
    tensor = torch.empty(dense.shape(), device=device)
    return feed_ndarray(dense, tensor, cuda_stream=torch.cuda.current_stream(device))


def _on_current_stream(batches: Prefetch[Batch] | Generator[Batch, None, None]) -> Iterator[Batch]:
    """Tell torch's allocator that the consumer's stream uses what another one allocated."""
    with contextlib.closing(batches):
        for batch in batches:
            if batch.L.is_cuda:
                for tensor in batch[:3]:
                    tensor.record_stream(torch.cuda.current_stream(batch.L.device))
            yield batch


def _blank() -> NDArray[np.uint8]:
    file = BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    return np.frombuffer(file.getvalue(), dtype=np.uint8)


_BLANK = _blank()
"""The image of a slot that holds no photograph."""
