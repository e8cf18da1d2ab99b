"""A photograph in, its colours out: the network at a fixed working size, the stages, the merge with the original L.

colorizer = Colorizer(network, load_preset("final"), TorchBackend(), size=256)
prediction = colorizer.predict(photograph)
pixels = colorizer.paint(photograph, prediction.final)     # [H, W, 3], the photograph's own size and depth
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_colorize.postprocess.images import Photograph, lightness
from dist_colorize.postprocess.stages import Backend, Preset, decode_and_run

MULTIPLE = 16
"""The network's deepest stride: both working sides are multiples of it."""
LONGEST = 4
"""The long working side is at most so many times the short one; longer photographs are squeezed."""
STRIP_PIXELS = 4_000_000
"""Pixels composed at a time; their lightness takes 16 MB, or up to 150 MB while it is computed from colours."""


@dataclass(frozen=True)
class Prediction:
    """What the network and the stages say of one photograph, at half the working size."""

    stages: list[tuple[str, Tensor]]
    """("raw", ab), then (label, ab) after each stage; ab is float32 [2, h, w]."""
    confidence: Tensor
    """float32 [h, w], 0..1."""

    @property
    def raw(self) -> Tensor:
        return self.stages[0][1]

    @property
    def final(self) -> Tensor:
        return self.stages[-1][1]


class Colorizer:
    """Holds the network on the backend's device. Not for several threads at once."""

    def __init__(self, network: Any, preset: Preset, backend: Backend, size: int) -> None:
        """network has `features(L [B, 1, H, W]) -> [B, C, H/2, W/2]` and a 1x1 convolution `head`, see models.network.

        size: the short side of what the network sees, in pixels; a multiple of 16.
        """
        if size < MULTIPLE or size % MULTIPLE:
            raise ValueError(f"size must be a multiple of {MULTIPLE}, got {size}")
        self.network = network.eval().to(backend.device)
        self.preset, self.backend, self.size = preset, backend, size

    def look(self, photograph: Photograph) -> Tensor:
        """The lightness that the network sees: float32 [1, 1, H, W] on the CPU."""
        return lightness(photograph.shrunk(*working_size(*photograph.size, self.size)))[None, None]

    @torch.inference_mode()
    def predict(self, photograph: Photograph, look: Tensor | None = None) -> Prediction:
        """Colours and confidence. `look`: what `look(photograph)` gave, if another thread has called it."""
        seen = self.look(photograph) if look is None else look
        features = self.network.features(seen.to(self.backend.device))
        head = self.network.head
        # [313, C, 1, 1] -> [313, C]
        stages, confidence = decode_and_run(self.preset, self.backend, features, head.weight.flatten(1), head.bias)
        return Prediction([(label, ab[0]) for label, ab in stages], confidence[0])

    @torch.inference_mode()
    def paint(self, photograph: Photograph, ab: Tensor) -> np.ndarray:
        """The photograph's own lightness with the colours ab [2, h, w]: [H, W, 3] of its size and depth, on the CPU."""
        height, width = photograph.size
        result = np.empty((height, width, 3), photograph.pixels.dtype)
        rows = max(1, STRIP_PIXELS // width)
        for start in range(0, height, rows):
            level = photograph.lightness(start, start + rows).to(self.backend.device)
            strip = self.backend.compose(level, ab, (height, width), start, photograph.bits)
            result[start : start + rows] = strip.cpu().numpy()
        return result


def working_size(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) of what the network sees: short side `size`, aspect kept as multiples of 16 and LONGEST allow."""
    stretch = min(max(height, width) / min(height, width), LONGEST)
    long = round(size * stretch / MULTIPLE) * MULTIPLE
    return (size, long) if height <= width else (long, size)
