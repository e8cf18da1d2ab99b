"""Scores of one batch of photographs: what the network makes of them at every stage, against what they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dist_colorize import metrics
from dist_colorize.color.gamut import BINS, Gamut
from dist_colorize.data import Batch
from dist_colorize.metrics import METRICS
from dist_colorize.models.network import OUTPUT_STRIDE, Network
from dist_colorize.postprocess.cpu import TorchBackend
from dist_colorize.postprocess.stages import Preset, decode_and_run

GRAY, RAW, FINAL, TRUTH = "gray", "raw", "final", "truth"
"""The first and the last stages, and the photograph itself."""
ROWS = 4096
"""Cells whose logits exist at a time when the likeliest bins are looked for."""

Picture = NDArray[np.uint8]
Scores = dict[str, dict[str, float]]
"""Stage -> metric -> value."""


@dataclass(frozen=True)
class Scored:
    """What is known of one photograph."""

    sample: int
    """Its row in the validation set."""
    scores: Scores
    """Stage -> metric -> value."""
    rarity: float = 1.0
    """Mean class weight of its pixels: what it weighs in the rebalanced AuC."""
    classifier: Mapping[str, float] = field(default_factory=dict)
    """top1 and top5 in %, of a network that classifies."""
    calibration: NDArray[np.float64] | None = None
    """metrics.calibration of a network that classifies: [15, 3]."""
    pictures: dict[str, Picture] = field(default_factory=dict)
    """Stage -> uint8 [H, W, 3], with TRUTH beside the stages; for the first photographs only."""
    confidence: Picture | None = None
    """uint8 [h, w], 255 is 1.0; beside `pictures`."""


def score(
    network: Network,
    batch: Batch,
    preset: Preset,
    backend: TorchBackend,
    gamut: Gamut,
    pictures: int,
    bin_weights: Tensor | None,
    pool: ThreadPoolExecutor,
) -> list[Scored]:
    """The photographs of a batch without padding. Without `bin_weights` PSNR and MSE alone, see evaluation.evaluate."""
    colours = colourize(network, batch, preset, backend)
    truth = colours.pictures[TRUTH]
    columns: dict[str, dict[str, list[float]]] = {}
    for stage in colours.ab:
        error = metrics.mse(colours.pictures[stage], truth)
        columns[stage] = {"psnr": metrics.psnr(error).tolist(), "mse": error.tolist()}
    rarity = [1.0] * len(batch.L)
    classifier: list[tuple[dict[str, float], NDArray[np.float64] | None]] = [({}, None)] * len(batch.L)
    if bin_weights is not None:
        # [B, H, W]: what each true pixel's colour weighs
        weight = bin_weights.to(batch.ab.device, torch.float64)[gamut.nearest(batch.ab).long()]
        rarity = weight.mean(dim=(1, 2)).tolist()
        for stage, ab in colours.ab.items():
            whole = F.interpolate(ab, batch.ab.shape[-2:], mode="bilinear", align_corners=False)
            near = metrics.within(whole, batch.ab)
            error = metrics.mse_ab(whole, batch.ab)
            columns[stage] |= {
                "psnr_ab": metrics.psnr(error).tolist(),
                "mse_ab": error.tolist(),
                "auc": (100 * near.mean(dim=(1, 2))).tolist(),
                "auc_rebalanced": (100 * (near * weight).sum(dim=(1, 2)) / weight.sum(dim=(1, 2))).tolist(),
            }
            tasks = zip(
                colours.pictures[stage].numpy(),
                truth.numpy(),
                whole.cpu().numpy(),
                batch.ab.cpu().numpy(),
                batch.L[:, 0].cpu().numpy(),
                strict=True,
            )
            for facts in pool.map(_slow_scores, tasks):
                for name, value in facts.items():
                    columns[stage].setdefault(name, []).append(value)
        if len(network.head.weight) == BINS:
            labels = gamut.nearest(F.avg_pool2d(batch.ab, OUTPUT_STRIDE)).long()
            classifier = [
                _classifier_scores(network, *one)
                for one in zip(colours.features, labels, colours.confidence, strict=True)
            ]
    result = []
    order = [name for name in METRICS if name in columns[RAW]]
    for i, sample in enumerate(batch.sample.tolist()):
        shown = sample < pictures
        result.append(
            Scored(
                sample,
                {stage: {name: rows[name][i] for name in order} for stage, rows in columns.items()},
                rarity[i],
                *classifier[i],
                pictures={stage: picture[i].numpy() for stage, picture in colours.pictures.items()} if shown else {},
                confidence=colours.confidence[i].mul(255).round().byte().cpu().numpy() if shown else None,
            )
        )
    return result


def _slow_scores(task: tuple[Picture, Picture, NDArray[Any], NDArray[Any], NDArray[Any]]) -> dict[str, float]:
    """What numpy computes photograph by photograph, in threads: (picture, truth, ab, true ab, L)."""
    from dist_colorize import splotches  # scipy.ndimage is slow to import; training evaluates at its end

    picture, truth, ab, true_ab, lightness = task
    colours = metrics.colourfulness(picture)
    return {
        "ssim": metrics.ssim(picture, truth),
        "ciede2000": metrics.ciede2000(picture, truth),
        "colourfulness": colours,
        "colourfulness_difference": colours - metrics.colourfulness(truth),
        "blob": 100 * splotches.blob(ab, true_ab),
        "xuce": splotches.unexplained_edges(ab, true_ab, lightness),
    }


def _classifier_scores(
    network: Network, features: Tensor, labels: Tensor, confidence: Tensor
) -> tuple[dict[str, float], NDArray[np.float64]]:
    """features [64, h, w], labels [h, w], confidence [h, w] of one photograph -> top1 and top5 in %, calibration."""
    assert network.head.bias is not None
    weight, bias = network.head.weight.flatten(1).float(), network.head.bias.float()
    # [64, h, w] -> [h * w, 64]
    cells = features.flatten(1).T.float()
    likeliest = torch.cat([F.linear(part, weight, bias).topk(5, dim=1).indices for part in cells.split(ROWS)])
    hits = likeliest == labels.flatten()[:, None]
    found = {"top1": 100 * hits[:, 0].double().mean().item(), "top5": 100 * hits.any(dim=1).double().mean().item()}
    return found, metrics.calibration(confidence.flatten(), hits[:, 0]).cpu().numpy()


@dataclass(frozen=True)
class Colours:
    """What the network and the stages make of a batch of B photographs."""

    features: Tensor
    """[B, 64, h, w]."""
    ab: dict[str, Tensor]
    """Stage -> [B, 2, h, w], from GRAY and RAW to FINAL."""
    confidence: Tensor
    """[B, h, w]."""
    pictures: dict[str, Tensor]
    """Stage, and TRUTH -> uint8 [B, H, W, 3] on the CPU."""


def colourize(network: Network, batch: Batch, preset: Preset, backend: TorchBackend) -> Colours:
    """Colours and pictures of every stage."""
    assert network.head.bias is not None
    features = network.features(batch.L)
    # [C, 64, 1, 1] -> [C, 64]
    stages, confidence = decode_and_run(preset, backend, features, network.head.weight.flatten(1), network.head.bias)
    # in a preset without stages, raw is also final
    named = {GRAY: torch.zeros_like(stages[0][1]), RAW: stages[0][1], **dict(_numbered(stages[1:-1]))}
    named[FINAL] = stages[-1][1]
    size = (batch.L.shape[-2], batch.L.shape[-1])

    def compose(ab: Tensor) -> Tensor:
        pictures = [backend.compose(L[0], one, size, 0, 8) for L, one in zip(batch.L, ab, strict=True)]
        return torch.stack(pictures).cpu()

    pictures = {name: compose(ab) for name, ab in named.items()} | {TRUTH: compose(batch.ab)}
    return Colours(features, named, confidence, pictures)


def _numbered(stages: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The stages with a number behind a label that came before: blended, blended2."""
    seen: dict[str, int] = {}
    for label, ab in stages:
        seen[label] = seen.get(label, 0) + 1
        yield label if seen[label] == 1 else f"{label}{seen[label]}", ab
