"""Post-processing on the CPU: the network's features to finished 8-bit pixels, preset `final`, against two peers.

    python -m benchmarks.decode                     # a picture of 1024 x 1024, features at 512 x 512
    python -m benchmarks.decode --side 2048

The peers are the straightforward NumPy + OpenCV version and the same in plain torch. Both build the logits and clamp
to the sRGB gamut as we do, with NumPy's or torch's own operations on the whole picture; all pixels must agree. What the
head's matrix product costs is in all three; the table also has the peers with logits that somebody else has made.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.harness import ROUNDS, forget_peak, machine, resident, table, take_turns, verdict
from dist_colorize.color.gamut import bin_centers
from dist_colorize.color.lab import GAMUT_STEPS, OFFSET, SLOPE, WHITE, XYZ_FROM_RGB, clamp_to_gamut, lab_to_srgb
from dist_colorize.postprocess.cpu import TorchBackend
from dist_colorize.postprocess.stages import Blend, Repair, decode_and_run, load_preset

NUMPY_GOAL, TORCH_GOAL, MEMORY_GOAL = 6.0, 4.0, 1.3
Pixels = NDArray[np.uint8]


class Scene:
    """What a network might say of a photograph: smooth features, a head, and the photograph's lightness."""

    def __init__(self, side: int) -> None:
        random = torch.Generator().manual_seed(0)
        coarse = torch.randn(1, 64, side // 32, side // 32, generator=random)
        features = F.interpolate(coarse, size=(side // 2, side // 2), mode="bilinear")
        self.features = features.contiguous(memory_format=torch.channels_last)
        # bins of strong colours are rare, as in photographs
        rarity = torch.tensor(bin_centers(), dtype=torch.float32).norm(dim=1) / 12
        self.weight, self.bias = 0.12 * torch.randn(313, 64, generator=random), -rarity
        level = torch.rand(1, 1, side // 16, side // 16, generator=random)
        self.lightness = 25 + 60 * F.interpolate(level, size=(side, side), mode="bilinear")[0, 0]
        self.preset = load_preset("final")

    @property
    def inputs_and_outputs(self) -> int:
        """Bytes of features, lightness and finished pixels."""
        return self.features.nbytes + self.lightness.nbytes + 3 * self.lightness.numel()

    @property
    def megapixels(self) -> float:
        return self.lightness.numel() / 1e6


# ---------------------------------------------------------------- ours


@torch.inference_mode()
def ours(scene: Scene) -> Pixels:
    backend = TorchBackend()
    stages, _ = decode_and_run(scene.preset, backend, scene.features, scene.weight, scene.bias)
    height, width = scene.lightness.shape
    return backend.compose(scene.lightness, stages[-1][1][0], (height, width), 0, 8).numpy()


def product(scene: Scene) -> None:
    """What nobody can do without: the logits, in pieces that stay in the cache, and nothing done to them."""
    # [1, 64, h, w] -> [h * w, 64]
    cells = scene.features.movedim(1, -1).reshape(-1, 64)
    logits = torch.empty(2048, 320)[:, :313]  # rows of whole vectors, as ours
    for chunk in cells.split(len(logits)):
        torch.mm(chunk, scene.weight.T, out=logits[: len(chunk)])


# ---------------------------------------------------------------- NumPy and OpenCV


def numpy_logits(scene: Scene) -> NDArray[np.float32]:
    cells = scene.features.permute(0, 2, 3, 1).reshape(-1, 64).numpy()
    return cells @ scene.weight.numpy().T + scene.bias.numpy()


def numpy_version(scene: Scene, logits: NDArray[np.float32] | None = None) -> Pixels:
    height, width = scene.features.shape[2:]
    logits = numpy_logits(scene) if logits is None else logits
    scaled = logits / np.float32(scene.preset.temperature)
    exponentials = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    probability = exponentials / exponentials.sum(axis=1, keepdims=True)
    ab = (probability @ bin_centers().astype(np.float32)).reshape(height, width, 2)
    confidence = probability.max(axis=1).reshape(height, width)
    for stage in scene.preset.stages:
        if isinstance(stage, Blend):
            ab = numpy_blend(ab, confidence, stage)
        elif isinstance(stage, Repair):
            ab = numpy_repair(ab, confidence, stage)
    full = cv2.resize(ab, scene.lightness.shape[::-1], interpolation=cv2.INTER_LINEAR)
    return numpy_rgb(scene.lightness.numpy(), full[..., 0], full[..., 1])


def blurred(ab: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    side = 2 * int(3 * sigma + 0.5) + 1
    return cv2.GaussianBlur(ab, (side, side), sigma, borderType=cv2.BORDER_REFLECT)


def numpy_blend(ab: NDArray[np.float32], confidence: NDArray[np.float32], stage: Blend) -> NDArray[np.float32]:
    share = np.clip((confidence - stage.low) / (stage.high - stage.low), 0, 1)[..., None]
    return share * ab + (1 - share) * blurred(ab, stage.sigma)


def numpy_repair(ab: NDArray[np.float32], confidence: NDArray[np.float32], stage: Repair) -> NDArray[np.float32]:
    suspect = (np.hypot(ab[..., 0], ab[..., 1]) >= stage.min_chroma) & (confidence < stage.max_confidence)
    trusted = confidence >= stage.max_confidence
    window = (2 * stage.radius + 1,) * 2
    total_in = partial(cv2.boxFilter, ddepth=-1, ksize=window, normalize=False, borderType=cv2.BORDER_CONSTANT)
    current = ab.copy()
    for _ in range(stage.sweeps):
        count = total_in(trusted.astype(np.float32))
        ready = suspect & (count >= stage.min_neighbours)
        if not ready.any():
            break
        mean = total_in(np.where(trusted[..., None], current, 0)) / np.maximum(count, 1)[..., None]
        current[ready] = mean[ready]
        trusted |= ready
        suspect &= ~ready
    if suspect.any():
        current[suspect] = blurred(ab, stage.sigma)[suspect]
    return current


def numpy_rgb(lightness: NDArray[np.float32], a: NDArray[np.float32], b: NDArray[np.float32]) -> Pixels:
    rgb = numpy_srgb(lightness, a, b)
    outside = ((rgb < -1e-4) | (rgb > 1 + 1e-4)).any(axis=-1)
    level, chroma_a, chroma_b = lightness[outside], a[outside], b[outside]
    inside, beyond = np.zeros_like(level), np.ones_like(level)
    for _ in range(GAMUT_STEPS):
        middle = (inside + beyond) / 2
        tried = numpy_srgb(level, chroma_a * middle, chroma_b * middle)
        leaves = ((tried < -1e-4) | (tried > 1 + 1e-4)).any(axis=-1)
        beyond, inside = np.where(leaves, middle, beyond), np.where(leaves, inside, middle)
    rgb[outside] = numpy_srgb(level, chroma_a * inside, chroma_b * inside)
    return (np.clip(rgb, 0, 1) * 255).round().astype(np.uint8)


def numpy_srgb(lightness: NDArray[np.float32], a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    y = (lightness + 16) / 116
    f = np.stack([y + a / 500, y, y - b / 200], axis=-1)
    xyz = np.where(f > 0.2068966, f**3, (f - OFFSET) / SLOPE) * np.array(WHITE, np.float32)
    linear = xyz.astype(np.float32) @ np.linalg.inv(np.array(XYZ_FROM_RGB)).T.astype(np.float32)
    return np.where(linear > 0.0031308, 1.055 * np.maximum(linear, 0.0031308) ** (1 / 2.4) - 0.055, 12.92 * linear)


# ---------------------------------------------------------------- plain torch


def torch_logits(scene: Scene) -> Tensor:
    return F.conv2d(scene.features, scene.weight[..., None, None], scene.bias)


@torch.inference_mode()
def torch_version(scene: Scene, logits: Tensor | None = None) -> Pixels:
    logits = torch_logits(scene) if logits is None else logits
    probability = torch.softmax(logits / scene.preset.temperature, dim=1)
    centers = torch.tensor(bin_centers(), dtype=torch.float32)
    ab = torch.einsum("nchw,cd->ndhw", probability, centers)
    confidence = probability.amax(dim=1, keepdim=True)
    for stage in scene.preset.stages:
        if isinstance(stage, Blend):
            ab = torch_blend(ab, confidence, stage)
        elif isinstance(stage, Repair):
            ab = torch_repair(ab, confidence, stage)
    full = F.interpolate(ab, size=scene.lightness.shape, mode="bilinear")
    lightness = scene.lightness[None, None]
    lab = torch.cat([lightness, clamp_to_gamut(lightness, full)], dim=1)
    # [1, 3, H, W] -> [H, W, 3]
    return (lab_to_srgb(lab).clamp(0, 1) * 255).round().to(torch.uint8)[0].permute(1, 2, 0).contiguous().numpy()


def torch_blur(ab: Tensor, sigma: float) -> Tensor:
    radius = int(3 * sigma + 0.5)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    # "reflect" of scipy and OpenCV repeats the border itself: one cell by "replicate", then torch's own "reflect"
    padded = ab
    for dim in (-1, -2):
        flipped = padded.flip(dim)
        size = padded.shape[dim]
        padded = torch.cat([flipped.narrow(dim, size - radius, radius), padded, flipped.narrow(dim, 0, radius)], dim)
    return F.conv2d(padded.transpose(0, 1), kernel[None, None]).transpose(0, 1)


def torch_blend(ab: Tensor, confidence: Tensor, stage: Blend) -> Tensor:
    share = ((confidence - stage.low) / (stage.high - stage.low)).clamp(0, 1)
    return share * ab + (1 - share) * torch_blur(ab, stage.sigma)


def torch_repair(ab: Tensor, confidence: Tensor, stage: Repair) -> Tensor:
    suspect = (ab.norm(dim=1, keepdim=True) >= stage.min_chroma) & (confidence < stage.max_confidence)
    trusted = confidence >= stage.max_confidence
    side = 2 * stage.radius + 1
    current = ab.clone()
    for _ in range(stage.sweeps):
        count = F.avg_pool2d(trusted.float(), side, 1, stage.radius, divisor_override=1)
        ready = suspect & (count >= stage.min_neighbours)
        if not ready.any():
            break
        total = F.avg_pool2d(torch.where(trusted, current, 0.0), side, 1, stage.radius, divisor_override=1)
        current = torch.where(ready, total / count, current)
        trusted = trusted | ready
        suspect = suspect & ~ready
    return torch.where(suspect, torch_blur(ab, stage.sigma), current)


# ---------------------------------------------------------------- the comparison

CONTESTANTS: dict[str, Callable[[Scene], Pixels]] = {
    "NumPy + OpenCV": numpy_version,
    "torch": torch_version,
    "ours": ours,
}
"""All from features."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=1024, help="of the picture, in pixels; a multiple of 32")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--memory-of", choices=CONTESTANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    scene = Scene(arguments.side)
    if arguments.memory_of:
        print(json.dumps(memory(CONTESTANTS[arguments.memory_of], scene)))
        return
    print(machine("torch", "numpy", "opencv-python-headless"), flush=True)
    check_pixels_agree(scene)
    logits, maps = numpy_logits(scene), torch_logits(scene)
    everyone: dict[str, Callable[[], object]] = {name: partial(run, scene) for name, run in CONTESTANTS.items()}
    everyone["NumPy + OpenCV, given the logits"] = lambda: numpy_version(scene, logits)
    everyone["torch, given the logits"] = lambda: torch_version(scene, maps)
    everyone["the head's matrix product alone"] = lambda: product(scene)
    times = take_turns(everyone, arguments.rounds)
    peaks = {name: peak_of(name, arguments.side) / scene.inputs_and_outputs for name in CONTESTANTS}
    rows = [
        [name, scene.megapixels / times.of(name), times.ratio("ours", name), peaks.get(name, "-")] for name in everyone
    ]
    print(table(["features to 8-bit RGB", "megapixels/s", "ours is faster by", "peak / (inputs + outputs)"], rows))
    for peer, goal in (("NumPy + OpenCV", NUMPY_GOAL), ("torch", TORCH_GOAL)):
        ratio = times.ratio("ours", peer)
        print(f"{ratio:.2f} times the speed of {peer} ({verdict(ratio, goal)})")
    peak = peaks["ours"]
    print(f"peak memory {peak:.2f} of inputs plus outputs ({verdict(peak, MEMORY_GOAL, at_most=True)})")


def check_pixels_agree(scene: Scene) -> None:
    """All contestants must paint the same picture: rounding may move a pixel by a level, rarely more."""
    reference = ours(scene).astype(int)
    for name, run in CONTESTANTS.items():
        difference = np.abs(run(scene).astype(int) - reference).max(axis=-1)
        share = float((difference <= 1).mean())
        print(f"{name}: {share:.4%} of the pixels within one level of ours, the worst {difference.max()}")
        if share < 0.999:
            raise SystemExit(f"{name} does not do the same work")


def peak_of(name: str, side: int) -> float:
    """Bytes at the peak in a process of its own, inputs and outputs included."""
    command = [sys.executable, "-m", "benchmarks.decode", "--side", str(side), "--memory-of", name]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(output.splitlines()[-1]))


def memory(run: Callable[[Scene], Pixels], scene: Scene) -> int:
    run(Scene(256))  # libraries have allocated what they keep
    before = resident()
    forget_peak()
    run(scene)
    return resident("VmHWM") - before + scene.features.nbytes + scene.lightness.nbytes


if __name__ == "__main__":
    main()
