"""Does the GPU compute what the CPU computes, and how near to its memory's speed? Used by `doctor --gpu` and the tests.

`agreements` runs every primitive of stages.Backend on a GPU backend and on the CPU and compares all that each returns;
`speeds` times each against a plain copy on the same device. Both make their own data, so that no checkpoint and no
photograph is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_colorize.color.gamut import BINS
from dist_colorize.postprocess.cpu import TorchBackend
from dist_colorize.postprocess.stages import Backend

CHANNELS = 64
"""Features of a cell, as the network has."""
REPEATS = 20
"""Timed launches of each primitive."""


@dataclass(frozen=True)
class Agreement:
    """How far what a primitive returns on the GPU is from what it returns on the CPU."""

    name: str
    output: str
    """ab, confidence or pixels."""
    worst: float
    """Largest difference: ab units, confidence 0..1, or levels; NaN where a number is none."""
    share: float
    """Share of the values that are further off than `tolerance`."""
    tolerance: float
    most: float
    """Share that may be: a value at a threshold can fall on either side of it."""

    @property
    def ok(self) -> bool:
        return self.share <= self.most and math.isfinite(self.worst)

    def __str__(self) -> str:
        return (
            f"{self.name:22}{self.output:11}off by {self.worst:.2g} at most; "
            f"{100 * self.share:.3g} % by more than {self.tolerance:g} (allowed: {100 * self.most:g} %)"
        )


@dataclass(frozen=True)
class Speed:
    """What a primitive moves in a second, against a copy on the same device."""

    name: str
    seconds: float
    """For one call, at the size that was timed."""
    bytes: int
    """The least that any kernel would have to move for it: inputs once, results once."""
    share_of_copy: float
    """Its bytes in a second over those of the copy (read and write both counted)."""

    def __str__(self) -> str:
        rate = self.bytes / self.seconds / 1e9
        return f"{self.name:22}{100 * self.share_of_copy:5.1f} %   {1e6 * self.seconds:.0f} us, {rate:.0f} GB/s"


@dataclass(frozen=True)
class Scene:
    """Made-up inputs of every primitive, on one device."""

    features: Tensor
    weight: Tensor
    bias: Tensor
    ab: Tensor
    confidence: Tensor
    lightness: Tensor

    def to(self, device: torch.device) -> Scene:
        return Scene(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def scene(height: int, width: int, scale: int = 4, seed: int = 0) -> Scene:
    """A grid of height x width cells and a picture `scale` times as large and one pixel larger, on the CPU."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    return Scene(
        features=normal(1, CHANNELS, height, width),
        weight=0.4 * normal(BINS, CHANNELS),
        bias=normal(BINS),
        ab=35 * normal(1, 2, height, width),
        confidence=torch.rand(1, height, width, generator=random),
        lightness=100 * torch.rand(scale * height + 1, scale * width + 1, generator=random),
    )


Call = Callable[[], dict[str, Tensor]]
"""A primitive with its arguments; gives what it returns by name: ab, confidence, pixels."""


def primitives(backend: Backend, data: Scene) -> dict[str, Call]:
    """Every primitive with typical settings, ready to be called; nothing but the primitive is done."""
    ab, confidence, picture = data.ab, data.confidence, data.lightness
    size = (picture.shape[0], picture.shape[1])

    def decode(features: Tensor) -> Call:
        return lambda: dict(
            zip(("ab", "confidence"), backend.decode(features, data.weight, data.bias, 0.38), strict=True)
        )

    return {
        "decode": decode(data.features),
        "decode, channels last": decode(data.features.to(memory_format=torch.channels_last)),
        "decode, fp16": decode(data.features.half()),
        "decode, bf16": decode(data.features.bfloat16()),
        "blend": lambda: {"ab": backend.blend(ab, confidence, 2.5, 0.1, 0.4)},
        "blur": lambda: {"ab": backend.blend(ab, confidence, 3.0, 2.0, 2.0)},
        "scale chroma": lambda: {"ab": backend.scale_chroma(ab, confidence, 30.0, 0.3, 0.0, 360.0, 0.3)},
        "scale chroma, red": lambda: {"ab": backend.scale_chroma(ab, confidence, 25.0, 0.3, 40.0, 60.0, 0.3)},
        "repair": lambda: {"ab": backend.repair(ab, confidence, 20.0, 0.4, 2, 3, 8, 3.0)},
        "compose": lambda: {"pixels": backend.compose(picture, ab[0], size, 0, 8)},
        "compose, 16 bits": lambda: {"pixels": backend.compose(picture, ab[0], size, 0, 16)},
    }


TOLERANCES = {"ab": 2e-3, "confidence": 1e-5, "compose": 1.0, "compose, 16 bits": 16.0}
"""By output, or by primitive where that has its own."""
MOST = {"scale chroma": 0.001, "scale chroma, red": 0.001, "compose": 0.001, "compose, 16 bits": 0.02}
"""Share of the values that may be further off; none for other primitives. 1 level and 0.1 % are what whole pictures are
held to; a color out of gamut is right to 1 part in 4096 of its chroma, some 30 levels of 65535."""


def agreements(backend: Backend, height: int = 61, width: int = 93) -> Iterator[Agreement]:
    """Compares every output of every primitive with the CPU's; odd sizes, so that borders and remainders take part."""
    reference, data = TorchBackend(), scene(height, width)
    with torch.inference_mode():
        expected = primitives(reference, data)
        for name, call in primitives(backend, data.to(backend.device)).items():
            outputs, found = expected[name](), call()
            for output, right in outputs.items():
                tolerance, ours = TOLERANCES.get(name, TOLERANCES.get(output, 0.0)), found[output].cpu()
                if ours.shape != right.shape:
                    yield Agreement(name, output, math.inf, 1.0, tolerance, MOST.get(name, 0.0))
                    continue
                difference = (ours.double() - right.double()).abs()
                # NaN is no agreement
                off = ~(difference <= tolerance)
                worst, share = float(difference.max()), float(off.double().mean())
                yield Agreement(name, output, worst, share, tolerance, MOST.get(name, 0.0))


def speeds(backend: Backend, cells: int = 1024) -> Iterator[Speed]:
    """Times every primitive on a cells x cells grid and a picture of 4 x 4 times as many pixels. Needs a real GPU."""
    data = scene(cells, cells).to(backend.device)
    grid, pixels = cells * cells, data.lightness.numel()
    least = {
        "decode": grid * (4 * CHANNELS + 12),
        "decode, channels last": grid * (4 * CHANNELS + 12),
        "blend": grid * 20,
        "blur": grid * 20,
        "scale chroma": grid * 20,
        "repair": grid * 20,
        "compose": pixels * 7,
    }
    with torch.inference_mode():
        source = torch.zeros(2**28, dtype=torch.uint8, device=backend.device)
        target = torch.empty_like(source)
        copied = 2 * source.numel() / _seconds(lambda: target.copy_(source))
        calls = primitives(backend, data)
        for name, count in least.items():
            seconds = _seconds(calls[name])
            yield Speed(name, seconds, count, count / seconds / copied)


def _seconds(call: Callable[[], object]) -> float:
    """Mean time of a call on the GPU, after a first one that compiles and fills the caches."""
    call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(REPEATS):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000 / REPEATS
