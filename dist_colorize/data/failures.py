"""What DALI's errors say: which images it names, and what to do where a GPU failed and no image is to blame."""

from __future__ import annotations

import re

import torch

from dist_colorize.errors import RunFailed

_OUT_OF_MEMORY = re.compile(
    # DALI's own allocations, CUDA's, the C++ library's; allocator failures of nvImageCodec and its extensions
    r"out of memory|can't allocate|allocation failed|bad_alloc|MemoryAllocation|nvImageCodec failure: '#(?:5|15)'",
    re.IGNORECASE,
)
_CUDA = re.compile(r"CUDA (?:runtime |driver )?(?:API )?error|cudaError|nvImageCodec failure: '#21'", re.IGNORECASE)


def named_samples(error: BaseException) -> set[int]:
    """Places in the batch that a DALI error names ("Failed to decode sample #3"); empty where it names none."""
    return {int(place) for place in re.findall(r"sample #(\d+)", str(error), re.IGNORECASE)}


def reason(error: BaseException) -> str:
    """The heart of a DALI error, on one line: without the pipeline's definition and C++ stack around it."""
    text = str(error).rpartition("encountered:")[2]
    text = re.split(r"C\+\+ context:|Stacktrace|Current pipeline object", text, maxsplit=1)[0]
    return " ".join(text.split()).rstrip(": ") or type(error).__name__


def gpu_failure(error: BaseException, device: torch.device) -> RunFailed:
    """The error of a rank whose GPU cannot decode what the CPU can, with the remedy that fits."""
    text = str(error)
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(text):
        remedy = "its memory is full: set a smaller train.micro_batch or data.prefetch, or end other programs on it"
    elif _CUDA.search(text):
        remedy = (
            "a CUDA error stays until the process ends: start the run again with run.dir=RUN, which goes on from its "
            "newest checkpoint; where the error comes back, set data.device=cpu"
        )
    else:
        remedy = "set data.device=cpu to decode on the CPU"
    return RunFailed(f"decoding fails on {device}, and no photograph is to blame ({reason(error)}); {remedy}")
