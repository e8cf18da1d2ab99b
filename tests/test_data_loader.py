"""The loader: the same stream at any world size, whatever goes wrong with files."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DECODING_DEVICES
from PIL import Image
from skimage import data as photos
from skimage.color import rgb2lab

from dist_colorize.data import pipeline
from dist_colorize.data.catalog import build_index
from dist_colorize.data.columns import Photographs, open_index
from dist_colorize.data.config import DataConfig
from dist_colorize.data.loader import Batch, Loader, evaluation_batches
from dist_colorize.data.order import Order
from dist_colorize.data.prefetch import Prefetch
from dist_colorize.errors import UserError

CONFIG = DataConfig(crop=64, threads=1)


@pytest.fixture(params=DECODING_DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Where batches are made and decoded."""
    return request.param


def world(rank: int = 0, size: int = 1, device: str = "cpu") -> Any:
    where = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    return SimpleNamespace(rank=rank, size=size, local_size=1, device=where)


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven small photographs in several formats."""
    root = tmp_path_factory.mktemp("photographs")
    formats = [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("tif", "TIFF"), ("bmp", "BMP")]
    names = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field")
    sources = [Image.fromarray(getattr(photos, name)()) for name in names]
    for i in range(11):
        suffix, format = formats[i % len(formats)]
        sources[i % 5].resize((160 + 8 * i, 120)).rotate(20 * (i // 5)).save(root / f"{i}.{suffix}", format)
    return root


@pytest.fixture
def photographs(folder: Path, tmp_path: Path) -> Photographs:
    return open_index(build_index(folder, 32, tmp_path))


def order_of(photographs: Photographs, seed: int = 0) -> Order:
    return Order(len(photographs), photographs.fingerprint, seed)


def on_cpu(batch: Batch) -> Batch:
    return Batch(*(tensor.cpu() for tensor in batch))


def collect(
    photographs: Photographs, rank: int, size: int, local: int, start: int, steps: int, device: str = "cpu"
) -> list[Batch]:
    """Batches, copied to the CPU."""
    with Loader(photographs, CONFIG, order_of(photographs), world(rank, size, device), local) as loader:
        batches = loader.batches(start)
        return [on_cpu(next(batches)) for _ in range(steps)]


def test_batches_have_the_documented_form(photographs: Photographs, device: str) -> None:
    with Loader(photographs, CONFIG, order_of(photographs), world(device=device), 4) as loader:
        batch = next(loader.batches())
    assert {tensor.device.type for tensor in batch[:3]} == {device}
    assert batch.sample.device.type == "cpu"
    assert batch.L.shape == (4, 1, 64, 64)
    assert batch.ab.shape == (4, 2, 64, 64)
    assert batch.L.dtype == batch.ab.dtype == batch.weight.dtype == torch.float32
    assert batch.L.is_contiguous()
    assert batch.ab.is_contiguous()
    assert batch.weight.tolist() == [1, 1, 1, 1]
    assert batch.sample.dtype == torch.int64
    assert 0 <= batch.L.min() < batch.L.max() <= 100.01
    assert batch.ab.abs().max() > 10


@pytest.mark.bits
def test_the_stream_is_the_same_at_any_world_size_and_after_any_restart(photographs: Photographs, device: str) -> None:
    whole = collect(photographs, 0, 1, 6, 0, 5, device)  # 30 positions: almost three epochs of 11
    by_rank = [collect(photographs, rank, 3, 2, 0, 5, device) for rank in range(3)]
    for step in range(5):
        for field in ("L", "ab", "sample"):
            together = torch.cat([getattr(by_rank[rank][step], field) for rank in range(3)])
            assert torch.equal(together, getattr(whole[step], field))
    restarted = collect(photographs, 0, 1, 6, 3, 2, device)
    for late, early in zip(restarted, whole[3:], strict=True):
        assert torch.equal(late.L, early.L)
        assert torch.equal(late.ab, early.ab)
    samples = torch.cat([batch.sample for batch in whole])
    assert sorted(samples[:11].tolist()) == sorted(samples[11:22].tolist()) == list(range(11))


def test_a_world_larger_than_the_data_gets_its_batches(photographs: Photographs) -> None:
    few = photographs.rows(0, 2)
    batches = [collect(few, rank, 16, 1, 0, 1)[0] for rank in range(0, 16, 5)]
    assert all(0 <= batch.sample.item() < 2 for batch in batches)


@pytest.mark.bits
def test_first_batch_is_the_start_of_the_stream_on_every_rank(photographs: Photographs, device: str) -> None:
    (whole,) = collect(photographs, 0, 1, 5, 0, 1, device)
    for rank in (0, 2):
        with Loader(photographs, CONFIG, order_of(photographs), world(rank, 3, device), 2) as loader:
            assert torch.equal(loader.first(5).L.cpu(), whole.L)


def evaluated(photographs: Photographs, size: int, local: int, device: str) -> list[list[Batch]]:
    ranks = [evaluation_batches(photographs, CONFIG, world(rank, size, device), local) for rank in range(size)]
    return [[on_cpu(batch) for batch in batches] for batches in ranks]


@pytest.mark.bits
def test_evaluation_shows_every_photograph_once_at_any_world_size(photographs: Photographs, device: str) -> None:
    (reference,) = evaluated(photographs, 1, 4, device)
    expected = torch.cat([batch.L[batch.weight > 0] for batch in reference])
    assert len(expected) == 11
    for size, local in ((1, 3), (2, 3), (3, 2), (5, 4)):
        ranks = evaluated(photographs, size, local, device)
        assert len({len(batches) for batches in ranks}) == 1  # or a collective in the loop would hang
        L = torch.full_like(expected, float("nan"))
        seen = []
        for batch in (batch for batches in ranks for batch in batches):
            real = batch.weight > 0
            assert torch.equal(batch.sample == -1, ~real)
            assert torch.isfinite(batch.L).all()
            assert torch.isfinite(batch.ab).all()
            L[batch.sample[real]] = batch.L[real]
            seen += batch.sample[real].tolist()
        assert sorted(seen) == list(range(11))
        assert torch.equal(L, expected)


def test_evaluation_shows_the_middle_square(photographs: Photographs, device: str) -> None:
    (batches,) = evaluated(photographs, 1, 4, device)
    L = torch.cat([batch.L for batch in batches])
    for row in range(len(photographs)):
        image = Image.open(Path(photographs.root, photographs.name(row))).convert("RGB")
        left = (image.width - image.height) // 2
        square = image.crop((left, 0, left + image.height, image.height))
        expected = rgb2lab(np.asarray(square.resize((64, 64), Image.Resampling.BILINEAR)))[..., 0]
        # Both filters are triangular, but round differently; one pixel aside the mean is above 1.
        assert np.abs(L[row, 0].numpy() - expected).mean() < (0.3 if device == "cpu" else 0.6)


def damage_text(path: Path) -> None:
    path.write_bytes(b"this is no image".ljust(path.stat().st_size))


def damage_half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def damage_gone(path: Path) -> None:
    path.unlink()


def damage_size(path: Path) -> None:
    """Another image of the same length in bytes, too small for its crop."""
    small = encode(Image.new("RGB", (8, 8), "red"), "PNG")
    path.write_bytes(small + bytes(path.stat().st_size - len(small)))


@pytest.mark.bits
@pytest.mark.parametrize("damage", [damage_text, damage_half, damage_gone, damage_size])
def test_a_file_that_went_bad_is_replaced_and_the_others_are_untouched(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, device: str
) -> None:
    root = tmp_path / "copy"
    root.mkdir()
    for file in folder.iterdir():
        (root / file.name).write_bytes(file.read_bytes())
    photographs = open_index(build_index(root, 32, tmp_path / "index"))
    good = collect(photographs, 0, 1, 6, 0, 5, device)
    bad = next(row for row in range(11) if photographs.format_name(row) == "PNG")
    damage(root / photographs.name(bad))

    builds = []
    original = pipeline.build
    monkeypatch.setattr(pipeline, "build", lambda *args: builds.append(0) or original(*args))
    with Loader(photographs, CONFIG, order_of(photographs), world(device=device), 6) as loader:
        stream = loader.batches(0)
        batches = [on_cpu(next(stream)) for _ in range(5)]
        replaced = loader.replaced
    assert [item.name for item in replaced] == [photographs.name(bad)]
    assert replaced[0].reason
    assert len(builds) <= 2  # the first one, and one for the only batch that was found out by DALI
    touched = 0
    for before, after in zip(good, batches, strict=True):
        same = before.sample != bad
        touched += int((~same).sum())
        assert torch.equal(before.L[same], after.L[same])
        assert torch.equal(before.ab[same], after.ab[same])
        assert torch.equal(before.sample[same], after.sample[same])
        assert (after.sample != bad).all()
        assert torch.isfinite(after.ab).all()
    assert touched >= 2

    again = collect(photographs, 0, 1, 6, 0, 5, device)
    split = [collect(photographs, rank, 2, 3, 0, 5, device) for rank in range(2)]
    for step, batch in enumerate(batches):  # which one steps in depends on the position alone
        assert torch.equal(batch.L, again[step].L)
        assert torch.equal(batch.L, torch.cat([split[0][step].L, split[1][step].L]))

    results = list(evaluation_batches(photographs, CONFIG, world(device=device), 4))
    counted = torch.cat([batch.sample[batch.weight.cpu() > 0] for batch in results]).tolist()
    assert counted == [row for row in range(11) if row != bad]


@pytest.mark.bits
def test_damage_that_some_crops_miss_is_judged_alike_by_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """The end of a JPEG is lost, its length is not: crops of the upper part can be decoded. Which ones step aside must
    depend neither on what a rank has seen before, nor on where the stream was taken up again."""
    root = tmp_path / "photographs"
    root.mkdir()
    generator = np.random.default_rng(3)
    for i in range(4):
        blocks = np.kron(generator.integers(0, 256, (16, 12, 3), dtype=np.uint8), np.ones((16, 16, 1), dtype=np.uint8))
        Image.fromarray(blocks).save(root / f"{i}.jpg", quality=90)
    photographs = open_index(build_index(root, 32, tmp_path / "index"))
    bad = photographs.name(1)
    content = (root / bad).read_bytes()
    (root / bad).write_bytes(content[: len(content) * 4 // 5].ljust(len(content), b"\0"))

    monkeypatch.setattr("dist_colorize.data.reading._log.warning", lambda *args: None)
    config = DataConfig(crop=32, threads=1, scale=(0.05, 0.2))

    def stream(rank: int, size: int, start: int, steps: int) -> list[Batch]:
        with Loader(photographs, config, order_of(photographs), world(rank, size, device), 8 // size) as loader:
            batches = loader.batches(start)
            return [on_cpu(next(batches)) for _ in range(steps)]

    builds = []
    original = pipeline.build
    monkeypatch.setattr(pipeline, "build", lambda *args: builds.append(0) or original(*args))
    whole = stream(0, 1, 0, 12)
    planned = order_of(photographs).draw(np.arange(96, dtype=np.uint64)).sample
    seen = torch.cat([batch.sample for batch in whole]).numpy()
    used = (planned == 1) & (seen == 1)
    if device == "cpu":  # a GPU's decoder may overlook more
        assert len(builds) == 2  # the first one, and one for the only batch that was found out by DALI
        assert 3 < used.sum() < (planned == 1).sum() - 3
    for resumed_at in (3, 7):
        for before, after in zip(whole[resumed_at:], stream(0, 1, resumed_at, 12 - resumed_at), strict=True):
            assert torch.equal(before.sample, after.sample)
            # what a GPU leaves in blocks that the damage hides is not promised
            assert device == "cuda" or torch.equal(before.ab, after.ab)
    for step, (one, other) in enumerate(zip(stream(0, 2, 0, 12), stream(1, 2, 0, 12), strict=True)):
        assert torch.equal(whole[step].sample, torch.cat([one.sample, other.sample]))
        assert device == "cuda" or torch.equal(whole[step].L, torch.cat([one.L, other.L]))


def test_data_that_vanish_altogether_are_an_error_not_a_loop(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    root.mkdir()
    for file in folder.iterdir():
        (root / file.name).write_bytes(file.read_bytes())
    photographs = open_index(build_index(root, 32, tmp_path / "index"))
    for file in root.iterdir():
        file.unlink()
    with (
        Loader(photographs, CONFIG, order_of(photographs), world(), 2) as loader,
        pytest.raises(UserError, match="are the data still there"),
    ):
        next(loader.batches(0))


def test_an_empty_set_and_a_missing_gpu_are_named(photographs: Photographs) -> None:
    with pytest.raises(UserError, match="val_fraction"):
        next(evaluation_batches(photographs.rows(0, 0), CONFIG, world(), 2))
    with pytest.raises(UserError, match=r"data\.device=gpu"):
        Loader(photographs, DataConfig(device="gpu"), order_of(photographs), world(), 2)


def threads_named(prefix: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(prefix)]


def test_closing_early_leaves_no_thread(photographs: Photographs) -> None:
    with Loader(photographs, CONFIG, order_of(photographs), world(), 2) as loader:
        stream = loader.batches(0)
        next(stream)
        assert threads_named("prefetch")
    batches = evaluation_batches(photographs, CONFIG, world(), 2)
    next(batches)
    batches.close()
    assert not threads_named("prefetch")
    assert not threads_named("read")
    assert not threads_named("finish")


def test_prefetch_keeps_order_depth_and_errors() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(5):
            made.append(i)
            yield i
        raise OSError("the fifth")

    ahead = Prefetch(items(), depth=2)
    assert next(ahead) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)
    assert len(made) == 4  # one taken, two ready, one in hand
    assert [next(ahead) for _ in range(4)] == [1, 2, 3, 4]
    for _ in range(2):  # a second look must not wait for ever
        with pytest.raises(OSError, match="the fifth"):
            next(ahead)
    ahead.close()


@pytest.mark.gpu
@pytest.mark.own_process
def test_the_gpu_decodes_what_the_cpu_decodes(photographs: Photographs) -> None:
    (cpu, *_), (gpu, *_) = (evaluated(photographs, 1, 8, device)[0] for device in ("cpu", "cuda"))
    lossless = [i for i in range(8) if photographs.format_name(i) in ("PNG", "BMP", "TIFF")]
    assert torch.allclose(cpu.L[lossless], gpu.L[lossless], atol=0.6)  # one level of the resize's rounding
    assert (cpu.ab - gpu.ab).abs().mean() < 1
