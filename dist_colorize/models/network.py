"""The network: lightness -> encoder -> three transposed convolutions with skips -> 64 features at stride 2 -> head.

Stride 2 is the stride of JPEG's own chroma: colour needs no finer grid, and L keeps its full resolution beside it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_colorize.color.lab import gray_from_lightness
from dist_colorize.models.encoder import Encoder
from dist_colorize.profiling import span

OUTPUT_STRIDE = 2
"""Pixels of L per cell of the output, along each axis."""
MULTIPLE = 16
"""Height and width of the input must be multiples of this: the stride of the deepest features."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FEATURES = 64
"""Channels that the head sees."""


class Up(nn.Module):
    """Doubles the resolution with a transposed convolution and adds a projection of the encoder's features there."""

    def __init__(self, inputs: int, skip: int, outputs: int, skips: bool) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)
        self.skip = nn.Conv2d(skip, outputs, 1) if skips else None
        # each sample is normalised by itself: batch statistics would depend on how ranks cut the batch
        self.norm = nn.GroupNorm(outputs // 8, outputs)

    def forward(self, deep: Tensor, shallow: Tensor) -> Tensor:
        """[B, inputs, h, w], [B, skip, 2h, 2w] -> [B, outputs, 2h, 2w]."""
        raised = self.up(deep)
        return F.relu(self.norm(raised if self.skip is None else raised + self.skip(shallow)))


class Decoder(nn.Module):
    """Features at strides 16, 8, 4, 2 -> [B, 64, H/2, W/2]."""

    def __init__(self, channels: tuple[int, ...], width: float, skips: bool) -> None:
        super().__init__()
        wide = [max(FEATURES, round(planned * width / 8) * 8) for planned in (256, 128, FEATURES)]
        stride2, stride4, stride8, stride16 = channels
        self.stages = nn.ModuleList(
            [
                Up(stride16, stride8, wide[0], skips),
                Up(wide[0], stride4, wide[1], skips),
                Up(wide[1], stride2, FEATURES, skips),
            ]
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        deep = features[-1]
        for stage, shallow in zip(self.stages, reversed(features[:-1]), strict=True):
            deep = stage(deep, shallow)
        return deep


class Network(nn.Module):
    """Predicts colour from lightness. `head` maps features to `outputs` channels: 313 logits, or 2: ab / AB_SCALE."""

    def __init__(self, outputs: int, width: float = 1.0, skips: bool = True) -> None:
        super().__init__()
        self.encoder = Encoder(width)
        self.decoder = Decoder(self.encoder.channels, width, skips)
        self.head = nn.Conv2d(FEATURES, outputs, 1)
        # starts from "every bin is as likely": the first steps need not unlearn a random opinion
        nn.init.normal_(self.head.weight, std=0.01)
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)
        # 3 -> 1, 3, 1, 1
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def image(self, lightness: Tensor) -> Tensor:
        """What the encoder sees: the gray photograph as RGB, ImageNet's statistics; [B, 1, H, W] -> [B, 3, H, W]."""
        image = (gray_from_lightness(lightness) - self.mean) / self.std
        return image.contiguous(memory_format=torch.channels_last)

    def features(self, lightness: Tensor) -> Tensor:
        """L [B, 1, H, W] in 0..100, H and W multiples of 16 -> [B, 64, H/2, W/2], channels last in memory."""
        height, width = lightness.shape[-2:]
        if height % MULTIPLE or width % MULTIPLE:
            raise ValueError(f"height and width must be multiples of {MULTIPLE}, got {height} x {width}")
        with span("encoder"):
            seen = self.encoder(self.image(lightness))
        with span("decoder"):
            features: Tensor = self.decoder(seen)
        return features

    def forward(self, lightness: Tensor) -> Tensor:
        """L [B, 1, H, W] -> [B, outputs, H/2, W/2]: for export and inspection, training never builds 313 logits."""
        outputs: Tensor = self.head(self.features(lightness))
        return outputs
