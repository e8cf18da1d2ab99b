"""Evaluation over a set of photographs, for `train` and `evaluate`: scores per post-processing stage, and pictures.

Every rank scores its own share of the photographs; the scores of each photograph are gathered, put in the order of the
photographs and only then averaged. Padding is computed with the rest of its batch and dropped afterwards: a photograph
has the same place in the same batch at any world size. So on a CPU the table is the same to the bit at any world size
with the same `evaluate.batch` and `distributed.threads`; on a GPU it is the same up to rounding.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dist_colorize import intervals, metrics
from dist_colorize.color.gamut import Gamut
from dist_colorize.data import Batch, DataConfig
from dist_colorize.distributed import World
from dist_colorize.errors import Interrupted, RunFailed
from dist_colorize.files import write_atomically
from dist_colorize.metrics import METRICS
from dist_colorize.models.network import Network
from dist_colorize.postprocess.cpu import TorchBackend
from dist_colorize.postprocess.panel import captioned
from dist_colorize.postprocess.stages import Preset
from dist_colorize.scoring import FINAL, GRAY, RAW, TRUTH, Picture, Scored, Scores, score

CAPTIONS = ("grayscale", "raw", "smoothed", "ground truth")
"""Over a panel's columns: `smoothed` is the final result."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    preset: str = "final"
    """Post-processing preset: a name in configs/postprocess, or a .yaml file."""
    batch: int = 8
    """Photographs per rank at a time. Another number can change the last bits of the scores."""
    pictures: int = 8
    """Photographs shown in panels, reports and TensorBoard: the first of the validation set."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")
        if self.pictures < 0:
            raise ValueError(f"pictures must not be negative, got {self.pictures}")


@dataclass(frozen=True)
class Evaluation:
    photographs: list[Scored]
    """In the order of the validation set, the same on every rank; pictures only on rank 0."""

    @property
    def count(self) -> int:
        """Photographs that were scored."""
        return len(self.photographs)

    @property
    def pictures(self) -> list[dict[str, Picture]]:
        """The first photographs, each as stage -> uint8 [H, W, 3], with TRUTH beside the stages; on rank 0."""
        return [one.pictures for one in self.photographs if one.pictures]

    @cached_property
    def scores(self) -> Scores:
        """Stage -> metric -> mean over the photographs. Stages in order: gray (ab = 0), raw, ..., final."""
        values, weights = self._values(), self._weights()
        return self._by_stage((values * weights).sum(axis=0) / weights.sum(axis=0))

    @cached_property
    def intervals(self) -> dict[str, dict[str, tuple[float, float]]]:
        """Stage -> metric -> 95 % bootstrap interval of the mean; see dist_colorize.intervals."""
        ends = intervals.interval(intervals.resampled_means(self._values(), self._weights()))
        low, high = (self._by_stage(end) for end in ends)
        return {stage: {name: (low[stage][name], high[stage][name]) for name in row} for stage, row in low.items()}

    @cached_property
    def classifier(self) -> dict[str, tuple[float, float, float]]:
        """top1, top5, ece in %, each with its interval (value, low, high); empty where the network is no classifier."""
        if any(one.calibration is None for one in self.photographs):
            return {}
        hits = np.array([[one.classifier["top1"], one.classifier["top5"]] for one in self.photographs])
        low, high = intervals.interval(intervals.resampled_means(hits))
        found = {
            name: (float(hits[:, i].mean()), float(low[i]), float(high[i])) for i, name in enumerate(("top1", "top5"))
        }
        # [N, 15, 3] -> [N, 45]: sums of cells, confidence and right ones are resampled, the error is taken of the sums
        bins = np.array([one.calibration for one in self.photographs])
        sums = intervals.resampled_means(bins.reshape(len(bins), -1)).reshape(-1, *bins.shape[1:])
        error = 100 * float(metrics.calibration_error(bins.sum(axis=0)))
        low, high = intervals.interval(100 * metrics.calibration_error(sums))
        return found | {"ece": (error, float(low), float(high))}

    def table(self) -> str:
        """The scores as text: a line per metric, a column per stage, with 95 % intervals."""
        stages = list(self.scores)
        lines = [f"{'':20}" + "".join(f"{stage:>25}" for stage in stages)]
        for name in self.scores[RAW]:
            cells = [_cell(self.scores[s][name], *self.intervals[s][name]) for s in stages]
            lines.append(f"{METRICS[name].label:20}" + "".join(f"{cell:>25}" for cell in cells))
        for name, facts in self.classifier.items():
            lines.append(f"{METRICS[name].label:20}" + f"{'':25}" + f"{_cell(*facts):>25}")
        return "\n".join(lines)

    def panel(self) -> Picture:
        """All pictures in one, a row each: grayscale | raw | smoothed | ground truth, with captions."""
        columns = zip(CAPTIONS, (GRAY, RAW, FINAL, TRUTH), strict=True)
        return captioned([(text, np.concatenate([p[stage] for p in self.pictures])) for text, stage in columns])

    def _columns(self) -> list[tuple[str, str]]:
        return [(stage, name) for stage, row in self.photographs[0].scores.items() for name in row]

    def _values(self) -> NDArray[np.float64]:
        """[photographs, columns]."""
        columns = self._columns()
        return np.array([[one.scores[stage][name] for stage, name in columns] for one in self.photographs])

    def _weights(self) -> NDArray[np.float64]:
        """[photographs, columns]: 1, and the rarity of the photograph's colours for the rebalanced AuC."""
        rarity = np.array([[one.rarity] for one in self.photographs])
        rebalanced = np.array([name == "auc_rebalanced" for _, name in self._columns()])
        return np.where(rebalanced, rarity, 1.0)

    def _by_stage(self, row: NDArray[np.float64]) -> Scores:
        table: Scores = {}
        for (stage, name), value in zip(self._columns(), row.tolist(), strict=True):
            table.setdefault(stage, {})[name] = value
        return table


