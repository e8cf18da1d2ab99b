"""Evaluation over a set of photographs, for `train` and `evaluate`: scores per post-processing stage, and pictures.

Every rank scores its own share; sums and counts are all-reduced, and padding counts 0, so the table does not depend on
the world size.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dist_colorize.data import Batch, DataConfig
from dist_colorize.distributed import World
from dist_colorize.errors import Interrupted
from dist_colorize.files import write_atomically
from dist_colorize.metrics import METRICS
from dist_colorize.models.network import Network
from dist_colorize.postprocess.cpu import TorchBackend
from dist_colorize.postprocess.panel import captioned
from dist_colorize.postprocess.stages import Preset, decode_and_run

GRAY, RAW, FINAL, TRUTH = "gray", "raw", "final", "truth"
"""The first and the last stages, and the photograph itself."""
CAPTIONS = ("grayscale", "raw", "smoothed", "ground truth")
"""Over a panel's columns: `smoothed` is the final result."""

Picture = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    preset: str = "final"
    """Post-processing preset: a name in configs/postprocess, or a .yaml file."""
    batch: int = 8
    """Photographs per rank at a time."""
    pictures: int = 8
    """Photographs shown in panels and TensorBoard: the first of the validation set."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")
        if self.pictures < 0:
            raise ValueError(f"pictures must not be negative, got {self.pictures}")


@dataclass(frozen=True)
class Evaluation:
    scores: dict[str, dict[str, float]]
    """Stage -> metric -> mean over the photographs. Stages in order: gray (ab = 0), raw, ..., final."""
    count: int
    """Photographs that were scored."""
    pictures: list[dict[str, Picture]]
    """The first photographs, each as stage -> uint8 [H, W, 3], with TRUTH beside the stages. Empty but on rank 0."""

    def table(self) -> str:
        """The scores as text, a line per stage."""
        names = list(next(iter(self.scores.values())))
        units = {"psnr": "PSNR (dB)", "mse": "MSE (levels^2)"}
        lines = [f"{'':10}" + "".join(f"{units.get(name, name):>16}" for name in names)]
        lines += [f"{stage:10}" + "".join(f"{row[n]:16.2f}" for n in names) for stage, row in self.scores.items()]
        return "\n".join(lines)

    def panel(self) -> Picture:
        """All pictures in one, a row each: grayscale | raw | smoothed | ground truth, with captions."""
        columns = zip(CAPTIONS, (GRAY, RAW, FINAL, TRUTH), strict=True)
        return captioned([(text, np.concatenate([p[stage] for p in self.pictures])) for text, stage in columns])


@torch.inference_mode()
def evaluate(
    network: Network, batches: Iterable[Batch], preset: Preset, world: World, pictures: int = 0, stop: Any = None
) -> Evaluation:
    """Scores the network on batches of photographs (`data.evaluation_batches`); a collective call.

    `stop.requested` is agreed upon before every batch; raises Interrupted on all ranks when any was asked to stop.
    """
    backend = TorchBackend(world.device)
    sums: dict[str, Tensor] = {}
    count = torch.zeros((), dtype=torch.int64)
    shown: list[tuple[int, dict[str, Picture]]] = []
    for batch in batches:
        if stop is not None and world.agree(stop.requested):
            raise Interrupted("during evaluation")
        stages, truth = colourize(network, batch, preset, backend)
        real = batch.weight.cpu() > 0
        for name, picture in stages.items():
            row = torch.stack([metric(picture, truth)[real].sum() for metric in METRICS.values()])
            sums[name] = sums.get(name, 0) + row
        count += real.sum()
        for i in real.nonzero().flatten().tolist():
            row = int(batch.sample[i])
            if row < pictures:
                shown.append((row, {name: picture[i].numpy() for name, picture in (stages | {TRUTH: truth}).items()}))
    totals = world.sum_(torch.stack(list(sums.values())).to(world.device)).cpu()
    count = world.sum_(count.to(world.device)).cpu()
    # [stage, metric] / count
    means = (totals / count).tolist()
    scores = {name: dict(zip(METRICS, row, strict=True)) for name, row in zip(sums, means, strict=True)}
    gathered = sorted(
        (entry for entries in world.gather_objects(shown) for entry in entries), key=lambda entry: entry[0]
    )
    return Evaluation(scores, int(count), [images for _, images in gathered] if world.is_leader else [])


def colourize(
    network: Network, batch: Batch, preset: Preset, backend: TorchBackend
) -> tuple[dict[str, Tensor], Tensor]:
    """Pictures of every stage, name -> uint8 [B, H, W, 3] on the CPU, and the true ones."""
    assert network.head.bias is not None
    features = network.features(batch.L)
    # [313, 64, 1, 1] -> [313, 64]
    stages, _ = decode_and_run(preset, backend, features, network.head.weight.flatten(1), network.head.bias)
    # in a preset without stages, raw is also final
    named = {GRAY: torch.zeros_like(stages[0][1]), RAW: stages[0][1], **dict(stages[1:-1]), FINAL: stages[-1][1]}
    size = (batch.L.shape[-2], batch.L.shape[-1])

    def compose(ab: Tensor) -> Tensor:
        pictures = [backend.compose(L[0], one, size, 0, 8) for L, one in zip(batch.L, ab, strict=True)]
        return torch.stack(pictures).cpu()

    return {name: compose(ab) for name, ab in named.items()}, compose(batch.ab)


def protocol(data: DataConfig, preset: str) -> dict[str, Any]:
    """What the scores were computed on, in words: two tables compare only where this is the same."""
    source = "the training photographs" if data.val_root == data.root else "photographs that were not trained on"
    return {
        "data": data.val_root or data.root,
        "photographs_are": source,
        "size": data.crop,
        "preparation": f"short side resized to {data.crop} pixels, centre square cut out",
        "preset": preset,
        "psnr": "dB over 8-bit sRGB, mean of the photographs' values",
        "mse": "8-bit sRGB levels squared, mean of the photographs' values",
    }


def write_evaluation(run: Path, evaluation: Evaluation, protocol: Mapping[str, Any]) -> None:
    """Writes `evaluation.json` and `panels/final.png` into the run folder."""
    result = {"protocol": dict(protocol) | {"photographs": evaluation.count}, "scores": evaluation.scores}
    write_atomically(run / "evaluation.json", json.dumps(result, indent=2).encode() + b"\n")
    if evaluation.pictures:
        save_picture(run / "panels" / "final.png", evaluation.panel())


def save_picture(path: Path, picture: Picture) -> None:
    """Writes uint8 [H, W, 3] as a PNG, whole or not at all."""
    from io import BytesIO

    encoded = BytesIO()
    Image.fromarray(picture).save(encoded, format="PNG")
    write_atomically(path, encoded.getvalue())
