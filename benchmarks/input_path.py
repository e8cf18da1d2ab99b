"""Files to L and ab: our Loader against four hand-made input pipelines, on the same crops of the same photographs.

    python -m benchmarks.input_path            # about 4 minutes on 2 cores

The photographs are random stretches of scikit-image's eight colour photographs as JPEGs of quality 75 to 95, once
resized to a short side of 256 px, once as they are, up to 1024 px. Crops and flips are those of our order for everyone.

    DataLoader + PIL + scikit-image    2 worker processes
    torchvision v2 + kornia            2 worker processes
    OpenCV                             2 threads: imdecode, resize (INTER_AREA where it shrinks), float32 cvtColor
    OpenCV + numba                     2 threads: as before, but flip and Lab in one compiled pass, with our own formula
    decoding alone                     our Loader without what follows DALI's decoder: what is left to gain

Labels at stride 2 are made from ab by the training step; their time is printed, and is not part of any contestant's.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import random
import sys
import tempfile
import time
import timeit
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, redirect_stderr
from functools import partial
from io import StringIO
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import cv2
import kornia
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from skimage import data
from skimage.color import rgb2lab
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms.v2 import functional as transforms

from benchmarks import harness
from benchmarks.harness import Times, machine, table, verdict
from dist_colorize.color.gamut import Gamut
from dist_colorize.color.rebalance import LossConfig, class_weights, count_cells, prior
from dist_colorize.compiled import compiled
from dist_colorize.data import histogram, pipeline
from dist_colorize.data.catalog import build_index
from dist_colorize.data.columns import Photographs, open_index
from dist_colorize.data.config import DataConfig
from dist_colorize.data.finish import LINEAR, finish, lab_of_row
from dist_colorize.data.loader import Loader, evaluation_batches
from dist_colorize.data.order import Order
from dist_colorize.data.plan import Plan, training_plans
from dist_colorize.distributed import DistributedConfig, session
from dist_colorize.stopping import StopFlag

BATCH = 16
CORES = 2
SIZE = DataConfig.crop
GAMUT = Gamut()
PHOTOGRAPHS = 256
BATCHES = 64
"""The work of the peers, again and again; ours goes on in the stream."""
AHEAD = 8
"""Batches taken before the clock starts, more than any contestant makes ahead."""

BY_HAND = "OpenCV + numba"
CEILING = "decoding alone"
SLOW = ("DataLoader + PIL + scikit-image", "torchvision v2 + kornia")
SETS: dict[str, tuple[int | None, dict[str, float]]] = {
    "short side 256": (256, {SLOW[0]: 6, BY_HAND: 0.9}),
    "up to 1024 px": (None, {BY_HAND: 1.1}),
}
"""The short side that photographs are shrunk to; how many times faster than a peer we mean to be."""

Lab = tuple[Tensor, Tensor]
"""L float32 [B, 1, SIZE, SIZE] and ab float32 [B, 2, SIZE, SIZE]."""
Stream = Generator[Lab, None, None]
RGB = NDArray[np.uint8]
Convert = Callable[[RGB, bool, Any, Any], None]


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)  # the threads are ours, one photograph each
    print(machine("torch", "torchvision", "nvidia-dali-cuda130", "opencv-python-headless", "numba", "kornia"))
    with tempfile.TemporaryDirectory() as folder:
        busy, counts = {}, {}
        for name, (short_side, goals) in SETS.items():
            photographs = make_photographs(Path(folder, name), short_side)
            contestants = streams(photographs)
            ours_first = contestants["ours"]
            differences = {name: difference(contestants[name], ours_first) for name in CONVERSIONS if name != "ours"}
            turns = {peer: partial(stretch_of, contestants[peer], 12 if peer in SLOW else 48) for peer in contestants}
            times, busy[name] = take_turns(turns)
            print(f"\n{name}\n\n{speeds(times, busy[name], differences, goals)}")
            counts[name] = counting(photographs)
            errors = sampling_error(photographs)
    print(f"\nLab of the same 8-bit images, against scikit-image in double precision\n\n{accuracy()}")
    print(f"\nWhere our time goes\n\n{parts(busy)}")
    print(f"\nThe class histogram's pass\n\n{histogram_speeds(counts)}")
    print(f"\nClass weights from a share of the photographs\n\n{errors}")
    return 0


# ------------------------------------------------------------ the photographs and the work


def make_photographs(folder: Path, short_side: int | None) -> Photographs:
    folder.mkdir()
    generator = np.random.default_rng(0)
    names = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina")
    sources = [
        Image.fromarray(image) for image in (*(getattr(data, n)() for n in names), *data.stereo_motorcycle()[:2])
    ]
    for number in range(PHOTOGRAPHS):
        source = sources[number % len(sources)]
        width, height = (generator.uniform(0.6, 1, 2) * source.size).astype(int)
        x, y = generator.integers(0, np.array(source.size) - (width, height) + 1)
        scale = short_side / min(width, height) if short_side else min(1, 1024 / max(width, height))
        box = (x, y, x + width, y + height)
        image = source.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS, box)
        image.save(folder / f"{number}.jpg", quality=int(generator.integers(75, 96)))
    return open_index(build_index(folder, 32, folder.parent / "index"))


def plans_of(photographs: Photographs) -> Iterator[Plan]:
    order = Order(len(photographs), photographs.fingerprint, 0)
    # [BATCHES * BATCH] -> [BATCHES, BATCH]
    positions = np.arange(BATCHES * BATCH, dtype=np.uint64).reshape(BATCHES, BATCH)
    return training_plans(photographs, DataConfig(), order, positions)


Task = tuple[str, tuple[int, int, int, int], bool]
"""Path, (x, y, width, height), mirrored."""


def tasks(photographs: Photographs, plan: Plan) -> list[Task]:
    x, y, width, height, flip = (column.tolist() for column in plan.crops)
    paths = [f"{photographs.root}/{photographs.name(row)}" for row in plan.row]
    return list(zip(paths, zip(x, y, width, height, strict=True), flip, strict=True))


# ------------------------------------------------------------ the contestants


def streams(photographs: Photographs) -> dict[str, Callable[[], Stream]]:
    work = [tasks(photographs, plan) for plan in plans_of(photographs)]
    return {
        "ours": partial(ours, photographs),
        SLOW[0]: partial(in_processes, work, with_pillow),
        SLOW[1]: partial(in_processes, work, with_torchvision),
        "OpenCV": partial(in_threads, work, lab_by_opencv),
        BY_HAND: partial(in_threads, work, lab_by_numba),
        CEILING: partial(decoding_alone, photographs),
    }


def one_rank() -> Any:
    return SimpleNamespace(rank=0, size=1, local_size=1, device=torch.device("cpu"))


def ours(photographs: Photographs) -> Stream:
    order = Order(len(photographs), photographs.fingerprint, 0)
    with Loader(photographs, DataConfig(threads=CORES), order, one_rank(), BATCH) as loader:
        for batch in loader.batches():
            yield batch.L, batch.ab


def decoding_alone(photographs: Photographs) -> Stream:
    encoded = {row: np.frombuffer(photographs.read(row), np.uint8) for row in range(len(photographs))}
    batches = cycle(
        (
            [encoded[row] for row in plan.row.tolist()],
            np.stack([plan.crops.y, plan.crops.x], axis=1),
            np.stack([plan.crops.height, plan.crops.width], axis=1),
            plan.crops.flip.astype(np.int32),
        )
        for plan in plans_of(photographs)
    )
    dali = pipeline.build(lambda: next(batches), BATCH, SIZE, CORES, "cpu", None, whole=False)
    nothing = torch.empty(0)
    while True:
        dali.run()
        yield nothing, nothing


class Photos(Dataset[Lab]):
    def __init__(self, work: list[list[Task]], load: Callable[[Task], Lab]) -> None:
        self.work, self.load = [task for batch in work for task in batch], load

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> Lab:
        return self.load(self.work[index % len(self.work)])


def in_processes(work: list[list[Task]], load: Callable[[Task], Lab]) -> Stream:
    yield from map(tuple, DataLoader(Photos(work, load), BATCH, num_workers=CORES))


def with_pillow(task: Task) -> Lab:
    path, (x, y, width, height), mirrored = task
    with Image.open(path) as image:
        crop = image.convert("RGB").crop((x, y, x + width, y + height))
        rgb = np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    return planes(lab_by_scikit_image, rgb, mirrored)


def with_torchvision(task: Task) -> Lab:
    path, (x, y, width, height), mirrored = task
    image = decode_image(read_file(path), ImageReadMode.RGB)
    image = transforms.resized_crop(image, y, x, height, width, [SIZE, SIZE], antialias=True)
    lab = kornia.color.rgb_to_lab((transforms.horizontal_flip(image) if mirrored else image).float() / 255)
    return lab[:1], lab[1:]


def in_threads(work: list[list[Task]], convert: Convert) -> Stream:
    with ThreadPoolExecutor(CORES) as pool:
        ready: deque[tuple[Tensor, Tensor, Iterator[None]]] = deque()
        for batch in cycle(work):
            L, ab = torch.empty(BATCH, 1, SIZE, SIZE), torch.empty(BATCH, 2, SIZE, SIZE)
            ready.append((L, ab, pool.map(partial(with_opencv, convert), batch, L.numpy()[:, 0], ab.numpy())))
            if len(ready) > 2:
                L, ab, done = ready.popleft()
                list(done)
                yield L, ab


def with_opencv(convert: Convert, task: Task, L: Any, ab: Any) -> None:
    path, (x, y, width, height), mirrored = task
    image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR_RGB)
    method = cv2.INTER_AREA if width > SIZE or height > SIZE else cv2.INTER_LINEAR
    convert(cv2.resize(image[y : y + height, x : x + width], (SIZE, SIZE), interpolation=method), mirrored, L, ab)


# ------------------------------------------------------------ Lab, of uint8 [SIZE, SIZE, 3] into L and ab


def lab_by_scikit_image(rgb: RGB, mirrored: bool, L: Any, ab: Any) -> None:
    lab = rgb2lab(rgb[:, ::-1] if mirrored else rgb)
    L[:], ab[0], ab[1] = lab[..., 0], lab[..., 1], lab[..., 2]


def lab_by_kornia(rgb: RGB, mirrored: bool, L: Any, ab: Any) -> None:
    image = torch.from_numpy(rgb).permute(2, 0, 1)
    lab = kornia.color.rgb_to_lab((transforms.horizontal_flip(image) if mirrored else image).float() / 255)
    L[:], ab[:] = lab[0], lab[1:]


def lab_by_opencv(rgb: RGB, mirrored: bool, L: Any, ab: Any) -> None:
    lab = cv2.cvtColor((cv2.flip(rgb, 1) if mirrored else rgb).astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    L[:], ab[0], ab[1] = cv2.split(lab)


@compiled
def lab_by_numba(rgb: RGB, mirrored: bool, L: Any, ab: Any) -> None:
    red, green, blue = np.empty(SIZE, np.float32), np.empty(SIZE, np.float32), np.empty(SIZE, np.float32)
    for y in range(SIZE):
        for x in range(SIZE):
            at = SIZE - 1 - x if mirrored else x
            red[at], green[at], blue[at] = LINEAR[rgb[y, x, 0]], LINEAR[rgb[y, x, 1]], LINEAR[rgb[y, x, 2]]
        lab_of_row(red, green, blue, L[y], ab[0, y], ab[1, y])


CONVERSIONS: dict[str, Convert] = {
    "ours": finish,
    SLOW[0]: lab_by_scikit_image,
    SLOW[1]: lab_by_kornia,
    "OpenCV": lab_by_opencv,
    BY_HAND: lab_by_numba,
}


def planes(convert: Convert, rgb: RGB, mirrored: bool = False) -> Lab:
    L, ab = torch.empty(1, SIZE, SIZE), torch.empty(2, SIZE, SIZE)
    convert(rgb, mirrored, L.numpy()[0], ab.numpy())
    return L, ab


# ------------------------------------------------------------ what is measured


def take_turns(
    contestants: Mapping[str, Callable[[], tuple[float, float]]], rounds: int = harness.ROUNDS
) -> tuple[Times, Times]:
    """Seconds and processor seconds per image, as the contestants' turns give them."""
    shuffled = random.Random(0)
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name in shuffled.sample(list(contestants), len(contestants)):
            gc.collect()
            turns[name].append(contestants[name]())
    elapsed, busy = ({name: [turn[clock] for turn in turns[name]] for name in turns} for clock in range(2))
    return Times(elapsed), Times(busy)


