"""Checks what the quickstart left in its run folder: python .ci/check_quickstart.py RUN."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from PIL import Image

GAIN = 4.0
"""dB of PSNR by which the final pictures must beat the gray ones."""

run = Path(sys.argv[1])
scores = json.loads((run / "evaluation.json").read_text())["scores"]
gain = scores["final"]["psnr"] - scores["gray"]["psnr"]
assert gain >= GAIN, f"final beats gray by {gain:.2f} dB, {GAIN} are asked for"
assert {"gray", "raw", "blended", "final"} <= scores.keys()
lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
assert lines[-1]["loss"] < lines[0]["loss"] / 1.5
assert "model" in torch.load(run / "checkpoints" / "latest", weights_only=True)
assert list((run / "tensorboard").iterdir())
Image.open(run / "panels" / "final.png").verify()
print(f"quickstart: final beats gray by {gain:.2f} dB")
