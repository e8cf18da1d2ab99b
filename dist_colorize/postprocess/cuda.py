"""The five primitives of stages.Backend on an NVIDIA GPU: tensors stay there, work is queued on torch's current stream.

backend = CudaBackend(kernels.open_device(local_rank))

Nothing here waits for the GPU or copies to the host; the caller's copy of the finished pixels does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dist_colorize.color.gamut import BINS
from dist_colorize.errors import UserError
from dist_colorize.postprocess.kernels import launch
from dist_colorize.postprocess.stages import gaussian_taps

KINDS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
"""The dtypes of logits that there are decode kernels for, with their names there."""
PLANAR_CELLS, ROWS_CELLS = 128, 32
"""Cells that a block of decode_planar and of decode_rows takes, as in kernels/decode.cu."""
TILE = (16, 32)
"""Rows and columns of cells that a block of blend and repair takes, as in kernels/grid.cuh."""
COMPOSE_PIXELS = 1024
"""Pixels that a block of compose takes."""
MOST_COMPOSED = 2**29
"""Pixels for one launch of compose: byte positions stay in 32 bits."""


class CudaBackend:
    """See stages.Backend for what each primitive means, its shapes and its units.

    Against the CPU's TorchBackend: ab within 2e-3 after every primitive, confidence within 1e-5, composed pixels within
    1 level. A cell exactly at a threshold may fall on the other side of it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Half of the L2 cache for the logits of a chunk; the other half for what streams by.
        self._chunk_bytes = torch.cuda.get_device_properties(device).L2_cache_size // 2
        self._taps = functools.lru_cache(maxsize=16)(self._upload_taps)

    def decode(self, features: Tensor, weight: Tensor, bias: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        batch, channels, height, width = features.shape
        keys, offset = weight.detach().float(), bias.detach().float().contiguous()
        ab = torch.empty(batch, 2, height, width, device=self.device)
        confidence = torch.empty(batch, height, width, device=self.device)
        # The product is taken in fp32 whatever the features are: bf16 logits would be wrong by up to 8 ab units.
        if not features.is_contiguous() and features.is_contiguous(memory_format=torch.channels_last):
            # [B, C, h, w] -> [B, h, w, C] -> [B*h*w, C]: one row a cell, without a copy
            rows = features.permute(0, 2, 3, 1).reshape(-1, channels)
            scratch = self._scratch(lambda cells: (cells, BINS), len(rows))
            for first in range(0, len(rows), len(scratch)):
                logits = scratch[: len(rows) - first]
                torch.mm(rows[first : first + len(logits)].float(), keys.T, out=logits)
                decode_logits("rows", logits, len(logits), offset, temperature, ab, confidence, first)
        else:
            # [B, C, h, w] -> [B, C, h*w]
            planes = features.contiguous().flatten(2)
            scratch = self._scratch(lambda cells: (BINS, cells), height * width)
            for image in range(batch):
                for first in range(0, height * width, scratch.shape[1]):
                    cells = min(height * width - first, scratch.shape[1])
                    torch.mm(keys, planes[image, :, first : first + cells].float(), out=scratch[:, :cells])
                    decode_logits("planar", scratch, cells, offset, temperature, ab[image:], confidence[image:], first)
        return ab, confidence

    def blend(self, ab: Tensor, confidence: Tensor, sigma: float, low: float, high: float) -> Tensor:
        batch, _, height, width = ab.shape
        taps, out = self._taps(sigma), torch.empty_like(ab)
        inverse = 0.0 if low == high else 1 / (high - low)
        launch(
            "blend",
            "blend",
            _tiles(height, width, 2 * batch),
            (32, 8),
            [
                *(ab, confidence, taps, out, np.int32(height), np.int32(width), np.int32(len(taps) // 2)),
                *(np.float32(low), np.float32(high), np.float32(inverse)),
            ],
        )
        return out

    def scale_chroma(
        self,
        ab: Tensor,
        confidence: Tensor,
        min_chroma: float,
        max_confidence: float,
        hue: float,
        hue_width: float,
        factor: float,
    ) -> Tensor:
        batch, _, height, width = ab.shape
        out, angle, half = torch.empty_like(ab), math.radians(hue), math.radians(hue_width / 2)
        launch(
            "chroma",
            "scale_chroma",
            (-(-height * width // 1024), batch),
            (256,),
            [
                *(ab, confidence, out, np.int32(height * width), np.float32(min_chroma), np.float32(max_confidence)),
                *(np.float32(math.cos(angle)), np.float32(math.sin(angle)), np.float32(math.cos(half))),
                *(np.int32(hue_width >= 360), np.float32(factor)),
            ],
        )
        return out

    def repair(
        self,
        ab: Tensor,
        confidence: Tensor,
        min_chroma: float,
        max_confidence: float,
        radius: int,
        min_neighbours: int,
        sweeps: int,
        sigma: float,
    ) -> Tensor:
        batch, _, height, width = ab.shape
        size, taps = (np.int32(height), np.int32(width)), self._taps(sigma)
        # state 0 marks the suspects; sweep k reads pair k and writes pair k + 1, the last two take turns
        states = [torch.empty(batch, height, width, dtype=torch.uint8, device=self.device) for _ in range(3)]
        colours = [ab, torch.empty_like(ab), torch.empty_like(ab)]
        counts = torch.zeros(max(sweeps, 1), dtype=torch.int32, device=self.device)
        launch(
            "repair",
            "repair_mark",
            (-(-height * width // 256), batch),
            (256,),
            [ab, confidence, states[0], np.int32(height * width), np.float32(min_chroma), np.float32(max_confidence)],
        )
        before = 0
        for sweep in range(sweeps):
            after = 1 + sweep % 2
            launch(
                "repair",
                "repair_sweep",
                _tiles(height, width, batch),
                (32, 8),
                [
                    *(colours[before], states[before], colours[after], states[after], counts, np.int32(sweep)),
                    *(*size, np.int32(radius), np.int32(min_neighbours)),
                ],
            )
            before = after
        out = torch.empty_like(ab)
        launch(
            "repair",
            "repair_finish",
            _tiles(height, width, 2 * batch),
            (32, 8),
            [*colours, *states, counts, taps, out, np.int32(sweeps), *size, np.int32(len(taps) // 2)],
        )
        return out

    def compose(self, lightness: Tensor, ab: Tensor, size: tuple[int, int], row0: int, bits: int) -> Tensor:
        (rows, width), (h, w) = lightness.shape, ab.shape[1:]
        if width != size[1] or not 0 <= row0 <= size[0] - rows or bits not in (8, 16):
            raise ValueError(f"rows {row0}+{rows} of width {width} with {bits} bits do not fit a picture of {size}")
        out = torch.empty(rows, width, 3, dtype=torch.uint8 if bits == 8 else torch.uint16, device=self.device)
        # The kernel reads and writes 16 bytes at a time from the first pixel on
        level = lightness if lightness.is_contiguous() and lightness.data_ptr() % 16 == 0 else lightness.clone()
        if rows * width > MOST_COMPOSED:
            raise ValueError(f"{rows} rows of {width} pixels are too many for one strip")
        launch(
            "compose",
            f"compose{bits}",
            (-(-rows * width // COMPOSE_PIXELS),),
            (256,),
            [
                *(level.contiguous(), ab.contiguous(), out, np.int32(rows * width), np.int32(width), np.int32(row0)),
                *(np.int32(h), np.int32(w), np.float32(h / size[0]), np.float32(w / width)),
            ],
        )
        return out

    def _upload_taps(self, sigma: float) -> Tensor:
        return torch.tensor(gaussian_taps(sigma), dtype=torch.float32).to(self.device)

    def _scratch(self, shape: Callable[[int], tuple[int, int]], cells: int) -> Tensor:
        """Room for the logits of as many cells as fit into half of the L2 cache, fewer where memory is short."""
        # whole blocks: their 16-byte loads may go beyond the last cell, not beyond the row
        room = max(1, min(self._chunk_bytes // (BINS * 4 * PLANAR_CELLS), -(-cells // PLANAR_CELLS)))
        while True:
            try:
                return torch.empty(shape(room * PLANAR_CELLS), device=self.device)
            except torch.OutOfMemoryError:
                if room == 1:
                    raise UserError(
                        f"the memory of {self.device} is full: end other programs on it, or choose a smaller --size"
                    ) from None
                room //= 2


def decode_logits(
    layout: Literal["planar", "rows"],
    logits: Tensor,
    cells: int,
    bias: Tensor,
    temperature: float,
    ab: Tensor,
    confidence: Tensor,
    first: int,
) -> None:
    """Decodes cells first .. first + cells from their logits (fp32, fp16, bf16): ab [B, 2, h, w], confidence [B, h, w].

    planar: logits [313, stride], stride a multiple of 4, 16-byte aligned, of cells of the first image. rows: logits
    [cells, stride], of all images' cells, counted through. bias [313] fp32 is added to them.
    """
    kind, plane = KINDS[logits.dtype], confidence[0].numel()
    block, per_block = ((32, 8), PLANAR_CELLS) if layout == "planar" else ((8, 32), ROWS_CELLS)
    launch(
        "decode",
        f"decode_{layout}_{kind}",
        (-(-cells // per_block),),
        block,
        [
            *(logits, bias, ab, confidence),
            *(np.int32(cells), np.int32(logits.stride(0)), np.int32(first), np.int32(plane)),
            np.float32(math.log2(math.e) / temperature),
        ],
    )


def _tiles(height: int, width: int, planes: int) -> tuple[int, int, int]:
    """The grid of blocks that covers this many planes of cells."""
    return -(-width // TILE[1]), -(-height // TILE[0]), planes
