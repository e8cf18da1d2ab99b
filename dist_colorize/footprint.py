"""What one training step of a recipe takes from a rank, found out without the memory or the ranks.

`memory` runs the real model, loss and optimizer on fake tensors, which have shapes and storages but no contents, and
adds up what is alive. `traffic` runs a real step on a tiny image in a process group of one rank, and adds up what it
hands to collectives: the same as in a group of any size. Both see what the code does, and follow it when it changes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_colorize.color.gamut import BINS
from dist_colorize.distributed import World
from dist_colorize.models import METHODS, ModelConfig, TrainingModule, build
from dist_colorize.models.network import OUTPUT_STRIDE, Network
from dist_colorize.models.objectives.linear_cross_entropy import CHUNK
from dist_colorize.optimisation import DTYPE, Optimisation, TrainConfig


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of one rank."""

    weights: int
    """Frozen and trained, with buffers."""
    gradients: int
    """DDP keeps them in its buckets from step to step."""
    optimizer: int
    """Adam's two moments."""
    average: int
    """The moving average of the weights, if there is one."""
    activations: int
    """What the forward pass leaves for the backward pass, and the batch itself."""
    peak: int
    """The most that is alive at any time, all of the above and passing tensors included."""
    logits: int
    """One copy of all logits in fp32, which never exist here; a plain loss holds about three."""


def memory(model: ModelConfig, train: TrainConfig, images: int, side: int, device: Literal["cpu", "cuda"]) -> Memory:
    """Of steps with `images` crops of `side` pixels at a time, on a device of that type (which need not be here).

    What libraries keep for themselves is not included: the CUDA context, NCCL's and cuDNN's buffers, DALI's batches,
    what the allocator cannot give back. `train.precision` must not be auto.
    """
    module = _module(model)
    fake, alive = FakeTensorMode(), _Alive()
    weights = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    average = 0 if train.ema is None else _trained_bytes(module.network)
    for part in module.modules():
        tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for table in tables:
            table.update({name: fake.from_tensor(tensor) for name, tensor in table.items() if tensor is not None})
    if device == "cuda":
        alive.rewrite = _group_norm_of_cuda
        for part in module.modules():
            if isinstance(part, nn.GroupNorm):
                part.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))  # as CUDA's autocast does
    # fake tensors of a GPU cannot go through a backward pass where there is none: the CPU stands in, with its chunks
    with fake, alive, mock.patch.dict(CHUNK, cpu=CHUNK[device]):
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        gradients = alive.now
        adam = torch.optim.Adam(trained, fused=True)
        adam.step()
        optimizer = alive.now - gradients
        lightness, ab = torch.empty(images, 1, side, side), torch.empty(images, 2, side, side)
        with torch.autocast("cpu", DTYPE[train.precision], enabled=train.precision != "fp32"):
            loss, _ = module(lightness, ab)
        activations = alive.now - gradients - optimizer
        loss.backward()
        adam.step()
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        average=average,
        activations=activations,
        peak=weights + average + alive.peak,
        logits=images * (side // OUTPUT_STRIDE) ** 2 * BINS * 4,
    )


def traffic(model: ModelConfig, train: TrainConfig) -> int:
    """Bytes that a rank hands to collectives in one step, whatever their algorithm makes of them on the wire."""
    with _alone() as world:
        optimisation = Optimisation(_module(model), train, world)
        sent = Sent()
        with sent:
            optimisation.step(0, torch.zeros(1, 1, 16, 16), torch.zeros(1, 2, 16, 16))
    return sent.bytes


def checkpoint_bytes(model: ModelConfig, train: TrainConfig) -> int:
    """Size of a checkpoint: all weights, Adam's two moments of the trained ones, and their moving average."""
    network = build(model)
    weights = sum(tensor.nbytes for tensor in network.state_dict().values())
    return weights + _trained_bytes(network) * (2 if train.ema is None else 3)


class Sent(TorchDispatchMode):
    """`with Sent() as sent:` adds up the bytes of the tensors that this thread hands to collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.bytes += sum(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))


class _Alive(TorchDispatchMode):
    """Bytes of the storages that operations under this mode have made and nobody has let go of."""

    rewrite: Callable[[Any, Any], Iterable[Any]] | None = None
    """rewrite(operation, arguments) -> arguments: what another device would first make of them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # what goes in was counted when it was made, or lies outside
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if self.rewrite is not None:
            args = tuple(self.rewrite(func, args))
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, made)):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in before | self._known:
                self._hold(leaf.untyped_storage())
        return made

    def _hold(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), storage._cdata
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _group_norm_of_cuda(operation: Any, arguments: Any) -> Iterable[Any]:
    """CUDA's GroupNorm copies channels-last tensors to NCHW, and answers in NCHW; a CPU's keeps the layout."""
    if operation.name().startswith("aten::native_group_norm"):
        return (each.contiguous() if isinstance(each, Tensor) else each for each in arguments)
    return arguments


def _trained_bytes(network: Network) -> int:
    return sum(parameter.nbytes for parameter in network.parameters() if parameter.requires_grad)


def _module(model: ModelConfig) -> TrainingModule:
    return TrainingModule(build(model), METHODS[model.method](torch.ones(BINS)))


@contextmanager
def _alone() -> Iterator[World]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World(0, 0, 1, 1, torch.device("cpu"), "gloo", torch.get_num_threads())
    finally:
        dist.destroy_process_group()
