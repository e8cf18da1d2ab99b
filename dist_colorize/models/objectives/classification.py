"""Cross entropy over the 313 bins of the ab plane, plain and rebalanced. The logits never exist all at once."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_colorize.color.gamut import Gamut
from dist_colorize.models.network import OUTPUT_STRIDE
from dist_colorize.models.objectives.base import Objective

CHUNK = {"cpu": 4096, "cuda": 65536}
"""Pixels whose logits exist at a time in the chunked loss: about 5 MB on a CPU, 80 MB (fp32) on a GPU."""


class CrossEntropy(Objective):
    """Cross entropy with the nearest bin as label; every pixel weighs the same."""

    def __init__(self, class_weights: Tensor) -> None:
        super().__init__(class_weights)
        self.gamut = Gamut()
        # saved as a checkpoint field of its own, so not a second time with the module
        weights = class_weights if self.rebalances else torch.ones_like(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)
        self.class_weights: Tensor

    def forward(self, features: Tensor, head: nn.Conv2d, lightness: Tensor, ab: Tensor) -> tuple[Tensor, Tensor]:
        # labels: [B, H/2, W/2] -> [B * H/2 * W/2]
        labels = self.gamut.nearest(F.avg_pool2d(ab, OUTPUT_STRIDE)).flatten().long()
        # [B, 64, h, w] -> [B * h * w, 64]: a view, as the features lie channels last. In fp32: the sum over all pixels
        # has the dtype of the rows, and would be rounded to 3 digits in bf16 and infinite in fp16.
        rows = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1]).float()
        loss = F.linear_cross_entropy(
            rows,
            # [313, 64, 1, 1] -> [313, 64]
            head.weight.flatten(1),
            labels,
            linear_bias=head.bias,
            weight=self.class_weights,
            reduction="sum",
            options=torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=CHUNK[rows.device.type]),
        )
        return loss, self.class_weights[labels].sum()


class RebalancedCrossEntropy(CrossEntropy):
    """Each pixel weighted by its true bin's class weight (Zhang et al. 2016, eq. 2): rare colours count more."""

    rebalances: ClassVar[bool] = True
