"""Networks and what they are trained for. A method is one file in `objectives` and one line in METHODS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_colorize import config as configuration
from dist_colorize.checkpoint import load_module
from dist_colorize.errors import UserError
from dist_colorize.models.encoder import pretrained_vgg16_bn
from dist_colorize.models.network import Network
from dist_colorize.models.objectives import (
    CrossEntropy,
    Objective,
    Perceptual,
    RebalancedCrossEntropy,
    SoftTargets,
    SquaredError,
)
from dist_colorize.profiling import span

METHODS: dict[str, type[Objective]] = {
    "mse": SquaredError,
    "classification": CrossEntropy,
    "perceptual": Perceptual,
    "final": RebalancedCrossEntropy,
    "final_soft": SoftTargets,
}
"""Name in `model.method` -> what the network is trained for. Each has a recipe in configs/methods."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    method: str = "final"
    """What is trained: mse, classification, perceptual, final or final_soft (dist_colorize.models.METHODS)."""
    skips: bool = True
    """Whether the decoder sees the encoder's features at strides 8, 4 and 2 as well; the first methods had none."""
    width: float = 1.0
    """Channels of encoder and decoder as a multiple of VGG16's; pretrained weights need 1."""
    encoder: str = "imagenet"
    """imagenet: torchvision's VGG16-BN, frozen; or a file with its state dict, frozen; scratch: trained as well."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method}")
        if not 0.05 <= self.width <= 4:
            raise ValueError(f"width must be within 0.05..4, got {self.width}")


def build(config: ModelConfig) -> Network:
    """An untrained network for the config: its encoder is filled by `initialise` or from a checkpoint."""
    network = Network(METHODS[config.method].outputs, config.width, config.skips)
    if config.encoder != "scratch":
        network.encoder.freeze()
    # not the head: its 1x1 weight is used as a matrix, whose gradient is laid out as one
    for part in (network.encoder, network.decoder):
        part.to(memory_format=torch.channels_last)
    return network


def initialise(network: Network, config: ModelConfig, lightness: Tensor) -> None:
    """Fills the encoder: pretrained weights, or statistics measured on L [B, 1, H, W] of the first photographs."""
    if config.encoder == "scratch":
        network.encoder.calibrate(network.image(lightness))
    else:
        network.encoder.load_vgg16_bn(*pretrained_vgg16_bn(config.encoder))


class TrainingModule(nn.Module):
    """Network, head and loss in one module: DDP must wrap all that a gradient passes through."""

    def __init__(self, network: Network, objective: Objective) -> None:
        """network: initialised."""
        super().__init__()
        self.network, self.objective = network, objective
        objective.attach(network)

    def forward(self, lightness: Tensor, ab: Tensor) -> tuple[Tensor, Tensor]:
        """L [B, 1, H, W], ab [B, 2, H, W] -> loss sum, weight sum over this rank's pixels (0-dim, fp32)."""
        features = self.network.features(lightness)
        with span("loss"):
            loss, weight = self.objective(features, self.network.head, lightness, ab)
        return loss, weight


def restore(state: Mapping[str, Any]) -> Network:
    """The network of a loaded checkpoint, in eval mode on the CPU; the moving average where one was kept.

    Raises UserError naming the field when the checkpoint is of another architecture.
    """
    if not isinstance(state.get("config"), Mapping) or "model" not in state:
        raise UserError("checkpoint: has no 'config' and 'model'; it was not written by dist_colorize.train")
    network = build(configuration.build(ModelConfig, dict(state["config"].get("model", {})), "the checkpoint's config"))
    load_module(network, {**state["model"], **(state.get("ema") or {})}, "the checkpoint")
    return network.eval().requires_grad_(False)