def stretch_of(stream: Callable[[], Stream], batches: int) -> tuple[float, float]:
    """A turn from the AHEAD-th batch on: what lay ready by then does not count."""
    with closing(stream()) as running:
        deque(islice(running, AHEAD), maxlen=0)
        return clocked(lambda: deque(islice(running, batches), maxlen=0), batches * BATCH)


def clocked(work: Callable[[], object], images: int) -> tuple[float, float]:
    start, used = time.perf_counter(), processor_seconds()
    work()
    return (time.perf_counter() - start) / images, (processor_seconds() - used) / images


def processor_seconds() -> float:
    """Of this process and its workers; other programs on the machine hardly change it."""
    workers = [Path(f"/proc/{worker.pid}/stat").read_text() for worker in multiprocessing.active_children()]
    # after the name, which may hold spaces: state is field 3, user and system time are fields 14 and 15
    ticks = sum(sum(map(int, text.rpartition(")")[2].split()[11:13])) for text in workers)
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def difference(stream: Callable[[], Stream], reference: Callable[[], Stream]) -> float:
    """Mean |Lab difference| of the first batch: other decoders and filters, but the same crops, the same way round."""
    with closing(stream()) as these, closing(reference()) as those:
        first, other = (torch.cat(next(batches), dim=1) for batches in (these, those))
    return float((first - other).abs().mean())


