"""Which of DALI's ways to decode a crop survive on this GPU, and which give the right pixels: steps of .ci/gpu.

    python -m benchmarks.gpu_decode matrix --work FOLDER [--dry]       # every way, every kind of file
    python -m benchmarks.gpu_decode under-load --work FOLDER [--dry]   # decoding while the GPU is busy
    python -m benchmarks.gpu_decode rate gpu --work FOLDER             # images/s of the Loader; or cpu, with [--dry]

FOLDER is what gpu_data has made. A decoder may crash, which nothing can catch. So each way of the matrix is tried in a
child, which says what came of each kind; where it dies or fails, the next child goes on with the kind after that.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from benchmarks.gpu_runner import Place, cannot, fact, name_of, place_parser, section
from benchmarks.harness import table
from dist_colorize.hardware import usable_cores

DALI_DEFAULT = 0.65
"""DALI's own hw_decoder_load: the share of JPEGs that goes to the JPEG engine of an A100, H100, ..."""


@dataclass(frozen=True)
class Way:
    """How a crop of an encoded image becomes pixels."""

    gpu: bool
    crops_first: bool
    """Whether only the crop is decoded (image_slice), or the image, which is then cut."""
    engine: float = 0.0
    """hw_decoder_load, on a GPU."""


REFERENCE = "image_slice, CPU"
WAYS = {
    REFERENCE: Way(False, True),
    "decode + slice, CPU": Way(False, False),
    "image_slice, engine 0": Way(True, True),
    "image_slice, engine 0.65": Way(True, True, DALI_DEFAULT),
    "decode + slice, engine 0": Way(True, False),
    "decode + slice, engine 0.65": Way(True, False, DALI_DEFAULT),
}
PRODUCT = "image_slice, engine 0"
"""What training does: this must work."""
MEAN_LEVELS = 4.0
"""Mean difference from the CPU's pixels, in levels of 255, that a GPU's decoder may have. It scales the chroma of 4:2:0
files in its own way, which is far off at few pixels; a wrong crop or orientation is far off at most of them."""
CHILD_SECONDS = 60.0
"""For all the kinds of a child; one that takes longer hangs."""
TOLD = 3
"""Exit code of a child that has told of an error."""
MOST_DEATHS = 3
"""Crashes or hangs after which a way to decode is given up."""

Sample = tuple[NDArray[np.uint8], tuple[int, int], tuple[int, int]]
"""Encoded bytes, anchor (y, x) and shape (h, w) of the crop, in pixels of the displayed image."""


def main() -> None:
    parser = place_parser(__doc__)
    parser.add_argument("step", choices=["matrix", "child", "under-load", "rate"])
    parser.add_argument("words", nargs="*", help="gpu or cpu, for rate; way and kinds, for a child of the matrix")
    arguments = parser.parse_args()
    place, words = Place(arguments.work, arguments.dry), arguments.words
    if arguments.step == "matrix":
        matrix(place)
    elif arguments.step == "child":
        child(place.work, words[0], words[1:])
    elif arguments.step == "under-load":
        under_load(place)
    else:
        rate(place, words[0])


# ---------------------------------------------------------------- the matrix


def matrix(place: Place) -> None:
    """Tries every way on every kind; SystemExit where the way that training goes does not work."""
    kinds = ["jpeg", *sorted(path.stem for path in (place.work / "odd").iterdir())]
    ways = [name for name, way in WAYS.items() if not (way.gpu and place.dry)]
    if place.dry:
        cannot("mixed decoding: needs a GPU")
    (place.work / "pixels").mkdir(exist_ok=True)
    found = {REFERENCE: each_kind(kinds, partial(start_child, place.work, REFERENCE))}
    others = [name for name in ways if name != REFERENCE]
    with ThreadPoolExecutor(min(len(others), usable_cores())) as pool:
        outcomes = pool.map(lambda name: each_kind(kinds, partial(start_child, place.work, name)), others)
        found |= dict(zip(others, outcomes, strict=True))

    rows = [[kind, *(found[name][kind] for name in ways)] for kind in kinds]
    section(f"### Decoders: largest (mean) difference from the CPU, in levels of 255\n\n{table(['', *ways], rows)}")
    fact(**{name: summary(found[name].values()) for name in ways})
    judged = others[0] if place.dry else PRODUCT
    wrong = [kind for kind in kinds if wrongly(found[REFERENCE][kind], found[judged][kind])]
    if wrong:
        raise SystemExit(f"{judged}: {', '.join(f'{kind} ({found[judged][kind]})' for kind in wrong)}")


@dataclass(frozen=True)
class Outcome:
    """What came of decoding one kind of file one way."""

    worst: float | None = None
    """Largest difference from the reference's pixels, in levels; None where there are no pixels, or other shapes."""
    mean: float | None = None
    failure: str = ""
    """The signal that ended the process, or the first line of the error."""

    def __str__(self) -> str:
        return self.failure or f"{self.worst:.0f} ({self.mean:.2f})"


