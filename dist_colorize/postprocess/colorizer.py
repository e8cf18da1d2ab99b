"""A photograph in, its colours out: the network at a fixed working size, the stages, the merge with the original L.

colorizer = Colorizer(network, load_preset("final"), TorchBackend(), size=256)
prediction = colorizer.predict(photograph)
pixels = colorizer.paint(photograph, prediction.final)     # [H, W, 3], the photograph's own size and depth
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_colorize.errors import UserError
from dist_colorize.postprocess.images import Photograph, lightness
from dist_colorize.postprocess.memory import is_full
from dist_colorize.postprocess.stages import Backend, Preset, decode_and_run

MULTIPLE = 16
"""The network's deepest stride: both working sides are multiples of it."""
LONGEST = 4
"""The long working side is at most so many times the short one; longer photographs are squeezed."""
STRIP_PIXELS = 4_000_000
"""Pixels composed at a time; their lightness takes 16 MB, or up to 150 MB while it is computed from colours."""
NETWORK_BYTES = 2048
"""Device memory that the network takes for a working pixel: some eight maps of 64 channels at full resolution."""
MOST_TOGETHER = 16
"""Photographs that go through the network together, at most."""


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
    """Holds the network on the backend's device. One thread may predict while others look and paint."""

    def __init__(self, network: Any, preset: Preset, backend: Backend, size: int, memory: int | None = None) -> None:
        """network has `features(L [B, 1, H, W]) -> [B, C, H/2, W/2]` and a 1x1 convolution `head`, see models.network.

        size: the short side of what the network sees, in pixels; a multiple of 16. memory: bytes that photographs
        which are predicted together may take; None: half of what is free on a GPU, one photograph at a time on a CPU,
        which is no faster with several.
        """
        if size < MULTIPLE or size % MULTIPLE:
            raise ValueError(f"size must be a multiple of {MULTIPLE}, got {size}")
        try:
            self.network = network.eval().to(backend.device)
        except RuntimeError as error:
            if is_full(error):
                raise UserError(f"the memory of {backend.device} is full: end other programs on it") from None
            raise
        self.preset, self.backend, self.size = preset, backend, size
        on_gpu = backend.device.type == "cuda"
        self.memory = memory or (torch.cuda.mem_get_info(backend.device)[0] // 2 if on_gpu else 0)

    def together(self, look: Tensor) -> int:
        """How many photographs with a look of this size to predict at a time."""
        return max(1, min(MOST_TOGETHER, self.memory // (look.numel() * NETWORK_BYTES)))

    def look(self, photograph: Photograph) -> Tensor:
        """The lightness that the network sees: float32 [1, 1, H, W] on the CPU."""
        return lightness(photograph.shrunk(*working_size(*photograph.size, self.size)))[None, None]

    def predict(self, photograph: Photograph) -> Prediction:
        """Colours and confidence."""
        return self.predict_together([self.look(photograph)])[0]

    @torch.inference_mode()
    def predict_together(self, looks: Sequence[Tensor]) -> list[Prediction]:
        """The predictions for looks of one size. On a GPU they are only queued, this thread waits for nothing.

        How many go together may change the last bits of the features, where the library chooses another algorithm for
        another size of batch. UserError where the device's memory is full.
        """
        seen = torch.cat(list(looks))
        if self.backend.device.type == "cuda":
            seen = seen.pin_memory()  # or the copy would wait for what is queued
        head = self.network.head
        try:
            features = self.network.features(seen.to(self.backend.device, non_blocking=True))
            # [313, C, 1, 1] -> [313, C]
            stages, confidence = decode_and_run(self.preset, self.backend, features, head.weight.flatten(1), head.bias)
        except RuntimeError as error:
            if not is_full(error):
                raise
            self.memory //= 2
            height, width = seen.shape[2:]
            raise UserError(
                f"the memory of {self.backend.device} is too small for {len(seen)} x {width}x{height} pixels in the "
                f"network: end other programs on it, or choose a --size below {self.size}"
            ) from None
        return [Prediction([(label, ab[i]) for label, ab in stages], confidence[i]) for i in range(len(looks))]

    @torch.inference_mode()
    def paint(self, photograph: Photograph, ab: Tensor) -> np.ndarray:
        """The photograph's own lightness with the colours ab [2, h, w]: [H, W, 3] of its size and depth, on the CPU.

        Goes strip by strip; where the device's memory is full, the strips become lower (they change no bit), and with
        a single row UserError.
        """
        height, width = photograph.size
        result = np.empty((height, width, 3), photograph.pixels.dtype)
        rows = max(1, STRIP_PIXELS // width)
        start = 0
        while start < height:
            try:
                level = photograph.lightness(start, start + rows).to(self.backend.device)
                strip = self.backend.compose(level, ab, (height, width), start, photograph.bits)
                result[start : start + rows] = strip.cpu().numpy()
            except RuntimeError as error:
                if not is_full(error):
                    raise
                if rows == 1:
                    raise UserError(f"the memory of {self.backend.device} is full: end other programs on it") from None
                rows //= 2
                continue
            start += rows
        return result


def working_size(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) of what the network sees: short side `size`, aspect kept as multiples of 16 and LONGEST allow."""
    stretch = min(max(height, width) / min(height, width), LONGEST)
    long = round(size * stretch / MULTIPLE) * MULTIPLE
    return (size, long) if height <= width else (long, size)
