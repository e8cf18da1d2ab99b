"""Regression of ab by a perceptual loss: VGG features of the recomposed RGB against those of the photograph.

Johnson, Alahi, Fei-Fei 2016. The predicted ab, interpolated to the resolution of L, goes through Lab -> sRGB
(differentiable, not clipped) and ImageNet's normalisation into a frozen VGG16-BN; the photograph does the same.

Which features judge: with pretrained weights (`model.encoder` imagenet or a file) the network's own frozen encoder.
With `model.encoder: scratch` there are no pretrained ones: the judge is a frozen copy of the encoder as it was
initialised, random filters whose responses were normalised on the first photographs; it is kept in the checkpoints.
Random features compare textures and colours at several scales, but know nothing of objects.
"""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_colorize.color.lab import AB_SCALE, lab_to_srgb
from dist_colorize.models.encoder import Encoder
from dist_colorize.models.network import IMAGENET_MEAN, IMAGENET_STD, OUTPUT_STRIDE, Network
from dist_colorize.models.objectives.base import Objective, predicted_ab

LEVELS = 3
"""Features that are compared: those at strides 2, 4 and 8."""


class Perceptual(Objective):
    """Mean squared difference of features, averaged over LEVELS; every pixel at output stride weighs 1."""

    outputs: ClassVar[int] = 2

    def __init__(self, class_weights: Tensor) -> None:
        super().__init__(class_weights)
        # 3 -> 1, 3, 1, 1
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self.copy: Encoder | None = None
        self._shared: tuple[Encoder, ...] = ()

    def attach(self, network: Network) -> None:
        if any(parameter.requires_grad for parameter in network.encoder.parameters()):
            self.copy = copy.deepcopy(network.encoder)
            self.copy.freeze()
        else:
            # in a tuple, so that it is not registered, moved and saved a second time
            self._shared = (network.encoder,)

    @property
    def judge(self) -> Encoder:
        """The frozen encoder whose features are compared."""
        return self._shared[0] if self.copy is None else self.copy

    def forward(self, features: Tensor, head: nn.Conv2d, lightness: Tensor, ab: Tensor) -> tuple[Tensor, Tensor]:
        predicted = predicted_ab(features, head) * AB_SCALE
        # as post-processing does: [B, 2, H/2, W/2] -> [B, 2, H, W]
        predicted = F.interpolate(predicted, scale_factor=OUTPUT_STRIDE, mode="bilinear", align_corners=False)
        with torch.no_grad():
            expected = self.judge(self.image(lightness, ab))
        found = self.judge(self.image(lightness, predicted))
        pixels = ab.new_full((), ab[:, 0].numel() // OUTPUT_STRIDE**2)
        # each level's mean over the batch, so that the mean over the batch times its pixels is a sum over its pixels
        differences = [F.mse_loss(f.float(), e.float()) for f, e in zip(found[:LEVELS], expected[:LEVELS], strict=True)]
        return torch.stack(differences).mean() * pixels, pixels

    def image(self, lightness: Tensor, ab: Tensor) -> Tensor:
        """L [B, 1, H, W], ab [B, 2, H, W] -> RGB as the judge sees it, [B, 3, H, W]."""
        # autocast would take the colour matrix in half precision
        with torch.autocast(ab.device.type, enabled=False):
            rgb = lab_to_srgb(torch.cat([lightness, ab], dim=1).float())
        return ((rgb - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
