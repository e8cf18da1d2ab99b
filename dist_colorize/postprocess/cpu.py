"""The primitives of stages.Backend in torch and machine code: the path of a CPU, the reference for the CUDA kernels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_colorize.postprocess.stages import LOGIT_LIMIT, gaussian_taps


class TorchBackend:
    """See stages.Backend for what each primitive means, its shapes and its units.

    Runs on any device that torch knows: training scores its validation photographs where the network is.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def decode(self, features: Tensor, weight: Tensor, bias: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        from dist_colorize.postprocess import expectation  # here, as numba takes long to import

        batch, channels, height, width = features.shape
        # [B, C, h, w] -> [B, h, w, C] -> [B*h*w, C]: one row a cell
        cells = features.movedim(1, -1).reshape(-1, channels)
        # softmax(x / T) in powers of 2, which are quicker than those of e
        scale = math.log2(math.e) / temperature
        take = expectation.on_cpu if self.device.type == "cpu" else expectation.in_torch
        ab, confidence = take(cells, weight.float() * scale, bias.float() * scale, LOGIT_LIMIT * scale)
        # [B*h*w, 2] -> [B, h, w, 2] -> [B, 2, h, w]
        ab = ab.view(batch, height, width, 2).movedim(-1, 1).contiguous()
        return ab, confidence.view(batch, height, width)

    def blend(self, ab: Tensor, confidence: Tensor, sigma: float, low: float, high: float) -> Tensor:
        share = (confidence >= low).float() if low == high else ((confidence - low) / (high - low)).clamp(0, 1)
        share = share.unsqueeze(1)
        mixed = share * ab + (1 - share) * gaussian(ab, sigma)
        return torch.where(share == 1, ab, mixed)

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
        chroma = _chroma(ab)
        mask = (chroma > min_chroma) & (confidence < max_confidence)
        if hue_width < 360:
            angle = math.radians(hue)
            along = ab[:, 0] * math.cos(angle) + ab[:, 1] * math.sin(angle)
            mask &= along >= chroma * math.cos(math.radians(hue_width / 2))
        scale = (min_chroma + (chroma - min_chroma) * factor) / chroma
        return torch.where(mask.unsqueeze(1), ab * scale.unsqueeze(1), ab)

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
        suspect = (_chroma(ab) >= min_chroma) & (confidence < max_confidence)
        trusted = confidence >= max_confidence
        current = ab.clone()
        for _ in range(sweeps):
            count = _window_sum(trusted.unsqueeze(1).float(), radius)
            ready = suspect & (count.squeeze(1) >= min_neighbours)
            if not ready.any():
                break
            # where, not a product: what is not trusted must not reach the sum, whatever it holds
            total = _window_sum(torch.where(trusted.unsqueeze(1), current, 0.0), radius)
            current = torch.where(ready.unsqueeze(1), total / count, current)
            trusted = trusted | ready
            suspect = suspect & ~ready
        if suspect.any():
            current = torch.where(suspect.unsqueeze(1), gaussian(ab, sigma), current)
        return current

    def compose(self, lightness: Tensor, ab: Tensor, size: tuple[int, int], row0: int, bits: int) -> Tensor:
        from dist_colorize.postprocess import merge

        if self.device.type == "cpu":
            return merge.compose(lightness, ab, size, row0, bits)
        return merge.in_torch(lightness[None], ab[None], size, row0, bits)[0]

    def pictures(self, lightness: Tensor, ab: Tensor) -> Tensor:
        """Whole 8-bit pictures of a batch: L [B, 1, H, W], ab [B, 2, h, w] -> uint8 [B, H, W, 3], on the device."""
        from dist_colorize.postprocess import merge

        levels, size = lightness[:, 0], (lightness.shape[-2], lightness.shape[-1])
        if self.device.type == "cpu":
            return torch.stack([merge.compose(L, one, size, 0, 8) for L, one in zip(levels, ab, strict=True)])
        return merge.in_torch(levels, ab, size, 0, 8)


def gaussian(image: Tensor, sigma: float) -> Tensor:
    """Blurs [B, C, h, w] by `gaussian_taps(sigma)` along both axes, with scipy's mode "reflect" at the borders."""
    taps = gaussian_taps(sigma).tolist()
    for axis in (-2, -1):
        padded, size = _reflect(image, axis, len(taps) // 2), image.shape[axis]
        # for so few taps, shifted sums are three times as fast as a convolution
        image = padded.narrow(axis, 0, size) * taps[0]
        for shift, tap in enumerate(taps[1:], start=1):
            image.add_(padded.narrow(axis, shift, size), alpha=tap)
    return image


def _reflect(image: Tensor, axis: int, radius: int) -> Tensor:
    """Extends an axis by `radius` on both sides, d c b a | a b c d | d c b a, as often as a short axis needs."""
    size = image.shape[axis]
    # The pattern repeats every 2*size
    index = torch.arange(-radius, size + radius, device=image.device) % (2 * size)
    return image.index_select(axis, torch.minimum(index, 2 * size - 1 - index))


def _window_sum(image: Tensor, radius: int) -> Tensor:
    """Sum over the (2*radius+1)^2 window of each cell of [B, C, h, w], zeros outside; exact for whole numbers."""
    side = 2 * radius + 1
    rows = F.avg_pool2d(image, (side, 1), stride=1, padding=(radius, 0), divisor_override=1)
    return F.avg_pool2d(rows, (1, side), stride=1, padding=(0, radius), divisor_override=1)


def _chroma(ab: Tensor) -> Tensor:
    # [B, 2, h, w] -> [B, h, w]
    return torch.sqrt(ab[:, 0] ** 2 + ab[:, 1] ** 2)
