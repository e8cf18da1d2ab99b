"""The whole `postprocess` command on a folder of photographs: which share of its time the network has.

    python -m benchmarks.colorize                   # 100 photographs of 1024 x 768, full-width network

Decoding, painting and encoding run beside the network in threads. All that they add to its time is overhead; the best
that any program can do around the same network is 100 %. The weights are random, which costs the same time.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from skimage import data

from benchmarks.harness import machine, table, verdict
from dist_colorize import checkpoint, config
from dist_colorize.models import ModelConfig, build
from dist_colorize.models.network import Network
from dist_colorize.postprocess import __main__ as postprocess
from dist_colorize.postprocess.colorizer import Colorizer
from dist_colorize.recipe import Recipe

WIDTH, HEIGHT = 1024, 768
GOAL = 0.85


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=int, default=100)
    arguments = parser.parse_args()
    print(machine("torch", "pyvips"), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        write_photographs(here / "in", arguments.photographs)
        write_run(here / "run")
        command = ["--checkpoint", str(here / "run"), str(here / "in"), "--output", str(here / "out")]
        watched = {"network": Watch(Network, "features"), "network and stages": Watch(Colorizer, "predict_together")}
        start = time.perf_counter()
        with watched["network"], watched["network and stages"]:
            code = postprocess.main(command)
        whole = time.perf_counter() - start
        written = len(list((here / "out").iterdir()))
    if code or written != arguments.photographs:
        raise SystemExit(f"postprocess wrote {written} of {arguments.photographs} photographs and returned {code}")
    rows = [[name, watch.seconds, watch.seconds / whole] for name, watch in watched.items()]
    print(table(["part", "s", "share"], [*rows, ["whole command", whole, 1.0]]))
    share = watched["network"].seconds / whole
    speed = arguments.photographs * WIDTH * HEIGHT / 1e6 / whole
    print(f"{arguments.photographs / whole:.2f} photographs/s, {speed:.2f} megapixels/s; ", end="")
    print(f"the network has {share:.0%} of the time ({verdict(share, GOAL)})")


class Watch:
    """Seconds that calls of one method take, added up."""

    def __init__(self, owner: type, name: str) -> None:
        self.seconds = 0.0
        genuine = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return genuine(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        self._patch = mock.patch.object(owner, name, timed)

    def __enter__(self) -> None:
        self._patch.start()

    def __exit__(self, *_: object) -> None:
        self._patch.stop()


def write_photographs(folder: Path, number: int) -> None:
    """Stretches of scikit-image's photographs, enlarged, as grayscale JPEGs: an archive of scans."""
    folder.mkdir()
    random = np.random.default_rng(0)
    sources = [Image.fromarray(image).convert("L") for image in (data.astronaut(), data.coffee(), data.rocket())]
    for i in range(number):
        source = sources[i % len(sources)]
        left, top = (int(random.integers(0, side // 3)) for side in source.size)
        stretch = source.crop((left, top, left + source.size[0] // 2, top + source.size[1] // 2))
        stretch.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(folder / f"{i:03}.jpg", quality=90)


def write_run(run: Path) -> None:
    """A checkpoint of the final network at full width."""
    torch.manual_seed(0)
    recipe = Recipe(model=ModelConfig(width=1.0))
    network = build(recipe.model)
    torch.nn.init.normal_(network.head.weight, std=0.3)
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(config.dump(recipe))
    state = {"step": 1, "model": network.state_dict(), "config": config.to_dict(recipe)}
    checkpoint.save(run / "checkpoints", 1, state)


if __name__ == "__main__":
    main()
