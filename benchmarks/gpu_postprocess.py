"""Paints the same photographs by `postprocess --gpu` and on the CPU, and compares: a step of .ci/gpu.

    python -m benchmarks.gpu_postprocess --work FOLDER [--dry]

FOLDER is what gpu_data and gpu_train have made: 300 photographs, and the run that paints them. The pixels compared are
those of the PNGs among them, which are written without loss. Without a GPU the CPU is compared with itself.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.gpu_runner import Place, cannot, fact, place_parser

AT_LEAST = 0.999
"""Share of the pixels that must be within 1 level of 255, as the README promises."""


def main() -> None:
    arguments = place_parser(__doc__).parse_args()
    compare(Place(arguments.work, arguments.dry))


def compare(place: Place) -> None:
    """SystemExit where the pictures differ by more than rounding."""
    if place.dry:
        cannot("postprocess --gpu: needs a GPU")
    run = place.work / "runs" / "bf16"
    one, other = ("again", "cpu") if place.dry else ("gpu", "cpu")
    for name in (one, other):
        count, seconds, speed = paint(place, run, name)
        fact(**{f"{name}_photographs": count, f"{name}_seconds": seconds, f"{name}_images_per_second": speed})
    within, worst, pixels = differences(place.work / "painted" / one, place.work / "painted" / other)
    fact(pixels_within_1_level=f"{100 * within:.4f} %", largest_difference=worst, megapixels=pixels / 1e6)
    if within < AT_LEAST:
        raise SystemExit(
            f"only {100 * within:.3f} % of the pixels are within 1 level, {100 * AT_LEAST:g} % are asked for"
        )


def paint(place: Place, run: Path, name: str) -> tuple[int, float, float]:
    """Runs the command into painted/NAME; how many photographs, seconds in all, photographs/s once it was at work.

    The last is taken from the times at which the results appeared: start and imports do not count.
    """
    output = place.work / "painted" / name
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "dist_colorize.postprocess", f"--checkpoint={run}", str(place.work / "archive")]
    begin = time.monotonic()
    subprocess.run([*command, f"--output={output}", *(["--gpu"] if name == "gpu" else [])], check=True)
    seconds = round(time.monotonic() - begin, 1)
    times = sorted(path.stat().st_mtime for path in output.rglob("*") if path.is_file())
    return len(times), seconds, (len(times) - 1) / max(times[-1] - times[0], 1e-9)


def differences(one: Path, other: Path) -> tuple[float, int, int]:
    """Of the PNGs in two folders: share of the pixels within 1 level, largest difference in levels, pixels."""
    close = worst = pixels = 0
    for path in sorted(one.rglob("*.png")):
        with Image.open(path) as first, Image.open(other / path.relative_to(one)) as second:
            # [H, W, 3] -> [H, W]: the channel that is furthest off
            off = np.abs(np.asarray(first).astype(int) - np.asarray(second)).max(axis=2)
        close, worst, pixels = close + int((off <= 1).sum()), max(worst, int(off.max())), pixels + off.size
    return close / pixels, worst, pixels


if __name__ == "__main__":
    main()
