"""What a network is trained for. An objective turns features and the true ab into a loss *sum* and the sum of weights.

Sums, not means: the mean over the global batch is the ratio of two sums over all ranks (a mean of the ranks' means
would weigh a rank with many rare colours wrongly), and the training step divides once.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_colorize.color.gamut import BINS, Gamut
from dist_colorize.models.network import OUTPUT_STRIDE

CHUNK = {"cpu": 4096, "cuda": 65536}
"""Pixels whose logits exist at a time in the chunked loss: about 5 MB on a CPU, 80 MB (fp32) on a GPU."""


class RebalancedCrossEntropy(nn.Module):
    """Cross entropy over 313 bins, each pixel weighted by its true bin's class weight (Zhang et al. 2016, eq. 2)."""

    outputs: ClassVar[int] = BINS
    """Channels of the head."""

    def __init__(self, class_weights: Tensor) -> None:
        super().__init__()
        self.gamut = Gamut()
        # saved as a checkpoint field of its own, so not a second time with the module
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.class_weights: Tensor

    def forward(self, features: Tensor, head: nn.Conv2d, ab: Tensor) -> tuple[Tensor, Tensor]:
        """features [B, 64, H/2, W/2], true ab [B, 2, H, W] -> sum of weighted losses, sum of weights (0-dim, fp32)."""
        # labels: [B, H/2, W/2] -> [B * H/2 * W/2]
        labels = self.gamut.nearest(F.avg_pool2d(ab, OUTPUT_STRIDE)).flatten().long()
        # [B, 64, h, w] -> [B * h * w, 64]: a view, as the features lie channels last
        rows = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])
        loss = F.linear_cross_entropy(
            rows,
            # [313, 64, 1, 1] -> [313, 64]
            head.weight.flatten(1).to(rows.dtype),
            labels,
            linear_bias=None if head.bias is None else head.bias.to(rows.dtype),
            weight=self.class_weights.to(rows.dtype),
            reduction="sum",
            options=torch.nn.LinearCrossEntropyOptions(
                chunking_method=None, batch_chunk_size=CHUNK[rows.device.type], acc_dtype=torch.float32
            ),
        )
        return loss.float(), self.class_weights[labels].sum()