def _cell(value: float, low: float, high: float) -> str:
    digits = 3 if abs(value) < 2 else 2 if abs(value) < 1000 else 1
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


@torch.inference_mode()
def evaluate(
    network: Network,
    batches: Iterable[Batch],
    preset: Preset,
    world: World,
    pictures: int = 0,
    stop: Any = None,
    bin_weights: Tensor | None = None,
) -> Evaluation:
    """Scores the network on batches of photographs (`data.evaluation_batches`); a collective call.

    Without `bin_weights` PSNR and MSE alone, which is quick; with them (float32 [313], rarity of the bins, for the
    rebalanced AuC) every metric. `stop.requested` is agreed upon before every batch; raises Interrupted on all ranks
    when any was asked to stop.
    """
    backend = TorchBackend(world.device)
    gamut = Gamut().to(world.device)
    mine: list[Scored] = []
    with ThreadPoolExecutor(max(1, world.threads)) as pool:
        for batch in batches:
            if stop is not None and world.agree(stop.requested):
                raise Interrupted("during evaluation")
            if batch.weight.any():
                mine += score(network, batch, preset, backend, gamut, pictures, bin_weights, pool)
    everyone = world.gather_objects(mine)
    photographs = sorted((one for theirs in everyone for one in theirs), key=lambda one: one.sample)
    if not photographs:
        raise RunFailed("none of the validation photographs could be read; see data.val_root", shared=True)
    return Evaluation(photographs)


def protocol(data: DataConfig, preset: str) -> dict[str, Any]:
    """What the scores were computed on, in words: two tables compare only where this is the same."""
    source = "the training photographs" if data.val_root == data.root else "photographs that were not trained on"
    if data.val_root is None and not data.val_fraction:
        source = "the training photographs"
    return {
        "data": data.val_root or data.root,
        "photographs_are": source,
        "size": data.crop,
        "preparation": f"largest centre square, resized to {data.crop} x {data.crop} pixels",
        "preset": preset,
        "mean": "over the photographs' values; intervals: 95 % bootstrap over photographs, "
        f"{intervals.RESAMPLES} resamples",
    }


def write_evaluation(run: Path, evaluation: Evaluation, protocol: Mapping[str, Any]) -> None:
    """Writes `evaluation.json` and `panels/final.png` into the run folder."""
    names = [*evaluation.scores[RAW], *evaluation.classifier]
    result = {
        "protocol": dict(protocol)
        | {"photographs": evaluation.count}
        | {name: METRICS[name].meaning for name in names},
        "scores": evaluation.scores,
        "intervals": evaluation.intervals,
    }
    if evaluation.classifier:
        result["classifier"] = {name: facts[0] for name, facts in evaluation.classifier.items()}
        result["classifier_intervals"] = {name: facts[1:] for name, facts in evaluation.classifier.items()}
    write_atomically(run / "evaluation.json", json.dumps(result, indent=2).encode() + b"\n")
    if evaluation.pictures:
        save_picture(run / "panels" / "final.png", evaluation.panel())


def save_picture(path: Path, picture: Picture) -> None:
    """Writes uint8 [H, W, 3] as a PNG, whole or not at all."""
    from io import BytesIO

    encoded = BytesIO()
    Image.fromarray(picture).save(encoded, format="PNG")
    write_atomically(path, encoded.getvalue())
