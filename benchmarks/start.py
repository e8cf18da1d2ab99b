"""How long it takes until a run trains: imports, the quickstart's first step, indexing, opening an index, the order.

    python -m benchmarks.start                     # about 2 minutes on 2 cores
    python -m benchmarks.start --files 10000       # with a smaller folder to index

The quickstart is the real command with 2 ranks, stopped after its first step: the first time with empty caches, then
with the index, the class weights and the compiled code that the first start left there. The files are small JPEGs, 64
different ones under many names. The large index is made of sparse files: 10^8 rows whose pages are there, but empty.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from benchmarks.harness import machine, table, take_turns, verdict
from dist_colorize.data.catalog import build_index
from dist_colorize.data.columns import DTYPES, VERSION
from dist_colorize.data.order import Order
from dist_colorize.data.photos import SAMPLES, sample_photographs

ROWS = 10**8
POSITIONS = 10**6

Row = tuple[str, str, str]
"""What, how much, and whether that is the goal."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000, help="files to index (default: %(default)s)")
    files = parser.parse_args().files
    print(machine("torch", "nvidia-dali-cuda130", "numba", "numpy"))
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            *imports(),
            *quickstart(Path(folder, "quickstart")),
            index(Path(folder, "photographs"), files),
            *large_index(Path(folder, "index")),
            order(),
        ]
    print(table(["", "measured", "goal"], rows))
    return 0


def imports() -> list[Row]:
    def start(module: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", f"import {module}"], check=True)

    times = take_turns({name: start(name) for name in ("torch", "dist_colorize.train")})
    own = median(
        ours - theirs for ours, theirs in zip(times.seconds["dist_colorize.train"], times.seconds["torch"], strict=True)
    )
    return [
        ("import torch", f"{times.of('torch'):.1f} s", ""),
        ("import dist_colorize.train, beyond torch", f"{own:.2f} s", verdict(own, 1, at_most=True)),
    ]


def quickstart(folder: Path) -> list[Row]:
    folder.mkdir()
    first, *later = (first_step(folder / str(number)) for number in range(4))
    took = median(later)
    return [
        ("quickstart, 2 ranks: command to first step", f"{took:.1f} s", verdict(took, 15, at_most=True)),
        ("the same with empty caches", f"{first:.1f} s", ""),
    ]


def first_step(run: Path) -> float:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    begin, metrics = time.perf_counter(), run / "metrics.jsonl"
    caches = {"XDG_CACHE_HOME": f"{run.parent}/cache", "NUMBA_CACHE_DIR": f"{run.parent}/compiled"}
    with (run.parent / f"{run.name}.txt").open("w+") as output:
        command += ["-m", "dist_colorize.train", f"run.dir={run}"]
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | caches)
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None:
                raise RuntimeError(f"the quickstart ended: {Path(output.name).read_text()[-2000:]}")
            time.sleep(0.02)
        took = time.perf_counter() - begin
        process.send_signal(signal.SIGTERM)
        process.wait()
    return took


def index(folder: Path, count: int) -> Row:
    source = sample_photographs()
    pictures = []
    for number in range(64):
        file = BytesIO()
        with Image.open(source / SAMPLES[number % len(SAMPLES)]) as image:
            side = min(image.size) - number
            crop = image.convert("RGB").resize((160, 120), box=(number, number, side, side))
        crop.save(file, "JPEG", quality=85)
        pictures.append(file.getvalue())
    for number in range(count):
        if number % 1000 == 0:
            (folder / f"{number // 1000:03}").mkdir(parents=True)
        (folder / f"{number // 1000:03}" / f"{number}.jpg").write_bytes(pictures[number % len(pictures)])
    start = time.perf_counter()
    build_index(folder, 32, folder.parent)
    speed = count / (time.perf_counter() - start)
    size = sum(map(len, pictures)) / len(pictures) / 1000
    return f"index of {count:,} files of {size:.0f} kB", f"{speed:,.0f} files/s", verdict(speed, 5000)


OPEN = """
import sys, time
from pathlib import Path
import numpy
from benchmarks.harness import resident
from dist_colorize.data.columns import open_index
before, start = resident(), time.perf_counter()
photographs = open_index(Path(sys.argv[1]))
photographs.width[:: len(photographs) // 1000].sum()
print(time.perf_counter() - start, (resident() - before) / 1e6, len(photographs))
"""


def large_index(folder: Path) -> list[Row]:
    folder.mkdir()
    for column, dtype in DTYPES.items():
        length = {"names": 20 * ROWS, "name_ends": ROWS + 1}.get(column, ROWS)
        np.lib.format.open_memmap(folder / f"{column}.npy", "w+", dtype, (length,))
    about = {"version": VERSION, "root": "/photographs", "fingerprint": "synthetic", "shards": [], "usable": ROWS}
    (folder / "index.json").write_text(json.dumps(about))
    found = [subprocess.check_output([sys.executable, "-c", OPEN, folder], text=True).split() for _ in range(3)]
    seconds, megabytes = (median(float(values[n]) for values in found) for n in range(2))
    assert {int(values[2]) for values in found} == {ROWS}
    what = f"index of {ROWS:,} rows: open, read 1000 of them"
    return [
        (what, f"{seconds:.3f} s", verdict(seconds, 1, at_most=True)),
        ("resident memory for it", f"{megabytes:.1f} MB", verdict(megabytes, 100, at_most=True)),
    ]


def order() -> Row:
    order = Order(10**9, "fingerprint", 0)
    positions = np.arange(POSITIONS, dtype=np.uint64)
    times = take_turns({"draw": lambda: order.draw(positions)})
    speed = POSITIONS / times.of("draw")
    return "order: positions drawn, of 10^9 samples", f"{speed / 1e6:.1f} million/s", verdict(speed / 1e6, 10)


if __name__ == "__main__":
    sys.exit(main())
