"""The DALI pipeline against scikit-image and Pillow; the loader against itself at other world sizes and with losses."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pyvips
import torch
from PIL import Image, ImageOps
from skimage import data as photos
from skimage.color import rgb2lab

from dist_colorize.data import pipeline
from dist_colorize.data.catalog import build_index
from dist_colorize.data.columns import Photographs, open_index
from dist_colorize.data.config import DataConfig
from dist_colorize.data.finish import finish, finish_batch
from dist_colorize.data.loader import Batch, Loader, evaluation_batches
from dist_colorize.data.order import Order
from dist_colorize.data.prefetch import Prefetch
from dist_colorize.errors import UserError

CONFIG = DataConfig(crop=64, threads=1)


def world(rank: int = 0, size: int = 1) -> Any:
    return SimpleNamespace(rank=rank, size=size, local_size=1, device=torch.device("cpu"))


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def rotated(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def real_photographs() -> dict[str, Image.Image]:
    names = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field")
    return {name: Image.fromarray(getattr(photos, name)()) for name in names}


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def sixteen_bit_png(image: Image.Image) -> bytes:
    values = np.asarray(image, dtype=np.uint16) * 257
    width, height = image.size
    return (
        pyvips.Image.new_from_memory(values.tobytes(), width, height, 3, "ushort")
        .copy(interpretation="rgb16")
        .write_to_buffer(".png")
    )


def encodings(image: Image.Image) -> dict[str, bytes]:
    files = {
        "jpeg": encode(image, "JPEG", quality=90),
        "jpeg progressive": encode(image, "JPEG", quality=90, progressive=True),
        "jpeg cmyk": encode(image.convert("CMYK"), "JPEG", quality=90),
        "png": encode(image, "PNG"),
        "png palette": encode(image.quantize(64), "PNG"),
        "png alpha": encode(with_alpha(image), "PNG"),
        "png 16 bit": sixteen_bit_png(image),
        "webp": encode(image, "WEBP", quality=90),
        "webp lossless alpha": encode(with_alpha(image), "WEBP", lossless=True),
        "tiff": encode(image, "TIFF", compression="tiff_lzw"),
        "bmp": encode(image, "BMP"),
    }
    for orientation in range(2, 9):
        files[f"jpeg exif {orientation}"] = encode(image, "JPEG", quality=90, exif=rotated(orientation))
    for format in ("PNG", "TIFF", "WEBP"):
        files[f"{format.lower()} exif 6"] = encode(image, format, exif=rotated(6))
    return files


def displayed(name: str, file: bytes, image: Image.Image) -> np.ndarray:
    """What a viewer shows, uint8 [H, W, 3], by Pillow."""
    if name == "png 16 bit":  # Pillow would cut it to 8 bits itself; it was made of 8
        return np.asarray(image)
    return np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(file))).convert("RGB"))


Way = Callable[[Sequence[bytes], Any, Any, int, Sequence[int]], np.ndarray]


def by_operators(files: Sequence[bytes], anchor: Any, shape: Any, size: int, flips: Sequence[int]) -> np.ndarray:
    """Crops of files at (y, x), (height, width), as Lab [B, size, size, 3], by the graph that a GPU runs."""
    _dali, (L, a, b) = run_dali(files, anchor, shape, size, flips, whole=True)
    # [B, 3, S, S] -> [B, S, S, 3]
    return np.concatenate([np.array(plane.as_tensor()) for plane in (L, a, b)], axis=1).transpose(0, 2, 3, 1)


def in_one_pass(files: Sequence[bytes], anchor: Any, shape: Any, size: int, flips: Sequence[int]) -> np.ndarray:
    """The same by the pass that follows DALI on a CPU."""
    _dali, (crops, mirrored) = run_dali(files, anchor, shape, size, flips, whole=False)
    with ThreadPoolExecutor(2) as workers:
        L, ab = finish_batch([np.asarray(crop) for crop in crops], mirrored.as_array() != 0, size, workers, 2)
    # [B, 3, S, S] -> [B, S, S, 3]
    return torch.cat([L, ab], dim=1).permute(0, 2, 3, 1).numpy()


def run_dali(files: Sequence[bytes], anchor: Any, shape: Any, size: int, flips: Sequence[int], whole: bool) -> Any:
    encoded = [np.frombuffer(file, dtype=np.uint8) for file in files]
    plan = [np.array(column, dtype=np.int32) for column in (anchor, shape, flips)]
    batches = iter([(encoded, *plan)])
    dali = pipeline.build(lambda: next(batches), len(files), size, 1, "cpu", None, whole)
    return dali, dali.run()  # the memory of what it puts out is the pipeline's


both_ways = pytest.mark.parametrize("lab_of", [by_operators, in_one_pass])


@both_ways
@pytest.mark.parametrize("name", list(real_photographs()))
def test_lab_of_every_kind_of_file_equals_scikit_image(name: str, lab_of: Way) -> None:
    image = real_photographs()[name].resize((240, 150))
    files = encodings(image)
    # The anchor is off-centre, so that a box in the undisplayed frame would show something else.
    n = len(files)
    lab = lab_of(list(files.values()), [(5, 11)] * n, [(128, 128)] * n, 128, [0] * n)
    for got, (kind, file) in zip(lab, files.items(), strict=True):
        expected = rgb2lab(displayed(kind, file, image)[5 : 5 + 128, 11 : 11 + 128])
        assert np.abs(got - expected).max() < 1e-3, kind


@both_ways
def test_lab_of_all_colours_equals_scikit_image(lab_of: Way) -> None:
    """Every red and green with every blue in steps of 15, and all of the darkest, where f is a line."""
    steps, dark = np.arange(0, 256, 15), np.arange(32)
    levels = np.arange(256)
    colours = [np.stack(np.meshgrid(levels, levels, steps, indexing="ij"), axis=-1).reshape(-1, 3)]
    colours.append(np.stack(np.meshgrid(dark, dark, dark, indexing="ij"), axis=-1).reshape(-1, 3))
    flat = np.concatenate(colours).astype(np.uint8)
    side = int(np.ceil(np.sqrt(len(flat))))
    image = np.resize(flat, (side, side, 3))
    (lab,) = lab_of([encode(Image.fromarray(image), "PNG", compress_level=0)], [(0, 0)], [(side, side)], side, [0])
    assert np.abs(lab - rgb2lab(image)).max() < 5e-4


@both_ways
def test_flipped_crops_are_mirrored(lab_of: Way) -> None:
    file = encode(real_photographs()["coffee"], "PNG")
    plain, mirrored = lab_of([file, file], [(100, 200)] * 2, [(96, 96)] * 2, 96, [0, 1])
    assert np.array_equal(plain, mirrored[:, ::-1])


@both_ways
def test_resizing_averages_what_it_shrinks(lab_of: Way) -> None:
    """A fine checkerboard becomes its mean colour: without an antialiasing filter it would stay black or white."""
    board = np.indices((256, 256)).sum(axis=0) % 2 * 255
    image = Image.fromarray(np.stack([board] * 3, axis=-1).astype(np.uint8))
    (lab,) = lab_of([encode(image, "PNG")], [(0, 0)], [(256, 256)], 32, [0])
    assert np.abs(lab[..., 0] - rgb2lab(np.full((1, 1, 3), 127, dtype=np.uint8))[0, 0, 0]).max() < 2


SHAPES = [(400, 600), (31, 17), (97, 224), (224, 97), (1, 300), (300, 1), (1, 1), (250, 251)]
"""Larger and smaller than the result, both at once, one pixel wide."""


def triangles(length: int, size: int) -> np.ndarray:
    """Weights [size, length] of a triangular filter, as wide as a pixel of the smaller side."""
    reach = max(length / size, 1)
    centres, pixels = (np.arange(size) + 0.5) * length / size, np.arange(length) + 0.5
    weights = np.maximum(1 - np.abs(pixels - centres[:, None]) / reach, 0)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("size", [16, 48, 224])
def test_the_pass_on_the_cpu_equals_a_matrix_product_and_scikit_image(size: int) -> None:
    photograph = np.array(real_photographs()["coffee"])
    for k, (h, w) in enumerate(SHAPES):
        crop = np.ascontiguousarray(photograph[:h, :w])
        L, ab = np.empty((size, size), np.float32), np.empty((2, size, size), np.float32)
        finish(crop, bool(k % 2), L, ab)
        # [h, w, 3] -> [size, w, 3] -> [size, 3, size] -> [size, size, 3]
        resized = np.tensordot(np.tensordot(triangles(h, size), crop, 1), triangles(w, size), (1, 1)).swapaxes(1, 2)
        expected = rgb2lab(np.rint(resized[:, :: -1 if k % 2 else 1]).astype(np.uint8))
        error = np.abs(np.dstack([L, *ab]) - expected).max(axis=-1)
        # where a sum is half-way between two levels, single precision may round to the other one
        unsure = (np.abs(resized[:, :: -1 if k % 2 else 1] % 1 - 0.5) < 1e-4).any(axis=-1)
        assert error[~unsure].max(initial=0) < 5e-4
        assert error.max() < 5


@pytest.mark.parametrize("size", [48, 96, 224])
def test_the_pass_on_the_cpu_equals_the_graph_of_the_gpu(size: int) -> None:
    """But for a level of 255 here and there: DALI's resize takes its filter from a table."""
    n, file = len(SHAPES), encode(real_photographs()["coffee"], "PNG")
    many = ([file] * n, [(0, 0)] * n, SHAPES, size, [k % 2 for k in range(n)])
    difference = np.abs(by_operators(*many) - in_one_pass(*many))
    assert difference.max() < 5
    assert difference.mean() < 0.02


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven small photographs in several formats."""
    root = tmp_path_factory.mktemp("photographs")
    formats = [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("tif", "TIFF"), ("bmp", "BMP")]
    sources = list(real_photographs().values())
    for i in range(11):
        suffix, format = formats[i % len(formats)]
        sources[i % 5].resize((160 + 8 * i, 120)).rotate(20 * (i // 5)).save(root / f"{i}.{suffix}", format)
    return root


@pytest.fixture
def photographs(folder: Path, tmp_path: Path) -> Photographs:
    return open_index(build_index(folder, 32, tmp_path))


def order_of(photographs: Photographs, seed: int = 0) -> Order:
    return Order(len(photographs), photographs.fingerprint, seed)


def collect(photographs: Photographs, rank: int, size: int, local: int, start: int, steps: int) -> list[Batch]:
    with Loader(photographs, CONFIG, order_of(photographs), world(rank, size), local) as loader:
        batches = loader.batches(start)
        return [next(batches) for _ in range(steps)]


def test_batches_have_the_documented_form(photographs: Photographs) -> None:
    (batch,) = collect(photographs, 0, 1, 4, 0, 1)
    assert batch.L.shape == (4, 1, 64, 64)
    assert batch.ab.shape == (4, 2, 64, 64)
    assert batch.L.dtype == batch.ab.dtype == batch.weight.dtype == torch.float32
    assert batch.L.is_contiguous()
    assert batch.ab.is_contiguous()
    assert batch.weight.tolist() == [1, 1, 1, 1]
    assert batch.sample.dtype == torch.int64
    assert 0 <= batch.L.min() < batch.L.max() <= 100.01
    assert batch.ab.abs().max() > 10


def test_the_stream_is_the_same_at_any_world_size_and_after_any_restart(photographs: Photographs) -> None:
    whole = collect(photographs, 0, 1, 6, 0, 5)  # 30 positions: almost three epochs of 11
    by_rank = [collect(photographs, rank, 3, 2, 0, 5) for rank in range(3)]
    for step in range(5):
        for field in ("L", "ab", "sample"):
            together = torch.cat([getattr(by_rank[rank][step], field) for rank in range(3)])
            assert torch.equal(together, getattr(whole[step], field))
    restarted = collect(photographs, 0, 1, 6, 3, 2)
    for late, early in zip(restarted, whole[3:], strict=True):
        assert torch.equal(late.L, early.L)
        assert torch.equal(late.ab, early.ab)
    samples = torch.cat([batch.sample for batch in whole])
    assert sorted(samples[:11].tolist()) == sorted(samples[11:22].tolist()) == list(range(11))


def test_a_world_larger_than_the_data_gets_its_batches(photographs: Photographs) -> None:
    few = photographs.rows(0, 2)
    batches = [collect(few, rank, 16, 1, 0, 1)[0] for rank in range(0, 16, 5)]
    assert all(0 <= batch.sample.item() < 2 for batch in batches)


def test_first_batch_is_the_start_of_the_stream_on_every_rank(photographs: Photographs) -> None:
    (whole,) = collect(photographs, 0, 1, 5, 0, 1)
    for rank in (0, 2):
        with Loader(photographs, CONFIG, order_of(photographs), world(rank, 3), 2) as loader:
            assert torch.equal(loader.first(5).L, whole.L)


def evaluated(photographs: Photographs, size: int, local: int) -> list[list[Batch]]:
    return [list(evaluation_batches(photographs, CONFIG, world(rank, size), local)) for rank in range(size)]


def test_evaluation_shows_every_photograph_once_at_any_world_size(photographs: Photographs) -> None:
    (reference,) = evaluated(photographs, 1, 4)
    expected = torch.cat([batch.L[batch.weight > 0] for batch in reference])
    assert len(expected) == 11
    for size, local in ((1, 3), (2, 3), (3, 2), (5, 4)):
        ranks = evaluated(photographs, size, local)
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


def test_evaluation_shows_the_middle_square(photographs: Photographs) -> None:
    (batches,) = evaluated(photographs, 1, 4)
    L = torch.cat([batch.L for batch in batches])
    for row in range(len(photographs)):
        image = Image.open(Path(photographs.root, photographs.name(row))).convert("RGB")
        left = (image.width - image.height) // 2
        square = image.crop((left, 0, left + image.height, image.height))
        expected = rgb2lab(np.asarray(square.resize((64, 64), Image.Resampling.BILINEAR)))[..., 0]
        # Both filters are triangular, but round differently; one pixel aside the mean is above 1.
        assert np.abs(L[row, 0].numpy() - expected).mean() < 0.3


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


@pytest.mark.parametrize("damage", [damage_text, damage_half, damage_gone, damage_size])
def test_a_file_that_went_bad_is_replaced_and_the_others_are_untouched(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any
) -> None:
    root = tmp_path / "copy"
    root.mkdir()
    for file in folder.iterdir():
        (root / file.name).write_bytes(file.read_bytes())
    photographs = open_index(build_index(root, 32, tmp_path / "index"))
    good = collect(photographs, 0, 1, 6, 0, 5)
    bad = next(row for row in range(11) if photographs.format_name(row) == "PNG")
    damage(root / photographs.name(bad))

    builds = []
    original = pipeline.build
    monkeypatch.setattr(pipeline, "build", lambda *args: builds.append(0) or original(*args))
    with Loader(photographs, CONFIG, order_of(photographs), world(), 6) as loader:
        stream = loader.batches(0)
        batches = [next(stream) for _ in range(5)]
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

    again = collect(photographs, 0, 1, 6, 0, 5)
    split = [collect(photographs, rank, 2, 3, 0, 5) for rank in range(2)]
    for step, batch in enumerate(batches):  # which one steps in depends on the position alone
        assert torch.equal(batch.L, again[step].L)
        assert torch.equal(batch.L, torch.cat([split[0][step].L, split[1][step].L]))

    results = list(evaluation_batches(photographs, CONFIG, world(), 4))
    counted = torch.cat([batch.sample[batch.weight > 0] for batch in results]).tolist()
    assert counted == [row for row in range(11) if row != bad]


def test_damage_that_some_crops_miss_is_judged_alike_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        with Loader(photographs, config, order_of(photographs), world(rank, size), 8 // size) as loader:
            batches = loader.batches(start)
            return [next(batches) for _ in range(steps)]

    builds = []
    original = pipeline.build
    monkeypatch.setattr(pipeline, "build", lambda *args: builds.append(0) or original(*args))
    whole = stream(0, 1, 0, 12)
    assert len(builds) == 2  # the first one, and one for the only batch that was found out by DALI
    planned = order_of(photographs).draw(np.arange(96, dtype=np.uint64)).sample
    seen = torch.cat([batch.sample for batch in whole]).numpy()
    used = (planned == 1) & (seen == 1)
    assert 3 < used.sum() < (planned == 1).sum() - 3
    for resumed_at in (3, 7):
        for before, after in zip(whole[resumed_at:], stream(0, 1, resumed_at, 12 - resumed_at), strict=True):
            assert torch.equal(before.sample, after.sample) and torch.equal(before.ab, after.ab)
    for step, (one, other) in enumerate(zip(stream(0, 2, 0, 12), stream(1, 2, 0, 12), strict=True)):
        assert torch.equal(whole[step].sample, torch.cat([one.sample, other.sample]))
        assert torch.equal(whole[step].L, torch.cat([one.L, other.L]))


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
def test_the_gpu_decodes_what_the_cpu_decodes(photographs: Photographs) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    cpu = next(iter(evaluation_batches(photographs, CONFIG, world(), 8)))
    there = SimpleNamespace(rank=0, size=1, local_size=1, device=torch.device("cuda", 0))
    gpu = next(iter(evaluation_batches(photographs, CONFIG, there, 8)))
    lossless = [i for i in range(8) if photographs.format_name(i) in ("PNG", "BMP", "TIFF")]
    assert torch.allclose(cpu.L[lossless], gpu.L[lossless].cpu(), atol=0.6)  # one level of the resize's rounding
    assert (cpu.ab - gpu.ab.cpu()).abs().mean() < 1
