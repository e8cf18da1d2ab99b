"""Every method and every preset on the same photographs, seeds and steps: one table, and what it says of the claims.

    python benchmarks/compare_methods.py                                  # sample photographs, two CPU cores
    python benchmarks/compare_methods.py --ranks 8 --seeds 0 1 2 --full data.root=/photos data.val_root=/val

Trains configs/methods/*.yaml (small, unless --full), scores each network after each preset of configs/postprocess, and
writes comparison.md and comparison.json into --output. A method that has finished there is not trained again.

Intervals: 95 % bootstrap over photographs, a photograph's scores averaged over the seeds first. Differences are paired:
the same photographs on both sides. A claim holds when its whole interval lies on the claimed side of 0.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dist_colorize import config, intervals
from dist_colorize.distributed import DistributedConfig, session
from dist_colorize.errors import UserError, run_command
from dist_colorize.evaluate import score
from dist_colorize.evaluation import Evaluation, protocol
from dist_colorize.hardware import usable_cores
from dist_colorize.metrics import METRICS
from dist_colorize.models import METHODS
from dist_colorize.postprocess.stages import preset_names
from dist_colorize.recipe import Recipe
from dist_colorize.resources import resource
from dist_colorize.run_facts import read_run
from dist_colorize.stopping import StopFlag

SMALL = (
    "data.root=sample-photographs",
    "data.val_root=sample-photographs",
    "data.crop=96",
    "model.encoder=scratch",
    "model.width=0.25",
    "train.steps=100",
    "train.global_batch=16",
    "train.lr=2e-3",
    "train.warmup=10",
    "train.ema=null",
    "train.validate_every=0",
)
"""What two CPU cores can do: the quickstart's photographs, size and width."""
SHOWN = ("psnr", "ssim", "ciede2000", "colourfulness_difference", "auc_rebalanced", "blob", "xuce")
RAW_PRESET = "temperature"
"""What post-processing is measured against: the same temperature, no stage."""

Key = tuple[str, str]
"""(method, preset)."""
Columns = dict[Key, dict[str, NDArray[np.float64]]]
"""Metric -> a value per photograph, for each method and preset."""


@dataclass(frozen=True)
class Claim:
    """`better` is said to exceed `worse` in a metric (sign 1) or to stay below it (-1)."""

    text: str
    metric: str
    better: Key
    worse: Key
    sign: int


