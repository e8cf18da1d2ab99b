"""Batches of L and ab on the rank's device, for training and for evaluation.

    order = Order(len(photographs), photographs.fingerprint, seed=0)
    with Loader(photographs, config, order, world, local_batch=8) as loader:
        for batch in loader.batches(start_step=0):      # endless
            train(batch.L, batch.ab)

Threads read and decode ahead of the training step. A photograph that cannot be read or decoded any more is reported
once and replaced; the rest of its batch is the same to the bit as if nothing had happened.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, count
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor

from dist_colorize.data import pipeline
from dist_colorize.data.columns import Photographs
from dist_colorize.data.config import DataConfig
from dist_colorize.data.failures import gpu_failure, named_samples
from dist_colorize.data.order import Order
from dist_colorize.data.plan import PADDING, Plan, evaluation_plan, training_plans
from dist_colorize.data.prefetch import Prefetch
from dist_colorize.data.reading import Job, Reader, Replaced
from dist_colorize.distributed import World
from dist_colorize.errors import UserError
from dist_colorize.hardware import usable_cores

DRAWN = 32
"""Steps whose samples and crops are drawn at a time."""


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
        ahead = _prefetch(self._decoder.run(self._plans(start_step), self._batch), self._config, self._world)
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

    with _prefetch(decoder.run(plans(), local_batch), config, world) as ahead:
        yield from _on_current_stream(ahead)


class _Decoder:
    """Turns plans into batches with a DALI pipeline, which it builds again after a photograph has broken it.

    Which photograph fills a slot depends on the slot's plan and the files alone: damage that a crop does not touch may
    go unseen, so what this rank has met elsewhere must not decide, or other ranks and resumed runs would see other
    photographs. A photograph makes room where its crop cannot be decoded by itself, neither on the CPU nor where the
    rank decodes. A row that was bad once is only looked at more closely: it is tried before it can break the pipeline
    again. A GPU that fails although the CPU can decode everything is told as that: no photograph is to blame.
    """

    def __init__(
        self, photographs: Photographs, config: DataConfig, world: World, replaced: list[Replaced] | None = None
    ) -> None:
        if not len(photographs):
            raise UserError(f"{photographs.root}: no photographs in this part of the data; see data.val_fraction")
        self.replaced: list[Replaced] = [] if replaced is None else replaced
        """What could not be used, each file once."""
        self._reader = Reader(photographs, config.readers, self.replaced)
        self._config, self._device = config, world.device
        self._kind = _decoding_device(config, world.device)
        self._device_id = (world.device.index or 0) if self._kind == "gpu" else None
        self._judges = [pipeline.CropDecoder("cpu", None)]
        if self._kind == "gpu":  # tried last: what the CPU decodes is good, whatever state the GPU is in
            self._judges.append(pipeline.CropDecoder("gpu", self._device_id, config.hw_decoder_load))
        self._stream = torch.cuda.Stream(world.device) if world.device.type == "cuda" else None
        self._threads = config.threads or max(1, usable_cores() // world.local_size)

    def run(self, plans: Iterator[Plan], size: int) -> Generator[Batch, None, None]:
        """A batch of `size` slots for each plan."""
        in_work: deque[Job] = deque()
        with (
            contextlib.closing(self._reader.jobs(plans, size)) as read,
            ThreadPoolExecutor(self._threads, thread_name_prefix="finish") as workers,
        ):
            jobs = map(self._without_known_bad, read)
            dali = self._build(jobs, in_work, size)
            while True:
                try:
                    outputs = dali.run()
                except StopIteration:
                    return
                except (RuntimeError, MemoryError) as error:
                    # DALI fails for the whole batch, and the pipeline with it. The batches in work are sorted out, and
                    # go through a new pipeline before the rest.
                    if not self._replace_undecodable(in_work, named_samples(error)):
                        raise self._failure(error) from error
                    again = list(in_work)
                    in_work.clear()
                    dali = self._build(chain(again, jobs), in_work, size)
                    continue
                yield self._deliver(outputs, in_work.popleft().plan, workers)

    def _build(self, jobs: Iterator[Job], in_work: deque[Job], size: int) -> Any:
        def source() -> tuple[Sequence[NDArray[np.uint8]], NDArray[Any], NDArray[Any], NDArray[Any]]:
            job = next(jobs)
            in_work.append(job)
            crops = job.plan.crops
            # [B], [B] -> [B, 2]
            anchor, shape = np.stack([crops.y, crops.x], axis=1), np.stack([crops.height, crops.width], axis=1)
            return job.encoded, anchor, shape, crops.flip.astype(np.int32)

        where = self._kind, self._device_id, self._kind == "gpu", self._config.hw_decoder_load
        try:
            return pipeline.build(source, size, self._config.crop, self._threads, *where)
        except (RuntimeError, MemoryError) as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> Exception:
        if self._kind == "gpu":
            return gpu_failure(error, self._device)
        return RuntimeError(f"DALI failed, but each photograph by itself is good: {error}")

    def _without_known_bad(self, job: Job) -> Job:
        """The job, whose rows that were bad before have been tried by themselves."""
        for slot, row in enumerate(job.plan.row.tolist()):
            if row in self._reader.bad:
                self._replace_if_undecodable(job, slot)
        return job

    def _replace_undecodable(self, in_work: deque[Job], named: set[int]) -> int:
        """Replace what cannot be decoded among the batches in work; how many. `named`: slots in the error's message."""
        slots = [(job, slot) for job in in_work for slot in range(len(job.encoded))]
        found = sum(self._replace_if_undecodable(job, slot) for job, slot in slots if slot in named)
        others = [(job, slot) for job, slot in slots if slot not in named]
        if found:  # the failure is explained: of the others only rows that were bad before are worth the time
            others = [(job, slot) for job, slot in others if int(job.plan.row[slot]) in self._reader.bad]
        return found + sum(self._replace_if_undecodable(job, slot) for job, slot in others)

    def _replace_if_undecodable(self, job: Job, slot: int) -> bool:
        replaced = False
        while not self._decodes(job, slot):
            self._reader.replace(job, slot, "cannot be decoded, or has changed since it was indexed")
            replaced = True
        return replaced

    def _decodes(self, job: Job, slot: int) -> bool:
        crops = job.plan.crops
        y, x, height, width = (int(column[slot]) for column in (crops.y, crops.x, crops.height, crops.width))
        for judge in self._judges:
            with contextlib.suppress(RuntimeError, MemoryError):
                judge.decode(job.encoded[slot], y, x, height, width)
                return True
        return False

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


def _prefetch(batches: Iterator[Batch], config: DataConfig, world: World) -> Prefetch[Batch]:
    # A new thread's CUDA device is GPU 0, where anything it does, if only to leave a stream, would make a context.
    on_gpu = torch.cuda.device(world.device) if world.device.type == "cuda" else None
    return Prefetch(batches, config.prefetch, on_gpu)


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
