"""Cells of features -> colour and confidence: the expectation of the bins' centres under their softmax.

Logits exist for a chunk of cells at a time, which stays in a processor's cache, or small beside a GPU's memory. They
are exponents of 2: the caller scales the head, so that neither the base nor the temperature needs a pass of its own.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.polynomial import Chebyshev, Polynomial
from numpy.typing import NDArray
from torch import Tensor

from dist_colorize.color.gamut import BINS, bin_centers
from dist_colorize.compiled import compiled, compiled_sums

CPU_CELLS, GPU_CELLS = 2048, 65536
"""Cells in a chunk: their logits take 2.6 MB for each thread, or 80 MB."""

WIDTH = 320
"""Room for a cell's 313 exponents: a multiple of every vector's length, and -infinity beyond the bins."""

Floats = NDArray[np.float32]
_A, _B = (np.pad(axis, (0, WIDTH - BINS)).astype(np.float32) for axis in bin_centers().T)
_POWER = tuple(np.float32(c) for c in Chebyshev.interpolate(np.exp2, 5, [-0.5, 0.5]).convert(kind=Polynomial).coef)
"""Coefficients of 2^f for |f| <= 1/2, within 2e-7 of it."""
_ROUNDER = np.float32(3 << 22)
"""From 2^23 to 2^24 float32 are the integers: a sum with this number is rounded, and its lower bits are the result."""
_LOWEST = np.float32(-126)
"""The least exponent of a normal float32."""


def in_torch(cells: Tensor, keys: Tensor, offset: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """cells [n, C], keys float32 [313, C], offset float32 [313] -> ab float32 [n, 2] and confidence float32 [n].

    Exponents cells @ keys.T + offset are clamped to +-limit, NaN to -limit.
    """
    ab, confidence = (torch.empty(len(cells), *shape, device=cells.device) for shape in ((2,), ()))
    # [313, 3]: the columns sum p a, p b and p
    moments = torch.tensor(np.stack([_A, _B, np.ones_like(_A)], axis=1)[:BINS], device=cells.device)
    chunks = (tensor.split(GPU_CELLS) for tensor in (cells, ab, confidence))
    for chunk, ab_here, confidence_here in zip(*chunks, strict=True):
        x = torch.addmm(offset, chunk.float(), keys.T)
        x.nan_to_num_(nan=-limit).clamp_(-limit, limit)
        sums = x.sub_(x.amax(dim=1, keepdim=True)).exp2_() @ moments
        torch.div(sums[:, :2], sums[:, 2:], out=ab_here)
        # the likeliest bin has p = 1 before division
        torch.reciprocal(sums[:, 2], out=confidence_here)
    return ab, confidence


def on_cpu(cells: Tensor, keys: Tensor, offset: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """The same for tensors on the CPU: in as many threads as torch has, each with chunks of its own."""
    ab, confidence = torch.empty(len(cells), 2), torch.empty(len(cells))
    chunks = list(zip(*(tensor.split(CPU_CELLS) for tensor in (cells, ab, confidence)), strict=True))
    threads = torch.get_num_threads()

    @torch.inference_mode()
    def work(thread: int) -> None:
        # written over for each chunk: fresh pages would cost a tenth of the time
        exponents = torch.full((CPU_CELLS, WIDTH), -torch.inf)
        for features, ab_here, confidence_here in chunks[thread::threads]:
            here = exponents[: len(features)]
            torch.addmm(offset, features.float(), keys.T, out=here[:, :BINS])
            _expectation(here.numpy(), np.float32(limit), ab_here.numpy(), confidence_here.numpy())

    # Within a thread of ours torch must not start threads: they would wait for each other. Its setting is each thread's
    # own, but also what later threads begin with; so it is set again.
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(work, range(threads)))
    finally:
        torch.set_num_threads(threads)
    return ab, confidence


@compiled
def _expectation(exponents: Floats, limit: np.float32, ab: Floats, confidence: Floats) -> None:
    """exponents [n, WIDTH], which may be overwritten -> ab [n, 2] and confidence [n]."""
    for cell in range(len(exponents)):
        x = exponents[cell]
        largest = _largest(x)
        a, b, total = _sums(x, largest)
        # the likeliest bin has p = 1 before division: less, or NaN, shows a number that is none
        if not (total >= 1 and abs(largest) <= limit):
            for k in range(BINS):
                # in this order a NaN, which is not above anything, becomes -limit
                x[k] = min(x[k] if x[k] > -limit else -limit, limit)
            a, b, total = _sums(x, _largest(x))
        ab[cell, 0], ab[cell, 1], confidence[cell] = a / total, b / total, np.float32(1) / total


@compiled
def _largest(x: Floats) -> np.float32:
    # Several at a time, which for floats, because of NaN, a compiler may not do.
    bits, most = x.view(np.int32), np.int32(-(2**31))
    for k in range(len(x)):
        most = max(most, _in_order(bits[k]))
    return np.int32(_in_order(most)).view(np.float32)


@compiled
def _in_order(bits: np.int32) -> np.int32:
    """A float's bits -> an integer, so that greater floats give greater integers; and back."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@compiled_sums
def _sums(x: Floats, largest: np.float32) -> tuple[np.float32, np.float32, np.float32]:
    """Sums over the bins of p a, p b and p, with p = 2^(x - largest)."""
    a, b, total = np.float32(0), np.float32(0), np.float32(0)
    for k in range(len(x)):
        p = _exp2(x[k] - largest)
        a += p * _A[k]
        b += p * _B[k]
        total += p
    return a, b, total


@compiled
def _exp2(x: np.float32) -> np.float32:
    """2^x for x <= 0: the nearest whole power goes into the exponent's bits, a polynomial makes the rest."""
    x = max(x, _LOWEST)
    shifted = x + _ROUNDER
    f = x - (shifted - _ROUNDER)
    c = _POWER
    p = c[0] + f * (c[1] + f * (c[2] + f * (c[3] + f * (c[4] + f * c[5]))))
    whole = np.float32(shifted).view(np.int32) << np.int32(23)
    return np.int32(np.float32(p).view(np.int32) + whole).view(np.float32)