CLAIMS = (
    Claim("classification is sharper than regression: more colourful", "colourfulness",
          ("classification", RAW_PRESET), ("mse", "none"), 1),
    Claim("rebalancing and skips serve rare colours", "auc_rebalanced",
          ("final", RAW_PRESET), ("classification", RAW_PRESET), 1),
    Claim("soft targets raise PSNR over hard ones", "psnr", ("final_soft", RAW_PRESET), ("final", RAW_PRESET), 1),
    Claim("regression has the higher PSNR", "psnr", ("mse", "none"), ("classification", RAW_PRESET), 1),
    Claim("post-processing raises PSNR over the raw classifier", "psnr", ("final", "final"), ("final", RAW_PRESET), 1),
    Claim("splotches fall (BLOB)", "blob", ("final", "final"), ("final", RAW_PRESET), -1),
    Claim("splotches fall (xUCE)", "xuce", ("final", "final"), ("final", RAW_PRESET), -1),
    Claim("plain blur over-smooths: less colourful", "colourfulness", ("final", "blur"), ("final", RAW_PRESET), -1),
    Claim("the final pipeline beats plain blur in PSNR", "psnr", ("final", "final"), ("final", "blur"), 1),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    overrides = [*(() if arguments.full else SMALL), *arguments.overrides]
    started = time.monotonic()
    took = {
        (method, seed): train(method, seed, overrides, output, arguments.ranks)
        for method in arguments.methods
        for seed in arguments.seeds
    }
    tables: dict[Key, list[Evaluation]] = {}
    with session(DistributedConfig(device=arguments.device)) as world, StopFlag() as stop:
        for method in arguments.methods:
            # a regressor's confidence is 1 everywhere: every preset leaves its colours as they are
            for preset in ["none"] if METHODS[method].outputs == 2 else arguments.presets:
                for seed in arguments.seeds:
                    run = folder(output, method, seed)
                    recipe = config.load(
                        Recipe, run / "config.yaml", [f"evaluate.preset={preset}", "evaluate.pictures=0"]
                    )
                    result, _ = score(run, recipe, world, stop)
                    tables.setdefault((method, preset), []).append(result)
                print(f"scored {method}, {preset}", file=sys.stderr, flush=True)
    how = protocol(recipe.data, "see table") | {"photographs": result.count, "seeds": arguments.seeds}
    how |= {"steps": recipe.train.steps, "global_batch": recipe.train.global_batch, "width": recipe.model.width}
    how |= {"encoder": recipe.model.encoder, "machine": machine(), "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    how["seconds"] = {
        "training, those not finished before": {
            f"{method}, seed {seed}": round(t) for (method, seed), t in took.items() if t
        },
        "all": round(time.monotonic() - started),
    }
    columns = {key: per_photograph(results) for key, results in tables.items()}
    found = []
    for claim in CLAIMS:
        if {claim.better, claim.worse} <= columns.keys():
            ends = summary(columns, claim.metric, claim.better, claim.worse)
            found.append((claim, ends, verdict(claim, *ends[1:])))
    text = markdown(columns, found, how)
    (output / "comparison.md").write_text(text, encoding="utf-8")
    facts = {
        "protocol": how,
        "table": {
            "/".join(key): {m: summary(columns, m, key) for m in METRICS if m in columns[key]} for key in columns
        },
        "claims": [{"claim": c.text, "metric": c.metric, "difference": d, "verdict": v} for c, d, v in found],
    }
    (output / "comparison.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(text)


def folder(output: Path, method: str, seed: int) -> Path:
    return output / f"{method}-seed{seed}"


def train(method: str, seed: int, overrides: Sequence[str], output: Path, ranks: int) -> float:
    """Trains a method, or goes on where it was cut off; the seconds it took, 0 when it had finished before."""
    run = folder(output, method, seed)
    known = read_run(run)
    if known is not None and known.state == "finished":
        return 0.0
    print(f"training {method}, seed {seed}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += ["-m", "dist_colorize.train", "--config", str(resource("configs", "methods") / f"{method}.yaml")]
    command += [*overrides, f"train.seed={seed}", f"run.dir={run}"]
    start = time.monotonic()
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise UserError(f"training {method} failed with exit code {done.returncode}: see above, and {run}")
    return time.monotonic() - start


def per_photograph(results: Sequence[Evaluation]) -> dict[str, NDArray[np.float64]]:
    """Metric -> value of each photograph after all stages, the mean over seeds: float64 [photographs]; rarity."""
    names = results[0].scores["final"]
    columns = {
        name: np.mean([[one.scores["final"][name] for one in result.photographs] for result in results], axis=0)
        for name in names
    }
    return columns | {"rarity": np.array([one.rarity for one in results[0].photographs])}


def summary(columns: Columns, metric: str, key: Key, minus: Key | None = None) -> tuple[float, float, float]:
    """(mean, low, high) of a metric, or of its paired difference; as evaluation weighs photographs."""
    values = columns[key][metric] - (0 if minus is None else columns[minus][metric])
    return intervals.mean_with_interval(values, columns[key]["rarity"] if metric == "auc_rebalanced" else None)


def verdict(claim: Claim, low: float, high: float) -> str:
    low, high = sorted((claim.sign * low, claim.sign * high))
    return "holds" if low > 0 else "does not hold: the opposite" if high < 0 else "not shown"


def markdown(
    columns: Columns, found: Sequence[tuple[Claim, tuple[float, float, float], str]], how: dict[str, object]
) -> str:
    lines = [
        "| method | preset | " + " | ".join(METRICS[name].label for name in SHOWN) + " |",
        "|---|---|" + "---|" * len(SHOWN),
    ]
    for key in columns:
        cells = []
        for name in SHOWN:
            mean, low, high = summary(columns, name, key)
            cells.append(f"{mean:.{digits(name)}f} [{low:.{digits(name)}f}, {high:.{digits(name)}f}]")
        lines.append(f"| {key[0]} | {key[1]} | " + " | ".join(cells) + " |")
    lines += ["", "| claim | measured as | difference [95 % interval] | verdict |", "|---|---|---|---|"]
    for claim, (mean, low, high), holds in found:
        n = digits(claim.metric)
        sides = f"{METRICS[claim.metric].label}, {'/'.join(claim.better)} minus {'/'.join(claim.worse)}"
        lines.append(f"| {claim.text} | {sides} | {mean:+.{n}f} [{low:+.{n}f}, {high:+.{n}f}] | {holds} |")
    lines += ["", *(f"- {name.replace('_', ' ')}: {value}" for name, value in how.items())]
    return "\n".join(lines) + "\n"


def digits(metric: str) -> int:
    return 3 if metric in ("ssim", "blob", "xuce") else 1 if metric.startswith("colourf") else 2


def machine() -> str:
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{platform.system()} {platform.machine()}, {usable_cores()} cores{gpu}, torch {torch.__version__}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    what, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=what, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="key=value", help="settings for all methods")
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="default: all")
    add("--presets", nargs="+", default=sorted(preset_names(), key=order), help="default: all")
    add("--seeds", nargs="+", type=int, default=[0], help="each method is trained once a seed (default: 0)")
    add("--ranks", type=int, default=2, help="processes under torchrun (default: %(default)s)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where the networks are scored")
    add("--full", action="store_true", help="train the recipes as they stand in configs/methods")
    add("--output", type=Path, default=Path("runs/compare_methods"), help="default: %(default)s")
    return parser.parse_intermixed_args(argv)


def order(preset: str) -> tuple[bool, bool, str]:
    """none and temperature first, final last."""
    return preset == "final", preset not in ("none", RAW_PRESET), preset


if __name__ == "__main__":
    run_command(main)