def wrongly(reference: Outcome, judged: Outcome) -> bool:
    """Whether a way fails where the reference does not, or gives other pixels."""
    return not reference.failure and (bool(judged.failure) or not (judged.mean or 0.0) <= MEAN_LEVELS)


def summary(outcomes: Collection[Outcome]) -> str:
    done = [outcome for outcome in outcomes if not outcome.failure]
    worst = max((outcome.worst or 0.0 for outcome in done), default=0.0)
    mean = max((outcome.mean or 0.0 for outcome in done), default=0.0)
    failures = sorted({outcome.failure for outcome in outcomes if outcome.failure})
    words = [f"{len(done)} of {len(outcomes)} kinds", f"off by {worst:.0f} at most, {mean:.2f} in the mean of a kind"]
    return ", ".join([*words, *failures])


def start_child(work: Path, way: str, kinds: Sequence[str]) -> tuple[int | str, str]:
    """Exit code or signal of a child, or "hangs"; and what it printed."""
    command = [sys.executable, "-m", "benchmarks.gpu_decode", "--work", str(work), "child", way, *kinds]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, check=False, timeout=CHILD_SECONDS)
    except subprocess.TimeoutExpired as error:
        return "hangs", (error.stdout or b"").decode()
    return name_of(done.returncode), done.stdout.decode()


def each_kind(kinds: Sequence[str], start: Callable[[Sequence[str]], tuple[int | str, str]]) -> dict[str, Outcome]:
    """The outcome of every kind. `start` decodes kinds in a process, which tells of each and leaves with TOLD after the
    first error; any other end is the outcome of the kind that it has not told of. After MOST_DEATHS of them the rest is
    not tried: each costs seconds."""
    outcomes: dict[str, Outcome] = {}
    deaths = 0
    while left := [kind for kind in kinds if kind not in outcomes]:
        end, printed = start(left)
        for line in printed.splitlines():
            if line.startswith("["):  # else a library speaks
                kind, told = json.loads(line)
                outcomes[kind] = Outcome(**told)
        silent = [kind for kind in left if kind not in outcomes]
        if silent and end != TOLD:
            outcomes[silent[0]] = Outcome(failure=str(end))
            deaths += 1
        if deaths == MOST_DEATHS:
            outcomes |= dict.fromkeys(silent[1:], Outcome(failure=f"not tried after {MOST_DEATHS} deaths"))
    return outcomes


def child(work: Path, way: str, kinds: Sequence[str]) -> None:
    """Decodes kinds, and prints what came of each; ends after the first error, as a GPU's errors stay."""
    for kind in kinds:
        try:
            crops = decode(WAYS[way], samples(work, kind))
        except Exception as error:  # whatever DALI raises
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            print(json.dumps([kind, {"failure": reason[:80]}]), flush=True)
            raise SystemExit(TOLD) from None
        pixels = work / "pixels" / f"{kind}.npz"
        if way == REFERENCE:
            np.savez(pixels, *crops)
        print(json.dumps([kind, compare(crops, pixels)]), flush=True)


def compare(crops: Sequence[NDArray[np.uint8]], pixels: Path) -> dict[str, Any]:
    """The fields of an Outcome: crops against those that the reference has left in a file."""
    if not pixels.exists():
        return {"failure": "decodes, as the CPU does not"}
    with np.load(pixels) as file:
        reference = list(file.values())
    if [crop.shape for crop in crops] != [crop.shape for crop in reference]:
        return {"failure": "another shape"}
    off = np.concatenate([np.abs(a.astype(int) - b).ravel() for a, b in zip(crops, reference, strict=True)])
    return {"worst": float(off.max()), "mean": float(off.mean())}


def samples(work: Path, kind: str) -> list[Sample]:
    """Crops of a kind of file, the same ones in every process: of 64 photographs, or 8 of the one odd file."""
    if kind == "jpeg":
        paths = sorted((work / "photographs").iterdir())[:64]
    else:
        paths = list((work / "odd").glob(f"{kind}.*")) * 8
    chance = random.Random(zlib.crc32(kind.encode()))
    return [sample(path, chance) for path in paths]


