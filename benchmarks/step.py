"""The training step of the final network against the straightforward PyTorch step, and where its time goes.

    python -m benchmarks.step                       # 224 px, full width, batch 4; at least 8 GiB
    python -m benchmarks.step --batch 8 --rounds 9

The peer is what one writes first: torchvision's VGG16-BN with its BatchNorms in place, NCHW, all logits,
F.cross_entropy and Adam. Both have the same weights, labels and decoder, so their losses must agree, step for step.
bf16 is measured where the processor multiplies bf16 matrices itself; elsewhere it is emulated, far slower than fp32.
The same on a GPU, with more peers: `python -m benchmarks.gpu_step`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vgg16_bn

from benchmarks.harness import ROUNDS, Times, forget_peak, machine, resident, table, take_turns, verdict
from dist_colorize.color.gamut import Gamut
from dist_colorize.data import DataConfig, Loader, Order, open_photographs
from dist_colorize.distributed import DistributedConfig, World, session
from dist_colorize.hardware import cpu_has_bf16
from dist_colorize.models import METHODS, ModelConfig, TrainingModule, build
from dist_colorize.models.network import OUTPUT_STRIDE, Network
from dist_colorize.optimisation import Optimisation, TrainConfig
from dist_colorize.profiling import RANGES, span
from dist_colorize.stopping import StopFlag

SIZE = 224
WARMUP = 3
CPU = torch.device("cpu")
Precision = Literal["fp32", "bf16"]
GOALS = {"fp32": 1.35, "bf16": 1.6}
DEFAULT_GOAL, MEMORY_GOAL = 2.7, 0.55


@dataclass(frozen=True)
class Work:
    """What every contestant does in a step."""

    images: int
    """Photographs of a step, the same ones in every step."""
    precision: Precision
    device: torch.device = CPU
    side: int = SIZE
    """Of the square photographs, in pixels."""

    def batch(self) -> tuple[Tensor, Tensor]:
        """L [B, 1, S, S] and ab [B, 2, S, S] without detail finer than 8 px, as photographs have."""
        random = torch.Generator().manual_seed(2)
        coarse = torch.rand(self.images, 3, self.side // 8, self.side // 8, generator=random)
        fine = F.interpolate(coarse, scale_factor=8, mode="bilinear").to(self.device)
        return 100 * fine[:, :1], 120 * (fine[:, 1:] - 0.5)


class PlainNetwork(nn.Module):
    """The same function of L, layer by layer as the paper draws it."""

    def __init__(self, ours: Network, vgg: nn.Sequential, layout: torch.memory_format) -> None:
        """layout: of the weights, and of what the first convolution sees."""
        super().__init__()
        # the taps at strides 2, 4, 8, 16: the last ReLU before each of the pools that follow
        self.blocks = nn.ModuleList([vgg[:13], vgg[13:23], vgg[23:33], vgg[33:43]])
        self.decoder, self.head = ours.decoder, ours.head
        self.image, self.layout = ours.image, layout
        self.to(memory_format=layout)

    def forward(self, lightness: Tensor) -> Tensor:
        image, taps = self.image(lightness).contiguous(memory_format=self.layout), []
        for block in self.blocks:
            image = block(image)
            taps.append(image)
        logits: Tensor = self.head(self.decoder(taps))
        return logits


def pretrained() -> nn.Sequential:
    """VGG16-BN's features in eval mode; random, but with BatchNorms that do something."""
    return deepcopy(_random_vgg())


@cache
def _random_vgg() -> nn.Sequential:
    torch.manual_seed(0)
    features = vgg16_bn().features.eval().requires_grad_(False)
    for layer in features:
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.get_buffer("running_mean"), -0.1, 0.1)
            nn.init.uniform_(layer.get_buffer("running_var"), 0.5, 1.5)
    return features


def ours() -> Network:
    """The final network as training builds it."""
    encoder = {f"features.{k}": v for k, v in pretrained().state_dict().items()}
    torch.manual_seed(1)
    network = build(ModelConfig())
    network.encoder.load_vgg16_bn(encoder, "the benchmark")
    # as it starts, all bins are as likely: there would be nothing to compare
    nn.init.normal_(network.head.weight, std=0.1)
    return network


