"""What every objective is.

Sums, not means: the mean over the global batch is the ratio of two sums over all ranks (a mean of the ranks' means
would weigh a rank with many rare colours wrongly), and the training step divides once.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from dist_colorize.color.gamut import BINS
from dist_colorize.models.network import Network


class Objective(nn.Module):
    """A loss over the network's features and head. Its state dict, if any, is saved in checkpoints."""

    outputs: ClassVar[int] = BINS
    """Channels of the head: 313 logits, or 2 for ab / AB_SCALE itself (postprocess.stages decodes both)."""
    rebalances: ClassVar[bool] = False
    """Whether class weights matter: then the colours of the training photographs are counted first."""

    def __init__(self, class_weights: Tensor) -> None:
        """class_weights: float32 [313], expectation 1 under the prior; all 1 for objectives that do not rebalance."""
        super().__init__()

    def attach(self, network: Network) -> None:
        """Called once with the initialised network, for objectives that look at its encoder."""

    def forward(self, features: Tensor, head: nn.Conv2d, lightness: Tensor, ab: Tensor) -> tuple[Tensor, Tensor]:
        """features [B, 64, H/2, W/2], L [B, 1, H, W], true ab [B, 2, H, W] -> sum of weighted losses, sum of weights.

        Both 0-dim fp32, over this rank's pixels at output stride. Weights have mean 1 or near it.
        """
        raise NotImplementedError


def predicted_ab(features: Tensor, head: nn.Conv2d) -> Tensor:
    """What a head of 2 channels puts out, in fp32: features [B, 64, h, w] -> ab / AB_SCALE [B, 2, h, w].

    As a matrix product: the gradient of a 1x1 convolution over channels-last features has strides that DDP must copy.
    """
    # [B, 64, h, w] -> [B, h, w, 64], a view -> [B, h, w, 2] -> [B, 2, h, w]
    return F.linear(features.movedim(1, -1), head.weight.flatten(1), head.bias).movedim(-1, 1).float()