def speeds(times: Times, busy: Times, differences: dict[str, float], goals: dict[str, float]) -> str:
    rows = []
    for name in times.seconds:
        ratio = times.ratio("ours", name)
        met = verdict(ratio, goals[name]) if name in goals else ""
        work = [1000 * busy.of(name), busy.ratio("ours", name)]
        rows.append([name, 1 / times.of(name), ratio, met, *work, differences.get(name, "")])
    head = ["", "images/s", "ours is faster by", "goal", "processor ms an image", "ours needs less by"]
    return table([*head, "mean Lab difference to ours"], rows)


def accuracy() -> str:
    images = [getattr(data, name)()[:SIZE, :SIZE].copy() for name in ("astronaut", "chelsea", "coffee", "retina")]
    expected = [torch.from_numpy(np.ascontiguousarray(rgb2lab(image / 255.0).transpose(2, 0, 1))) for image in images]
    labels = torch.stack([labels_of(lab[None, 1:]) for lab in expected])
    rows = []
    for name, convert in CONVERSIONS.items():
        found = [torch.cat(planes(convert, image)) for image in images]
        error = max(float((mine - true).abs().max()) for mine, true in zip(found, expected, strict=True))
        equal = float((torch.stack([labels_of(lab[None, 1:]) for lab in found]) == labels).double().mean())
        met = f"{verdict(error, 0.1, at_most=True)}, {verdict(100 * equal, 99.9)}" if name == "ours" else ""
        rows.append([name, f"{error:.1g}", f"{100 * equal:.3f}", met])
    return table(["", "greatest Lab error", "equal labels, %", "goal"], rows)


