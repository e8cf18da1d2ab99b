"""The DALI pipeline against scikit-image and Pillow."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import pyvips
import torch
from conftest import rank_environment
from PIL import Image, ImageOps
from skimage import data as photos
from skimage.color import rgb2lab

from dist_colorize.data import pipeline
from dist_colorize.data.finish import finish, finish_batch

WORKER = Path(__file__).parent / "workers" / "decode_under_load.py"


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


def by_operators(
    files: Sequence[bytes], anchor: Any, shape: Any, size: int, flips: Sequence[int], device: Literal["cpu", "gpu"]
) -> np.ndarray:
    """Crops of files at (y, x), (height, width), as Lab [B, size, size, 3], by the graph that a GPU runs."""
    _dali, planes = run_dali(files, anchor, shape, size, flips, whole=True, device=device)
    # [B, 3, S, S] -> [B, S, S, 3]
    return np.concatenate([np.array(plane.as_cpu().as_tensor()) for plane in planes], axis=1).transpose(0, 2, 3, 1)


def in_one_pass(files: Sequence[bytes], anchor: Any, shape: Any, size: int, flips: Sequence[int]) -> np.ndarray:
    """The same by the pass that follows DALI on a CPU."""
    _dali, (crops, mirrored) = run_dali(files, anchor, shape, size, flips, whole=False)
    with ThreadPoolExecutor(2) as workers:
        L, ab = finish_batch([np.asarray(crop) for crop in crops], mirrored.as_array() != 0, size, workers, 2)
    # [B, 3, S, S] -> [B, S, S, 3]
    return torch.cat([L, ab], dim=1).permute(0, 2, 3, 1).numpy()


def run_dali(
    files: Sequence[bytes],
    anchor: Any,
    shape: Any,
    size: int,
    flips: Sequence[int],
    whole: bool,
    device: Literal["cpu", "gpu"] = "cpu",
) -> Any:
    encoded = [np.frombuffer(file, dtype=np.uint8) for file in files]
    plan = [np.array(column, dtype=np.int32) for column in (anchor, shape, flips)]
    batches = iter([(encoded, *plan)])
    gpu = 0 if device == "gpu" else None
    dali = pipeline.build(lambda: next(batches), len(files), size, 1, device, gpu, whole)
    return dali, dali.run()  # the memory of what it puts out is the pipeline's


on_cpu, on_gpu = partial(by_operators, device="cpu"), partial(by_operators, device="gpu")
gpu_way = pytest.param(on_gpu, marks=[pytest.mark.gpu, pytest.mark.own_process], id="on_gpu")
all_ways = pytest.mark.parametrize(
    "lab_of", [pytest.param(on_cpu, id="by_operators"), pytest.param(in_one_pass, id="in_one_pass"), gpu_way]
)
LOSSY = ("jpeg", "webp")


@all_ways
@pytest.mark.parametrize("name", list(real_photographs()))
def test_lab_of_every_kind_of_file_equals_scikit_image(name: str, lab_of: Way) -> None:
    image = real_photographs()[name].resize((240, 150))
    files = encodings(image)
    # The anchor is off-centre, so that a box in the undisplayed frame would show something else.
    n = len(files)
    lab = lab_of(list(files.values()), [(5, 11)] * n, [(128, 128)] * n, 128, [0] * n)
    for got, (kind, file) in zip(lab, files.items(), strict=True):
        error = np.abs(got - rgb2lab(displayed(kind, file, image)[5 : 5 + 128, 11 : 11 + 128]))
        if lab_of is not on_gpu:
            assert error.max() < 1e-3, kind
        elif kind.startswith(LOSSY):
            # a GPU rounds and interpolates chroma in its own way: 0.3 and 1 on average; one pixel aside L is off by 2
            assert error[..., 0].mean() < 1 and error.mean() < 3, kind
        else:
            assert error.max() < 2 and error.mean() < 0.1, kind  # a level of 255 here and there


@all_ways
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
    assert np.abs(lab - rgb2lab(image)).max() < (1e-3 if lab_of is on_gpu else 5e-4)


@all_ways
def test_flipped_crops_are_mirrored(lab_of: Way) -> None:
    file = encode(real_photographs()["coffee"], "PNG")
    plain, mirrored = lab_of([file, file], [(100, 200)] * 2, [(96, 96)] * 2, 96, [0, 1])
    assert np.abs(plain - mirrored[:, ::-1]).max() <= (1e-3 if lab_of is on_gpu else 0)


@all_ways
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


@pytest.mark.parametrize("graph", [pytest.param(on_cpu, id="by_operators"), gpu_way])
@pytest.mark.parametrize("size", [48, 96, 224])
def test_the_pass_on_the_cpu_equals_the_graph_of_the_gpu(size: int, graph: Way) -> None:
    """But for a level of 255 here and there: DALI's resize takes its filter from a table."""
    n, file = len(SHAPES), encode(real_photographs()["coffee"], "PNG")
    many = ([file] * n, [(0, 0)] * n, SHAPES, size, [k % 2 for k in range(n)])
    difference = np.abs(graph(*many) - in_one_pass(*many))
    assert difference.max() < 5
    assert difference.mean() < (0.1 if graph is on_gpu else 0.02)


@pytest.mark.parametrize(("device", "load"), [("gpu", 0.0), ("gpu", 0.25), ("cpu", None)], ids=["0", "0.25", "cpu"])
def test_the_jpeg_engine_gets_its_share_on_a_gpu(monkeypatch: pytest.MonkeyPatch, device: str, load: Any) -> None:
    asked: list[dict[str, Any]] = []
    decoders = SimpleNamespace(image_slice=lambda *inputs, **settings: asked.append(settings))
    monkeypatch.setattr(pipeline, "fn", SimpleNamespace(decoders=decoders))
    pipeline._decode(None, None, None, device, load)
    assert asked[0]["device"] == ("mixed" if device == "gpu" else "cpu")
    assert asked[0].get("hw_decoder_load") == load


@pytest.mark.gpu
@pytest.mark.parametrize("hw_decoder_load", [0.0, 0.65])
def test_a_busy_gpu_decodes_the_same_pixels(hw_decoder_load: float) -> None:
    """With 0.65, DALI's default, GPUs with a JPEG engine that ignores the order of streams may fail: hence our 0."""
    command = [sys.executable, str(WORKER), str(hw_decoder_load)]
    done = subprocess.run(command, capture_output=True, text=True, env=rank_environment(), timeout=300, check=False)
    assert done.returncode == 0, f"left with {done.returncode}\n{done.stderr}"
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["busy"] > 0.9 * counts["batches"]
    if counts["wrong"] and hw_decoder_load:
        pytest.xfail(
            f"the JPEG engine of {torch.cuda.get_device_name()}: {counts['wrong']} of {counts['batches']} wrong"
        )
    assert counts["wrong"] == 0
