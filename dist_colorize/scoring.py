"""Scores of one batch of photographs: what the network makes of them at every stage, against what they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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


Columns = dict[tuple[str, str], Tensor]
"""(stage, metric) -> float64 [B], on the device."""


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
    """The photographs of a batch. Without `bin_weights` PSNR and MSE alone, see evaluation.evaluate.

    A library chooses its algorithm by the shapes of the operands, and another algorithm gives other last bits. So what
    takes the batch as a whole always takes all of it, padding included, and what came of padding is dropped afterwards;
    what takes one photograph at a time skips padding.
    """
    real = [slot for slot, weight in enumerate(batch.weight.tolist()) if weight > 0]
    colours = colourize(network, batch, preset, backend)
    columns = _picture_columns(colours)
    rarity = torch.ones(len(batch.L), dtype=torch.float64, device=batch.L.device)
    slow: list[dict[tuple[str, str], float]] = [{} for _ in real]
    classifier: list[tuple[dict[str, float], NDArray[np.float64] | None]] = [({}, None) for _ in real]
    if bin_weights is not None:
        # [B, H, W]: what each true pixel's color weighs
        weight = bin_weights.to(batch.ab.device, torch.float64)[gamut.nearest(batch.ab).long()]
        rarity = weight.mean(dim=(1, 2))
        size = (batch.L.shape[-2], batch.L.shape[-1])
        whole = {
            stage: F.interpolate(ab, size, mode="bilinear", align_corners=False) for stage, ab in colours.ab.items()
        }
        columns |= _ab_columns(whole, batch.ab, weight)
        slow = _slow_columns(colours, whole, batch, real, pool)
        if len(network.head.weight) == BINS:
            labels = gamut.nearest(F.avg_pool2d(batch.ab, OUTPUT_STRIDE)).long()
            classifier = [
                _classifier_scores(network, colours.features[slot], labels[slot], colours.confidence[slot])
                for slot in real
            ]
    # [columns + 1, B]: one copy from the device for all of them
    *values, rarities = torch.stack([*columns.values(), rarity]).tolist()
    result = []
    for slot, one, facts in zip(real, slow, classifier, strict=True):
        row = {column: value[slot] for column, value in zip(columns, values, strict=True)} | one
        scores = {stage: {name: row[stage, name] for name in METRICS if (stage, name) in row} for stage in colours.ab}
        sample = int(batch.sample[slot])
        shown = colours.shown(slot) if sample < pictures else ({}, None)
        result.append(Scored(sample, scores, rarities[slot], *facts, *shown))
    return result


def _picture_columns(colours: Colours) -> Columns:
    columns: Columns = {}
    for stage in colours.ab:
        error = metrics.mse(colours.pictures[stage], colours.pictures[TRUTH])
        columns |= {(stage, "psnr"): metrics.psnr(error), (stage, "mse"): error}
    return columns


def _ab_columns(whole: Mapping[str, Tensor], truth: Tensor, weight: Tensor) -> Columns:
    """Stage -> ab [B, 2, H, W], true ab [B, 2, H, W], weight [B, H, W] of the true colors."""
    columns: Columns = {}
    for stage, ab in whole.items():
        near, error = metrics.within(ab, truth), metrics.mse_ab(ab, truth)
        columns |= {
            (stage, "psnr_ab"): metrics.psnr(error),
            (stage, "mse_ab"): error,
            (stage, "auc"): 100 * near.mean(dim=(1, 2)),
            (stage, "auc_rebalanced"): 100 * (near * weight).sum(dim=(1, 2)) / weight.sum(dim=(1, 2)),
        }
    return columns


def _slow_columns(
    colours: Colours, whole: Mapping[str, Tensor], batch: Batch, real: Sequence[int], pool: ThreadPoolExecutor
) -> list[dict[tuple[str, str], float]]:
    """For each photograph (stage, metric) -> value: what numpy computes photograph by photograph, in threads."""
    rows: list[dict[tuple[str, str], float]] = [{} for _ in real]
    truth, true_ab, lightness = (t.cpu().numpy() for t in (colours.pictures[TRUTH], batch.ab, batch.L[:, 0]))
    for stage, ab in whole.items():
        arrays = colours.pictures[stage].cpu().numpy(), truth, ab.cpu().numpy(), true_ab, lightness
        tasks = ([array[slot] for array in arrays] for slot in real)
        for row, facts in zip(rows, pool.map(_slow_scores, tasks), strict=True):
            row |= {(stage, name): value for name, value in facts.items()}
    return rows


def _slow_scores(task: Sequence[NDArray[Any]]) -> dict[str, float]:
    """Of one photograph: (picture, truth, ab, true ab, L)."""
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
    """Stage, and TRUTH -> uint8 [B, H, W, 3], where the network is."""

    def shown(self, slot: int) -> tuple[dict[str, Picture], Picture]:
        """Pictures and confidence of one photograph, see Scored."""
        pictures = {stage: whole[slot].cpu().numpy() for stage, whole in self.pictures.items()}
        return pictures, self.confidence[slot].mul(255).round().byte().cpu().numpy()


def colourize(network: Network, batch: Batch, preset: Preset, backend: TorchBackend) -> Colours:
    """Colours and pictures of every stage."""
    assert network.head.bias is not None
    features = network.features(batch.L)
    # [C, 64, 1, 1] -> [C, 64]
    stages, confidence = decode_and_run(preset, backend, features, network.head.weight.flatten(1), network.head.bias)
    # in a preset without stages, raw is also final
    named = {GRAY: torch.zeros_like(stages[0][1]), RAW: stages[0][1], **dict(_numbered(stages[1:-1]))}
    named[FINAL] = stages[-1][1]
    pictures = {name: backend.pictures(batch.L, ab) for name, ab in [*named.items(), (TRUTH, batch.ab)]}
    return Colours(features, named, confidence, pictures)


def _numbered(stages: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The stages with a number behind a label that came before: blended, blended2."""
    seen: dict[str, int] = {}
    for label, ab in stages:
        seen[label] = seen.get(label, 0) + 1
        yield label if seen[label] == 1 else f"{label}{seen[label]}", ab