def class_weights() -> Tensor:
    return torch.linspace(0.1, 6, 313)


Step = Callable[[], Tensor]


def plain_step(work: Work, layout: torch.memory_format = torch.contiguous_format, compiled: bool = False) -> Step:
    """compiled: network and loss go through torch.compile together."""
    network = PlainNetwork(ours().to(work.device), pretrained(), layout).to(work.device)
    adam = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-4)
    gamut, weights = Gamut().to(work.device), class_weights().to(work.device)
    lightness, ab = work.batch()

    def loss_of(lightness: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(network(lightness), labels, weights)

    if compiled:
        loss_of = torch.compile(loss_of, dynamic=False)

    def step() -> Tensor:
        labels = gamut.nearest(F.avg_pool2d(ab, OUTPUT_STRIDE)).long()
        with torch.autocast(work.device.type, torch.bfloat16, enabled=work.precision == "bf16"):
            loss = loss_of(lightness, labels)
        adam.zero_grad()
        loss.backward()
        adam.step()
        return loss.detach()

    return step


def our_step(work: Work, world: World) -> Step:
    optimisation = our_optimisation(work, world)
    lightness, ab = work.batch()
    numbers = iter(range(10**9))
    return lambda: optimisation.step(next(numbers), lightness, ab)


def our_optimisation(work: Work, world: World) -> Optimisation:
    """The step of dist_colorize.train, DDP and checks for non-finite gradients included."""
    settings = TrainConfig(
        global_batch=work.images, lr=1e-4, warmup=0, schedule="constant", clip=None, precision=work.precision
    )
    module = TrainingModule(ours(), METHODS["final"](class_weights())).to(world.device)
    return Optimisation(module, settings, world)


def make(who: str, work: Work, world: World) -> Step:
    return plain_step(work) if who == "plain" else our_step(work, world)


def main(world: World) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--memory-of", nargs=2, metavar=("STEP", "PRECISION"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        who, precision = arguments.memory_of
        print(json.dumps(memory(partial(make, who, Work(arguments.batch, precision), world))))
        return
    print(machine("torch", "torchvision"), flush=True)
    precisions = [p for p in get_args(Precision) if p == "fp32" or cpu_has_bf16()]
    if "bf16" not in precisions:
        emulated, own = (matrix_product(dtype, side=256) for dtype in (torch.bfloat16, torch.float32))
        print(
            "bf16: not measured, as this processor does not multiply it: a product of 256^3 reaches "
            f"{emulated:.2g} GFLOP/s, emulated, and {own:.3g} in fp32; training uses fp32 here"
        )

    steps = {
        f"{who} {precision}": make(who, Work(arguments.batch, precision), world)
        for precision in precisions
        for who in ("plain", "ours")
    }
    check_losses_agree(steps, "plain fp32", {name: 1e-4 if name.endswith("fp32") else 2e-2 for name in steps})
    times = take_turns(steps, arguments.rounds)
    peaks = {name: peak_of(name, arguments.batch) for name in steps}
    rows = [
        [name, arguments.batch / times.of(name), times.ratio(name, "plain fp32"), peaks[name] / 2**20] for name in steps
    ]
    print(table(["step", "images/s", "x plain fp32", "peak beyond weights, MiB"], rows))
    judge(times, peaks, precisions)
    for precision in precisions:
        parts(Work(arguments.batch, precision), world)


def judge(times: Times, peaks: dict[str, float], precisions: list[Precision]) -> None:
    for precision in precisions:
        mine, peer = f"ours {precision}", f"plain {precision}"
        ratio, share = times.ratio(mine, peer), peaks[mine] / peaks[peer]
        print(f"{precision}: {ratio:.2f} times the plain step's speed ({verdict(ratio, GOALS[precision])})", end="; ")
        print(f"{share:.2f} of its memory ({verdict(share, MEMORY_GOAL, at_most=True)})")
    if "bf16" in precisions:
        ratio = times.ratio("ours bf16", "plain fp32")
        print(f"our default here, bf16: {ratio:.2f} times plain fp32 ({verdict(ratio, DEFAULT_GOAL)})")


def check_losses_agree(steps: Mapping[str, Step], reference: str, tolerances: Mapping[str, float]) -> None:
    """The same weights, data and optimizer: the same losses, up to rounding, as all train on. Else SystemExit."""
    curves = {name: [float(step()) for _ in range(WARMUP)] for name, step in steps.items()}
    for name, curve in curves.items():
        worst = max(abs(loss / expected - 1) for loss, expected in zip(curve, curves[reference], strict=True))
        print(f"losses of {name}: {' '.join(f'{loss:.5f}' for loss in curve)}, within {worst:.1e} of {reference}")
        if not worst <= tolerances[name]:  # NaN is no agreement
            raise SystemExit(f"{name} does not do the same work")


def peak_of(name: str, images: int) -> float:
    """Bytes at the peak of a few steps, beyond interpreter and weights, in a process of its own.

    What is freed goes back at once there: how much of it glibc would keep for later differs by 100 MB from run to run.
    """
    command = [sys.executable, "-m", "benchmarks.step", "--batch", str(images), "--memory-of", *name.split()]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return float(json.loads(output.splitlines()[-1]))


def memory(build: Callable[[], Step]) -> int:
    step = build()
    before = resident()
    forget_peak()
    for _ in range(WARMUP):
        step()
    return resident("VmHWM") - before


@contextmanager
def training(work: Work, world: World, config: DataConfig) -> Iterator[Callable[[], None]]:
    """A function that makes one step on photographs, all ranges of profiling.RANGES in it; the first ones are made."""
    with StopFlag() as stop:
        photographs, _ = open_photographs(config, world, stop)
    order = Order(len(photographs), photographs.fingerprint, seed=0)
    optimisation = our_optimisation(work, world)
    numbers = iter(range(10**9))
    with Loader(photographs, config, order, world, work.images) as loader:
        batches = loader.batches()

        def step() -> None:
            with span("data"):
                crops = next(batches)
            optimisation.step(next(numbers), crops.L, crops.ab)

        for _ in range(WARMUP):
            step()
        yield step


def parts(work: Work, world: World) -> None:
    """Time and FLOP/s of each range of a training on photographs, against what a large matrix product reaches now."""
    with (
        training(work, world, DataConfig(crop=work.side)) as step,
        profile(activities=[ProfilerActivity.CPU]) as recorder,
    ):
        for _ in range(WARMUP):
            step()
    seconds = {event.key: event.cpu_time_total / 1e6 / WARMUP for event in recorder.key_averages()}
    flops = count_flops(work)
    ceiling = matrix_product(torch.bfloat16 if work.precision == "bf16" else torch.float32)
    rows = []
    for name in RANGES:
        needed = flops.get(name, 0)
        speed = needed / seconds[name] / 1e9
        rows.append([name, seconds[name] * 1000, needed / 1e9, *([speed, speed / ceiling] if needed else ["-", "-"])])
    print(f"\nours {work.precision}, part by part; a 2048^3 matrix product: {ceiling:.0f} GFLOP/s")
    print(table(["part", "ms", "GFLOP", "GFLOP/s", "of the product's"], rows))


def count_flops(work: Work) -> dict[str, int]:
    """Multiplications and additions of the parts. The chunked loss makes its gradients in its forward pass."""
    network, (lightness, _) = ours(), work.batch()
    total = {}
    with FlopCounterMode(display=False) as counter:
        taps = network.encoder(network.image(lightness))
    total["encoder"] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        features = network.decoder(taps)
    total["decoder"] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        features.sum().backward()
    total["backward"] = counter.get_total_flops()
    # logits, their gradient to the features, their gradient to the weights
    total["loss"] = 3 * 2 * features.numel() * network.head.out_channels
    return total


def matrix_product(dtype: torch.dtype, side: int = 2048) -> float:
    """GFLOP/s of a product of two square matrices."""
    left, right = torch.randn(side, side).to(dtype), torch.randn(side, side).to(dtype)
    return 2 * side**3 / take_turns({"product": lambda: left @ right}).of("product") / 1e9


if __name__ == "__main__":
    with session(DistributedConfig(device="cpu")) as this_process:
        main(this_process)
