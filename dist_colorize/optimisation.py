"""One training step: gradients of the global weighted mean, in mixed precision, accumulated, clipped, applied.

The loss is sum(w * nll) / sum(w), both sums over every pixel of the global batch, on whichever rank. DDP averages
gradients over ranks, and the sum of weights is known only when the last rank has seen its last pixel. So each rank
back-propagates its *sum*, divided by the number of pixels of the global batch (the weights have mean 1, so this is the
right magnitude for half precision); what remains, pixels / sum(w), is one exact factor for all gradients.

A step whose loss or gradient is not finite changes nothing. Both are global sums by then, so all ranks see the same and
skip alike; the decision stays on the device, in the optimizer's own kernel, and no rank waits for it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_colorize.distributed import World
from dist_colorize.errors import UserError
from dist_colorize.hardware import default_precision
from dist_colorize.models import TrainingModule
from dist_colorize.models.network import MULTIPLE, OUTPUT_STRIDE, Network
from dist_colorize.moving_average import MovingAverage
from dist_colorize.profiling import span

DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_KEYWORDS = inspect.signature(DistributedDataParallel).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {
    # the name since torch 2.14, which deprecates the other one
    ("forward_sync_buffers" if "forward_sync_buffers" in _KEYWORDS else "broadcast_buffers"): False
}
"""DDP's keyword for: buffers are constants, so that ranks need not send them at every step."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int = 100_000
    """Optimizer steps in all."""
    global_batch: int = 256
    """Photographs per step over all ranks; must be a multiple of the world size."""
    micro_batch: int | None = None
    """Photographs a rank takes at a time; it accumulates gradients over its share of a step. null: the whole share."""
    lr: float = 1e-3
    """Learning rate of Adam after the warm-up."""
    warmup: int = 1000
    """Steps over which the learning rate rises linearly from 0."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What follows the warm-up: a cosine down to 0 at the last step, or no change."""
    clip: float | None = 1.0
    """Largest L2 norm of the gradient; larger ones are scaled down to it. null: no clipping."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast dtype. auto: bf16 where the device computes in it, else fp16 on a GPU and fp32 on a CPU. fp32: IEEE
    single precision on every device, no TF32; validation, evaluate and postprocess always compute in it."""
    max_skipped: int = 25
    """Steps in a row that may be skipped for a non-finite loss or gradient; one more and the run stops."""
    ema: float | None = None
    """Decay per step of a moving average of the weights, which evaluation then uses; 0.999 is usual. null: none."""
    seed: int = 0
    """Seeds the data order, the crops and the initial weights."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    validate_every: int = 5000
    """Steps between validations; 0: only at the end."""
    profile: int = 0
    """Steps to trace, after the first three: RUN/profile gets a file of each rank for Perfetto and TensorBoard."""

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "log_every", "max_skipped"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "validate_every", "seed", "profile"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1 or null, got {self.micro_batch}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip must be above 0 or null, got {self.clip}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must be between 0 and 1 or null, got {self.ema}")

    def local_batch(self, world_size: int) -> int:
        """Photographs per rank and step. Raises UserError where the world size does not divide the global batch."""
        if self.global_batch % world_size:
            nearest = max(1, round(self.global_batch / world_size)) * world_size
            raise UserError(
                f"train.global_batch={self.global_batch} cannot be shared by {world_size} ranks; give a multiple, "
                f"such as train.global_batch={nearest}, or start another number of processes",
                shared=True,
            )
        return self.global_batch // world_size

    def learning_rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ...: a pure function, so that a resumed run needs no schedule state."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        return self.lr * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup))) / 2


class Optimisation:
    """DDP, Adam, GradScaler and the moving average around one TrainingModule."""

    def __init__(self, module: TrainingModule, config: TrainConfig, world: World) -> None:
        self.module, self.config, self.world = module, config, world
        self.precision = default_precision(world.device) if config.precision == "auto" else config.precision
        self.ddp = DistributedDataParallel(
            module,
            device_ids=[world.device] if world.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **_NO_BUFFER_SYNC,
        )
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.adam = torch.optim.Adam(self.parameters, lr=config.lr, fused=True)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.precision == "fp16")
        self.skipped = torch.zeros(2, dtype=torch.int64, device=world.device)
        """Steps skipped as loss or gradient were not finite: in all, and in a row by now. Reading waits for the GPU."""
        self.average = None if config.ema is None else MovingAverage(module.network, config.ema)
        self._settle()

    def _settle(self) -> None:
        """One backward pass that counts for nothing.

        After its first backward pass DDP lays out its buckets anew, in the order in which gradients became ready, and
        sums in another order from then on. Done before the first step of every process, the first step after a resume
        sums as the same step of a run that was never cut: with three ranks or more the bits depend on it.
        """
        lightness = torch.zeros(1, 1, MULTIPLE, MULTIPLE, device=self.world.device)
        loss, _ = self.ddp(lightness, lightness.expand(1, 2, MULTIPLE, MULTIPLE))
        loss.backward()
        self.adam.zero_grad(set_to_none=True)

    @property
    def network(self) -> Network:
        """The network to evaluate: the moving average where there is one."""
        return self.module.network if self.average is None else self.average.network

    def step(self, number: int, lightness: Tensor, ab: Tensor) -> Tensor:
        """One optimizer step on this rank's L [B, 1, H, W] and ab [B, 2, H, W]; returns the global mean loss, 0-dim.

        `number` counts from 0. The result stays on the device: reading it is the caller's host synchronisation.
        """
        for group in self.adam.param_groups:
            group["lr"] = self.config.learning_rate(number)
        positions = ab.shape[-2] * ab.shape[-1] // OUTPUT_STRIDE**2
        pixels = len(ab) * self.world.size * positions
        micro = self.config.micro_batch or len(ab)
        parts = list(zip(lightness.split(micro), ab.split(micro), strict=True))
        sums = torch.zeros(2, dtype=torch.float64, device=ab.device)
        for part, (part_lightness, part_ab) in enumerate(parts):
            last = part == len(parts) - 1
            with nullcontext() if last else self.ddp.no_sync():
                with torch.autocast(ab.device.type, DTYPE[self.precision], enabled=self.precision != "fp32"):
                    loss, weight = self.ddp(part_lightness, part_ab)
                with span("backward"):
                    self.scaler.scale(loss * (self.world.size / pixels)).backward()
            sums += torch.stack([loss.detach(), weight]).double()
        with span("all-reduce"):
            loss_sum, weight_sum = self.world.sum_(sums)
        with span("optimizer"):
            self._apply(loss_sum, weight_sum, pixels)
            if self.average is not None:
                self.average.update(number)
        return loss_sum / weight_sum

    def _apply(self, loss_sum: Tensor, weight_sum: Tensor, pixels: int) -> None:
        """Moves the weights along the gradients, unless those or the loss are not finite."""
        self.scaler.unscale_(self.adam)
        norm = self._scale_gradients(pixels / weight_sum)
        bad = ~(torch.isfinite(loss_sum / weight_sum) & torch.isfinite(norm))
        self.skipped += bad
        self.skipped[1] *= bad
        # The fused kernel leaves weights and moments alone where this is 1: GradScaler.step works in the same way. It
        # is not used, as it would not look at the loss, nor at anything in fp32 and bf16.
        self.adam.found_inf = bad.float()  # type: ignore[attr-defined]
        self.adam.step()
        self.scaler.update()
        self.adam.zero_grad(set_to_none=True)

    def _scale_gradients(self, factor: Tensor) -> Tensor:
        """Multiplies all gradients by the factor, then by what clipping asks for; returns the norm before clipping."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        factor = factor.to(gradients[0].dtype)
        norm = nn.utils.get_total_norm(gradients) * factor
        if self.config.clip is not None:
            factor = factor * (self.config.clip / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the optimisation; the network is saved beside it, under `model`."""
        return {
            "model": self.module.network.state_dict(),
            "objective": self.module.objective.state_dict(),
            "ema": None if self.average is None else self.average.state_dict(),
            "optimizer": self.adam.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict()`. The caller has checked that the checkpoint is of this configuration."""
        self.module.network.load_state_dict(state["model"])
        self.module.objective.load_state_dict(state["objective"])
        if self.average is not None:
            self.average.load_state_dict(state["ema"] or state["model"])
        self.adam.load_state_dict(state["optimizer"])
        self.skipped.copy_(state["skipped"])
        if self.scaler.is_enabled() and state["scaler"]:  # empty where the run was not fp16 until now
            self.scaler.load_state_dict(state["scaler"])
