"""Decodes batches on an idle GPU, then the same ones while matrix products keep it busy; prints how many differ.

    python tests/workers/decode_under_load.py HW_DECODER_LOAD

A line of JSON: batches decoded, batches after which the GPU was still busy, batches that are not the same to the bit.
Their pixels go through the resize and the conversion to Lab, which run in DALI's stream behind the decoder.
"""

from __future__ import annotations

import io
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from nvidia.dali.plugin.pytorch import feed_ndarray
from PIL import Image
from torch import Tensor

from dist_colorize.data import pipeline

BATCHES, BATCH, SIZE, DISTINCT = 200, 8, 224, 8
SIDE = 8192
"""Of the matrices, in bf16: a product takes milliseconds, so that DALI's kernels take turns with them."""


def batches() -> list[Any]:
    """DISTINCT batches of random crops of baseline JPEGs, as the pipeline's source gives them."""
    random = np.random.default_rng(0)
    files = []
    for _ in range(BATCH):
        noise = random.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).resize((500, 400)).save(file, "JPEG", quality=90)
        files.append(np.frombuffer(file.getvalue(), dtype=np.uint8))
    made = []
    for _ in range(DISTINCT):
        shape = random.integers(150, 400, (BATCH, 2)).astype(np.int32)
        anchor = (random.random((BATCH, 2)) * (np.array([400, 500]) - shape)).astype(np.int32)
        made.append((files, anchor, shape, random.integers(0, 2, BATCH).astype(np.int32)))
    return made


def decoded(work: list[Any], hw_decoder_load: float) -> Iterator[Tensor]:
    """L, a and b of batch after batch, float32 [3, B, 1, SIZE, SIZE] on the GPU."""
    source = cycle(work)
    dali = pipeline.build(lambda: next(source), BATCH, SIZE, 4, "gpu", 0, True, hw_decoder_load)
    stream = torch.cuda.Stream()
    while True:
        planes = [plane.as_tensor() for plane in dali.run()]
        with torch.cuda.stream(stream):
            copies = [torch.empty(plane.shape(), device="cuda") for plane in planes]
            for plane, copy in zip(planes, copies, strict=True):
                feed_ndarray(plane, copy, cuda_stream=stream)
            both = torch.stack(copies)
        stream.synchronize()
        yield both


@contextmanager
def products(stream: torch.cuda.Stream) -> Iterator[None]:
    """Keeps four matrix products in a stream's queue, from a thread of its own."""
    matrix = torch.rand(SIDE, SIDE, device="cuda", dtype=torch.bfloat16)
    product = torch.empty_like(matrix)
    torch.cuda.synchronize()
    done = threading.Event()

    def fill() -> None:
        queued: list[torch.cuda.Event] = []
        while not done.is_set():
            queued = [event for event in queued if not event.query()]
            with torch.cuda.stream(stream):
                while len(queued) < 4:
                    torch.mm(matrix, matrix, out=product)
                    queued.append(stream.record_event())
            time.sleep(0.001)

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        torch.cuda.synchronize()


def main(hw_decoder_load: float) -> None:
    work = batches()
    idle = list(islice(decoded(work, hw_decoder_load), DISTINCT))
    stream = torch.cuda.Stream()
    busy = wrong = 0
    with products(stream):
        for number, batch in enumerate(islice(decoded(work, hw_decoder_load), BATCHES)):
            busy += not stream.query()
            wrong += not torch.equal(batch, idle[number % DISTINCT])
    print(json.dumps({"batches": BATCHES, "busy": busy, "wrong": wrong}))


if __name__ == "__main__":
    main(float(sys.argv[1]))
