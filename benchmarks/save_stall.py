"""How long training stands still for a checkpoint: the copy of the state, against the whole save.

python benchmarks/save_stall.py                         # the network at full width, the encoder trained as well
python benchmarks/save_stall.py --folder /network/disk --repeat 10
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from dist_colorize.checkpoint import Writer, save
from dist_colorize.models import ModelConfig, build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="disk to write on")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--width", type=float, default=1.0, help="model.width")
    arguments = parser.parse_args()
    network = build(ModelConfig(width=arguments.width, encoder="scratch"))
    model = network.state_dict()
    moments = {i: {k: torch.rand_like(v) for k in ("exp_avg", "exp_avg_sq")} for i, v in enumerate(model.values())}
    state = {"model": model, "optimizer": {"state": moments}}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        whole, stall, size = [], [], 0
        for step in range(arguments.repeat):
            start = time.perf_counter()
            size = save(Path(folder), step, state, keep=1).stat().st_size
            whole.append(time.perf_counter() - start)
        with Writer(Path(folder), keep=1) as writer:
            for step in range(arguments.repeat, 2 * arguments.repeat):
                writer.save(step, state)
                stall.append(writer.read_stall())
                writer.wait()
    figures = {"mib": round(size / 2**20), "whole_save_seconds": whole, "stall_seconds": stall}
    print(json.dumps({k: round(statistics.median(v), 3) if isinstance(v, list) else v for k, v in figures.items()}))


if __name__ == "__main__":
    main()