def labels_of(ab: Tensor) -> Tensor:
    return GAMUT.nearest(F.avg_pool2d(ab, 2))


def parts(busy: dict[str, Times]) -> str:
    rgb = data.astronaut()[:SIZE, :SIZE].copy()
    L, ab = torch.zeros(SIZE, SIZE), torch.zeros(1, 2, SIZE, SIZE)
    into = L.numpy(), ab.numpy()[0]
    torch.set_num_threads(1)
    lab, finished, labels = (
        1000 * median(timeit.repeat(work, number=50, repeat=9, timer=time.process_time)) / 50
        for work in (lambda: lab_by_numba(rgb, False, *into), lambda: finish(rgb, False, *into), lambda: labels_of(ab))
    )
    rows = []
    for name, of in busy.items():
        whole, decoding = (1000 * of.of(which) for which in ("ours", CEILING))
        share = 100 * lab / whole
        rows.append([name, whole, decoding, finished, lab, share, verdict(share, 15, at_most=True), labels])
    head = ["processor ms an image", "in all", "decoding", "resize, flip, Lab at 224 px", "Lab alone", "its share, %"]
    return table([*head, "goal", "labels, in the step"], rows)


def counting(photographs: Photographs) -> tuple[Times, Times]:
    """The pass that counts colours, and the same batches made with nothing done to them."""
    config, stop = DataConfig(threads=CORES), StopFlag()
    with session(DistributedConfig(device="cpu")) as world, redirect_stderr(StringIO()):
        ways = {
            "counted": lambda: histogram._count(photographs, config, world, stop, []),
            "made": lambda: deque(evaluation_batches(photographs, config, world, histogram.BATCH), maxlen=0),
        }
        # a turn is a fifth of a second here: too short for five of them to tell 1 % from 5 %
        return take_turns({name: partial(clocked, way, len(photographs)) for name, way in ways.items()}, rounds=21)


