"""A trace of a real run has every named range, in every traced step and in no other."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import DEVICES
from test_faults import make_photographs
from test_train import TINY

from dist_colorize import train
from dist_colorize.profiling import RANGES, traced


@pytest.mark.parametrize("device", DEVICES)
def test_the_trace_of_a_run_names_the_parts_of_a_step(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    photographs = make_photographs(tmp_path / "photographs", 12)
    settings = ["train.steps=6", "train.validate_every=0", "train.profile=2", f"distributed.device={device}"]
    train.main([*TINY, f"data.root={photographs}", f"run.dir={tmp_path / 'run'}", *settings])
    (file,) = (tmp_path / "run" / "profile").iterdir()
    assert file.name.startswith("rank0.") and file.name.endswith(".pt.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    ranges = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
    assert {name: ranges[name] for name in RANGES} == dict.fromkeys(RANGES, 2)
    # what a range is for is inside it
    spans = [event for event in events if event.get("cat") == "user_annotation" and event["name"] == "encoder"]
    encoders = [(event["ts"], event["ts"] + event["dur"]) for event in spans]
    convolutions = [e["ts"] for e in events if e["name"] == "aten::conv2d"]
    assert [sum(start <= ts <= end for ts in convolutions) for start, end in encoders] == [13, 13]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    assert bool(kernels) == (device == "cuda")


def test_nothing_is_written_unless_asked(tmp_path: Path) -> None:
    with traced(tmp_path / "profile", 0, rank=0) as step:
        step()
    assert not (tmp_path / "profile").exists()
