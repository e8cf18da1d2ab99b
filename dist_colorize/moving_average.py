"""Exponential moving average of the trained weights, for evaluation and checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from dist_colorize.models.network import Network


class MovingAverage:
    """After step n: average = decay * average + (1 - decay) * weights; after step 0 the weights themselves.

    Frozen weights are shared with the network: they are neither copied nor averaged. Nothing here waits for a GPU.
    """

    def __init__(self, network: Network, decay: float) -> None:
        self.decay = decay
        trained = [(name, weight) for name, weight in network.named_parameters() if weight.requires_grad]
        others = [t for t in (*network.parameters(), *network.buffers()) if not t.requires_grad]
        self.network: Network = copy.deepcopy(network, {id(tensor): tensor for tensor in others}).requires_grad_(False)
        """A network of its own with the averages as weights."""
        self._weights: list[Tensor] = [weight for _, weight in trained]
        self._averages: dict[str, Tensor] = {name: self.network.get_parameter(name) for name, _ in trained}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after optimizer step 0, 1, ..."""
        torch._foreach_lerp_(list(self._averages.values()), self._weights, 1 - self.decay if step else 1.0)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name, without the frozen weights."""
        return {name: average.detach() for name, average in self._averages.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores `state_dict()`; entries of frozen weights, which older checkpoints have, are ignored."""
        with torch.no_grad():
            for name, average in self._averages.items():
                average.copy_(state[name])
