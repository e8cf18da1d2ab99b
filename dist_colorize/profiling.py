"""Where a training step spends its time: named ranges, and a trace of a few steps.

`train.profile=5` writes RUN/profile/rank0.*.pt.trace.json.gz, which Perfetto (ui.perfetto.dev) and TensorBoard open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule, tensorboard_trace_handler

RANGES = ("data", "encoder", "decoder", "loss", "backward", "all-reduce", "optimizer")
"""The ranges of a training step. Where DDP reduces while gradients are still computed, all-reduce is what remains."""
SETTLING = 3
"""Steps before the trace: the first ones allocate memory and choose algorithms."""

span = record_function
"""`with span("encoder"):` names a stretch of work in a trace; it costs about a microsecond where none is made."""


@contextmanager
def traced(folder: Path, steps: int, rank: int) -> Iterator[Callable[[], object]]:
    """Gives a function to call after each step; a trace of `steps` steps is in `folder` when so many have been made.

    The trace is of this rank, with shapes and memory; 0 steps: nothing is recorded.
    """
    if not steps:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(
        activities=activities,
        schedule=schedule(wait=0, warmup=SETTLING, active=steps, repeat=1),
        on_trace_ready=tensorboard_trace_handler(str(folder), worker_name=f"rank{rank}", use_gzip=True),
        record_shapes=True,
        profile_memory=True,
    ) as recorder:
        yield recorder.step