def histogram_speeds(counts: dict[str, tuple[Times, Times]]) -> str:
    rows = []
    for name, (times, busy) in counts.items():
        share = 100 * times.ratio("counted", "made")
        work = (1000 * busy.of(way) for way in ("counted", "made"))
        rows.append([name, 1 / times.of("counted"), 1 / times.of("made"), share, verdict(share, 90), *work])
    head = ["", "counted, images/s", "only made, images/s", "share, %", "goal"]
    return table([*head, "processor ms an image, counted", "made"], rows)


def sampling_error(photographs: Photographs) -> str:
    """Class weights from n photographs, drawn with replacement, against those from all: photographs count as wholes, as
    the pixels of one are no independent draws."""
    config, share = DataConfig(threads=CORES), LossConfig()
    each = [
        prior(count_cells(ab[None]), share)
        for batch in evaluation_batches(photographs, config, one_rank(), BATCH)
        for ab in batch.ab
    ]
    shares = torch.stack(each).numpy()
    generator, rows = np.random.default_rng(0), []
    truth = class_weights(torch.from_numpy(shares.mean(axis=0)), share.rebalance).numpy()
    for number in (100, 1000, 10_000, 100_000):
        drawn = generator.multinomial(number, np.full(len(shares), 1 / len(shares)), size=200) / number
        weights = [class_weights(torch.from_numpy(p), share.rebalance).numpy() for p in drawn @ shares]
        error = 100 * np.abs(np.stack(weights) / truth - 1)
        # of the classes that have a pixel among ten thousand; the others' weights hardly move
        seen = shares.mean(axis=0) > 1e-4
        rows.append([f"{number:,}", *np.quantile(error[:, seen], (0.5, 0.95)).tolist(), float(error.max())])
    return table(["photographs counted", "error of a weight, %: median", "95th percentile", "worst class"], rows)


if __name__ == "__main__":
    sys.exit(main())