def sample(path: Path, chance: random.Random) -> Sample:
    encoded = path.read_bytes()
    with Image.open(path) as image:
        width, height = ImageOps.exif_transpose(image).size
    w, h = (chance.randint(max(1, side // 3), side) for side in (width, height))
    return np.frombuffer(encoded, np.uint8), (chance.randint(0, height - h), chance.randint(0, width - w)), (h, w)


def decode(way: Way, batch: Sequence[Sample]) -> list[NDArray[np.uint8]]:
    """The crops, uint8 [h, w, 3] sRGB."""
    (output,) = pipeline(way, iter([batch]), len(batch), size=None).run()
    return [np.array(crop) for crop in output.as_cpu()]


def pipeline(way: Way, batches: Iterator[Sequence[Sample]], batch: int, size: int | None) -> Any:
    """A pipeline of one output: crops as they are, or resized to size x size."""
    from nvidia.dali import fn, pipeline_def, types

    def source() -> tuple[list[NDArray[np.uint8]], NDArray[np.int32], NDArray[np.int32]]:
        encoded, anchors, shapes = zip(*next(batches), strict=True)
        return list(encoded), np.array(anchors, np.int32), np.array(shapes, np.int32)

    @pipeline_def
    def define() -> Any:
        encoded, anchor, shape = fn.external_source(
            source, num_outputs=3, batch=True, dtype=[types.UINT8, types.INT32, types.INT32], ndim=[1, 1, 1]
        )
        where: dict[str, Any] = {"device": "cpu"}
        if way.gpu:
            where = {"device": "mixed", "hw_decoder_load": way.engine}
        if way.crops_first:
            image = fn.decoders.image_slice(encoded, anchor, shape, axis_names="HW", output_type=types.RGB, **where)
        else:
            image = fn.slice(fn.decoders.image(encoded, output_type=types.RGB, **where), anchor, shape, axis_names="HW")
        if size is None:
            return image
        return fn.resize(image, size=[size, size], interp_type=types.INTERP_LINEAR, antialias=True)

    built = define(
        batch_size=batch,
        num_threads=min(8, usable_cores()),
        device_id=0 if way.gpu else None,
        prefetch_queue_depth=2,
    )
    built.build()
    return built


# ---------------------------------------------------------------- decoding under load


def under_load(place: Place) -> None:
    """Decodes the same batches while nothing else runs and while large matrix products do. SystemExit where bits differ
    although the JPEG engine is not used; with the engine they are known to differ on an H100."""
    import torch

    count, batch, side, product = (4, 8, 64, 256) if place.dry else (100, 32, 224, 8192)
    device = torch.device("cpu" if place.dry else "cuda")
    paths = sorted((place.work / "photographs").iterdir())
    chance = random.Random(0)
    drawn = [[sample(paths[(n * batch + i) % len(paths)], chance) for i in range(batch)] for n in range(count)]
    differing = {}
    for name, way in WAYS.items():
        if way.gpu == place.dry or not way.crops_first:
            continue
        idle = list(decoded(way, drawn, side, device))
        again = sum(not torch.equal(a, b) for a, b in zip(idle, decoded(way, drawn, side, device), strict=True))
        with busy(device, product):
            loaded = [torch.equal(a, b) for a, b in zip(idle, decoded(way, drawn, side, device), strict=True)]
        differing[name] = loaded.count(False)
        fact(**{name: f"{differing[name]} of {count} batches differ under load, {again} when idle again"})
    if place.dry:
        cannot("mixed decoding: needs a GPU")
    judged = REFERENCE if place.dry else PRODUCT
    if differing[judged]:
        raise SystemExit(f"{judged}: other pixels in {differing[judged]} of {count} batches while the GPU is busy")


def decoded(way: Way, batches: Sequence[Sequence[Sample]], side: int, device: Any) -> Iterator[Any]:
    """uint8 [B, side, side, 3] on the device for each batch, handed from DALI to torch as training does it."""
    import torch
    from nvidia.dali.plugin.pytorch import feed_ndarray

    running = pipeline(way, iter(batches), len(batches[0]), side)
    stream = torch.cuda.Stream(device) if way.gpu else None
    for _ in batches:
        (output,) = running.run()
        dense = output.as_tensor()
        with torch.cuda.stream(stream):
            pixels = torch.empty(dense.shape(), dtype=torch.uint8, device=device)
            feed_ndarray(dense, pixels, cuda_stream=stream)
        if stream is not None:
            stream.synchronize()  # DALI's memory is free for another batch from here on
        yield pixels


@contextmanager
def busy(device: Any, side: int) -> Iterator[None]:
    """Keeps the device busy with matrix products of side^3 in another stream."""
    import torch

    stop = threading.Event()

    def work() -> None:
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with torch.cuda.stream(stream):
            matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16 if stream else torch.float32)
            while not stop.is_set():
                for _ in range(8):
                    torch.mm(matrix, matrix)
                if stream:
                    stream.synchronize()

    thread = threading.Thread(target=work, name="busy")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


# ---------------------------------------------------------------- the loader alone


def rate(place: Place, kind: str) -> None:
    """Images/s of the training's Loader with data.device=`kind`, files to L and ab on the device that trains."""
    import torch

    from dist_colorize.data import DataConfig, Loader, Order, open_photographs
    from dist_colorize.distributed import DistributedConfig, session
    from dist_colorize.stopping import StopFlag

    batch, warm, timed, crop = (4, 4, 8, 64) if place.dry else (64, 16, 100, 224)
    config = DataConfig(root=str(place.work / "photographs"), crop=crop, device=kind)
    with session(DistributedConfig()) as world, StopFlag() as stop:
        photographs, _ = open_photographs(config, world, stop)
        order = Order(len(photographs), photographs.fingerprint, seed=0)
        with Loader(photographs, config, order, world, batch) as loader:
            batches = loader.batches()
            for _ in islice(batches, warm):
                pass
            begin = time.perf_counter()
            for _ in islice(batches, timed):
                pass
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            fact(images_per_second=timed * batch / (time.perf_counter() - begin))


if __name__ == "__main__":
    main()
