"""Tunes a preset on photographs whose colours are known: temperature, blend and splotch repair.

    python -m dist_colorize.postprocess tune --checkpoint runs/RUN                    # its validation photographs
    python -m dist_colorize.postprocess tune --checkpoint runs/RUN --data /photos/val --score ciede2000
    python -m dist_colorize.postprocess archive/ --preset runs/RUN/tuned.yaml         # and then

Half of the photographs is for tuning, the other half for judging: the gain is printed for the half that was held back,
with 95 % intervals. The network looks at each photograph once; what each temperature makes of it is kept, so a trial
costs the stages alone, some milliseconds. The optimiser is scipy's differential evolution, started from the preset.

Trials are scored on the grid of colours, with L averaged to it; the gain is measured on whole pictures, as in evaluate.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import differential_evolution
from torch import Tensor
from tqdm import tqdm

from dist_colorize import config, intervals, splotches
from dist_colorize.color.gamut import BINS
from dist_colorize.color.lab import lab_to_srgb
from dist_colorize.data import Batch, evaluation_batches, open_photographs
from dist_colorize.distributed import DistributedConfig, session
from dist_colorize.errors import Interrupted, UserError
from dist_colorize.evaluation import Evaluation, evaluate
from dist_colorize.files import write_atomically
from dist_colorize.metrics import LEAST_ERROR, METRICS
from dist_colorize.models.network import OUTPUT_STRIDE, Network
from dist_colorize.postprocess.cpu import TorchBackend
from dist_colorize.postprocess.stages import Preset, load_preset, preset_names, run
from dist_colorize.postprocess.trained import find_trained, newest_run
from dist_colorize.postprocess.tune_space import Space, as_yaml
from dist_colorize.recipe import Recipe
from dist_colorize.stopping import StopFlag

JUDGED = ("psnr", "ssim", "ciede2000", "colourfulness_difference", "blob", "xuce")
"""What the gain is printed in."""
LOCAL_BATCH = 8


class Trials:
    """Photographs ready to be scored again and again: what the network sees in them, and what they were."""

    def __init__(self, network: Network, batches: Iterable[Batch]) -> None:
        self.backend = TorchBackend()
        self.head = network.head.weight.flatten(1), network.head.bias
        features, levels, colours = [], [], []
        with torch.inference_mode():
            for batch in batches:
                features.append(network.features(batch.L))
                levels.append(F.avg_pool2d(batch.L, OUTPUT_STRIDE))
                colours.append(F.avg_pool2d(batch.ab, OUTPUT_STRIDE))
        self.features, self.lightness, self.ab = torch.cat(features), torch.cat(levels), torch.cat(colours)
        self.truth = self._rgb(self.ab)
        self.decoded = functools.cache(self._decode)
        """Temperature -> (ab, confidence)."""

    def run(self, preset: Preset) -> Tensor:
        """ab after all stages: [N, 2, h, w]."""
        with torch.inference_mode():
            return run(preset, self.backend, *self.decoded(preset.temperature))[-1][1]

    def psnr(self, ab: Tensor) -> float:
        error = (self._rgb(ab) - self.truth).square().flatten(1).mean(dim=1) * 255**2
        return float((10 * torch.log10(255**2 / error.clamp(min=LEAST_ERROR))).mean())

    def mse_ab(self, ab: Tensor) -> float:
        return float((ab - self.ab).square().mean())

    def ciede2000(self, ab: Tensor) -> float:
        from skimage.color import deltaE_ciede2000

        # [N, 3, h, w] -> [N, h, w, 3]
        pair = [torch.cat([self.lightness, one], dim=1).movedim(1, -1).numpy() for one in (ab, self.ab)]
        return float(deltaE_ciede2000(*pair).mean())

    def blob(self, ab: Tensor) -> float:
        return 100 * float(np.mean([splotches.blob(p.numpy(), t.numpy()) for p, t in zip(ab, self.ab, strict=True)]))

    def xuce(self, ab: Tensor) -> float:
        rows = zip(ab, self.ab, self.lightness, strict=True)
        return float(
            np.mean([splotches.unexplained_edges(p.numpy(), t.numpy(), level[0].numpy()) for p, t, level in rows])
        )

    def _decode(self, temperature: float) -> tuple[Tensor, Tensor]:
        weight, bias = self.head
        assert bias is not None
        return self.backend.decode(self.features, weight, bias, temperature)

    def _rgb(self, ab: Tensor) -> Tensor:
        return lab_to_srgb(torch.cat([self.lightness, ab], dim=1)).clamp(0, 1)


SCORES: dict[str, Callable[[Trials, Tensor], float]] = {
    "psnr": Trials.psnr,
    "mse_ab": Trials.mse_ab,
    "ciede2000": Trials.ciede2000,
    "blob": Trials.blob,
    "xuce": Trials.xuce,
}
"""What can be tuned for. blob and xuce alone are best served by no colour at all: look at the other gains as well."""


def search(
    trials: Trials, start: Preset, score: str, budget: int, seed: int = 0, stop: Callable[[], bool] = lambda: False
) -> tuple[Preset, float, float, int]:
    """(best preset, its score, the score of `start`, trials made). Never worse than `start` on these photographs.

    `stop` is asked before every trial; raises Interrupted.
    """
    space, sign, made = Space(start), METRICS[score].better, 0

    def cost(preset: Preset) -> float:
        return -sign * SCORES[score](trials, trials.run(preset))

    def trial(vector: np.ndarray) -> float:
        nonlocal made
        if stop():
            raise Interrupted("while tuning; nothing was written")
        made += 1
        bar.update()
        return cost(space.preset(vector.tolist()))

    bounds = space.bounds()
    people = 4
    rounds = max(1, budget // (people * len(bounds)) - 1)
    # a trial is some milliseconds of small tensors: threads would wait for each other longer than they compute
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tqdm(total=people * len(bounds) * (rounds + 1), unit="trial", mininterval=0.5) as bar:
            found = differential_evolution(
                trial,
                bounds,
                integrality=space.whole(),
                x0=space.vector(),
                popsize=people,
                maxiter=rounds,
                tol=1e-5,
                polish=False,
                init="latinhypercube",
                rng=np.random.default_rng(seed),
            )
    finally:
        torch.set_num_threads(threads)
    before, after = cost(start), float(found.fun)
    best = space.preset(found.x.tolist())
    if before <= after:  # `start` may lie between the points of the space
        best, after = start, before
    return best, -sign * after, -sign * before, made


def gains(tuned: Evaluation, start: Evaluation) -> str:
    """Start, tuned, and the paired difference with its interval, a line per metric."""
    lines = [f"{'':22}{'start':>10}{'tuned':>10}   gain [95 % interval]"]
    for name in JUDGED:
        one, other = (np.array([p.scores["final"][name] for p in result.photographs]) for result in (tuned, start))
        mean, low, high = intervals.mean_with_interval(one - other)
        better = METRICS[name].better
        sure = better and (low > 0 or high < 0)
        verdict = (
            "" if not better else "better" if sure and mean * better > 0 else "worse" if sure else "no clear change"
        )
        lines.append(
            f"{METRICS[name].label:22}{other.mean():>10.3f}{one.mean():>10.3f}   "
            f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]  {verdict}".rstrip()
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    start = load_preset(arguments.preset)
    trained = find_trained(arguments.checkpoint or newest_run(Path("runs")))
    if trained.run is None:
        raise UserError(f"{trained.file} lies in no run folder: tuning needs the run's config.yaml")
    network: Network = trained.network
    if len(network.head.weight) != BINS:
        raise UserError(f"{trained.run}: its network predicts ab itself and is never unsure: there is nothing to tune")
    output = arguments.output or trained.run / "tuned.yaml"
    overrides = [] if arguments.data is None else [f"data.val_root={arguments.data}"]
    recipe = config.load(Recipe, trained.run / "config.yaml", overrides)
    with session(DistributedConfig(device="cpu")) as world, StopFlag() as stop:
        _, validation = open_photographs(recipe.data, world, stop)
        validation = validation.rows(0, min(len(validation), arguments.photographs))
        if len(validation) < 2:
            raise UserError("--data: tuning needs two photographs at least, one to tune on and one to judge by")
        # rows lie in random order, so the halves are random too
        half = (len(validation) + 1) // 2
        tuning, judging = validation.rows(0, half), validation.rows(half, len(validation))
        trials = Trials(network, evaluation_batches(tuning, recipe.data, world, 1))
        began = time.monotonic()
        best, after, before, made = search(
            trials, start, arguments.score, arguments.trials, arguments.seed, lambda: stop.requested
        )
        each = 1000 * (time.monotonic() - began) / made
        label = METRICS[arguments.score].label
        print(f"{made} trials, {each:.1f} ms each; {label} on the tuning half: {before:.3f} -> {after:.3f}")
        results = [
            evaluate(
                network,
                evaluation_batches(judging, recipe.data, world, min(LOCAL_BATCH, len(judging))),
                preset,
                world,
                0,
                stop,
                torch.ones(BINS),
            )
            for preset in (best, start)
        ]
    text = gains(*results)
    comment = (
        f"Tuned for {arguments.score} from preset {arguments.preset}, on {half} photographs at {recipe.data.crop} px"
    )
    write_atomically(output, as_yaml(best, f"{comment}; on the {len(judging)} held back:\n{text}").encode())
    print(f"on the {len(judging)} photographs held back:\n{text}\npreset: {output}", flush=True)


def _parser() -> argparse.ArgumentParser:
    what, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m dist_colorize.postprocess tune",
        description=what,
        epilog=f"examples:\n\n{more}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="RUN", help="run folder (default: newest in ./runs)")
    add("--data", metavar="VAL", help="folder of colour photographs (default: the run's validation photographs)")
    add(
        "--preset", default="final", metavar="NAME|FILE", help=f"starting point: {', '.join(preset_names())}, or a file"
    )
    add("--score", default="psnr", choices=list(SCORES), help="what to tune for (default: %(default)s)")
    add("--trials", type=int, default=400, help="about so many (default: %(default)s)")
    add("--photographs", type=int, default=64, help="at most so many, both halves together (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the optimiser (default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help="the preset that is written (default: RUN/tuned.yaml)")
    return parser
