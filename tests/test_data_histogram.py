"""Colour counts: the same to the bit at any world size, equal to a count by hand, kept under the data's fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DECODING_DEVICES, DEVICES, run_torchrun

from dist_colorize.color.rebalance import EXTENT, count_cells
from dist_colorize.data import DataConfig, evaluation_batches, histogram, open_photographs
from dist_colorize.data.cells import add_cells
from dist_colorize.distributed import DistributedConfig, session
from dist_colorize.stopping import StopFlag

WORKER = Path(__file__).parent / "workers" / "colours.py"


def count(ranks: int, folder: Path, device: str, sample: float = 1.0) -> dict[str, Any]:
    """Counted anew in a cache folder of its own; on one GPU by all ranks where `device` is cuda."""
    environment = {"XDG_CACHE_HOME": str(folder), "CUDA_VISIBLE_DEVICES": "0"}
    done = run_torchrun(ranks, WORKER, folder / "result.pt", device, str(sample), env=environment)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = torch.load(folder / "result.pt", weights_only=True)
    return result


@pytest.mark.bits
@pytest.mark.parametrize("device", DEVICES)
def test_weights_are_the_same_to_the_bit_at_world_sizes_1_2_3(tmp_path: Path, device: str) -> None:
    results = []
    for ranks in (1, 2, 3):
        (tmp_path / str(ranks)).mkdir()
        results.append(count(ranks, tmp_path / str(ranks), device))
    assert results[0]["cells"].sum() == 8 * 64 * 64
    for other in results[1:]:
        assert torch.equal(other["cells"], results[0]["cells"])
        assert torch.equal(other["weights"], results[0]["weights"])


@pytest.mark.parametrize("device", DECODING_DEVICES)
def test_counts_equal_numpy_and_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = DataConfig(crop=64)
    with session(DistributedConfig(device=device)) as world, StopFlag() as stop:
        photographs, _ = open_photographs(data, world, stop)
        ab = torch.cat([batch.ab[batch.weight > 0].cpu() for batch in evaluation_batches(photographs, data, world, 3)])
        # [N, 2, S, S] -> a, b of every pixel
        a, b = ab.permute(1, 0, 2, 3).reshape(2, -1).numpy()
        edges = np.arange(-EXTENT, EXTENT + 1) - 0.5
        expected, _, _ = np.histogram2d(a, b, bins=(edges, edges))
        found = histogram.count_colours(photographs, data, 1.0, world, stop)
        # histogram2d and round() may put a value on an edge into different neighbours
        assert np.abs(found.view(expected.shape).numpy() - expected).sum() <= 2
        assert torch.equal(found, count_cells(ab))

        monkeypatch.setattr(histogram, "_count", lambda *_: pytest.fail("counted although it was cached"))
        assert torch.equal(histogram.count_colours(photographs, data, 1.0, world, stop), found)
        (cached,) = (tmp_path / "dist_colorize" / "colours").iterdir()
        cached.write_bytes(cached.read_bytes()[:1000])
        monkeypatch.undo()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert torch.equal(histogram.count_colours(photographs, data, 1.0, world, stop), found)


@pytest.mark.parametrize("device", DEVICES)
def test_a_sample_counts_the_first_rows(tmp_path: Path, device: str) -> None:
    assert count(2, tmp_path, device, sample=0.25)["cells"].sum() == 2 * 64 * 64


@pytest.mark.bits
def test_the_compiled_count_equals_the_torch_one_to_the_pixel() -> None:
    ab = torch.randn(1, 2, 100, 100) * 60  # some beyond the cells
    ab[..., ::7] = ab[..., ::7].round() + 0.5  # half-way between two cells
    cells = np.zeros(2 * EXTENT * 2 * EXTENT, dtype=np.int64)
    add_cells(*ab[0].flatten(1).numpy(), cells)
    assert torch.equal(torch.from_numpy(cells), count_cells(ab))
