"""Makes what the other steps of .ci/gpu work on; nothing is downloaded.

python -m benchmarks.gpu_data --work FOLDER [--dry]

FOLDER/photographs/     2,000 JPEGs of 256 to 1024 px a side, half of them cut from scikit-image's photographs, half
                        random clouds of color; indexed, as training will want them (XDG_CACHE_HOME)
FOLDER/validation/      32 more, indexed too
FOLDER/archive/         300 more for postprocess; each fifth is a PNG, so that results can be compared without loss
FOLDER/odd/             one file of each kind that a decoder may trip over
FOLDER/vgg16_bn.pt      a state dict of VGG16-BN with random weights
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.gpu_runner import Place, fact, place_parser
from benchmarks.step import pretrained
from dist_colorize.data.catalog import ensure_index
from dist_colorize.data.config import DataConfig
from dist_colorize.data.photos import SAMPLES, sample_photographs
from dist_colorize.hardware import usable_cores

ENCODER = "vgg16_bn.pt"
MADE = "made"
"""A file that says of what size all is there."""
ORIENTATION = 0x0112
"""EXIF tag: 1 to 8, how the picture is to be turned and mirrored for display."""


@dataclass(frozen=True)
class Amount:
    photographs: int
    validation: int
    archive: int
    sides: tuple[int, int]
    """Least and greatest side, in pixels."""


FULL, DRY = Amount(2000, 32, 300, (256, 1024)), Amount(48, 4, 6, (64, 160))


def main() -> None:
    arguments = place_parser(__doc__).parse_args()
    make(Place(arguments.work, arguments.dry))


def make(place: Place) -> None:
    amount, made = DRY if place.dry else FULL, place.work / MADE
    if made.exists() and made.read_text() == str(amount):
        fact(made="earlier")
        return
    begin = time.monotonic()
    samples()  # read once, before the threads ask for them
    with ThreadPoolExecutor(usable_cores()) as pool:
        first = 0
        for folder in ("photographs", "validation", "archive"):
            (place.work / folder).mkdir(parents=True, exist_ok=True)
            count = getattr(amount, folder)
            paths = [place.work / folder / f"{n:04}.{suffix(folder, n)}" for n in range(count)]
            list(pool.map(lambda path, n: write(path, photograph(n, amount.sides)), paths, range(first, first + count)))
            first += count
    odd = make_odd(place.work / "odd", photograph(0, (250, 350)))
    drawn = time.monotonic()
    for folder in ("photographs", "validation"):
        ensure_index(place.work / folder, DataConfig().min_side)
    indexed = time.monotonic()
    weights = {f"features.{name}": value for name, value in pretrained().state_dict().items()}
    torch.save(weights, place.work / ENCODER)
    made.write_text(str(amount))
    fact(pictures=first + odd, odd=odd)
    fact(seconds_to_make=round(drawn - begin, 1), seconds_to_index=round(indexed - drawn, 1))


def suffix(folder: str, number: int) -> str:
    return "png" if folder == "archive" and number % 5 == 0 else "jpg"


def write(path: Path, picture: Image.Image) -> None:
    options = {"compress_level": 1} if path.suffix == ".png" else {"quality": 75 + int(path.stem) % 20}
    picture.save(path, **options)


@cache
def samples() -> list[Image.Image]:
    """scikit-image's photographs."""
    folder = sample_photographs()
    return [Image.open(folder / name).convert("RGB") for name in SAMPLES]


def photograph(number: int, sides: tuple[int, int]) -> Image.Image:
    """The same picture for the same number."""
    random = np.random.default_rng(number)
    width, height = random.integers(sides[0], sides[1] + 1, 2).tolist()
    if number % 2:
        coarse = random.integers(0, 256, (*random.integers(3, 12, 2), 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    source = samples()[number // 2 % len(SAMPLES)]
    part = (random.uniform(0.5, 1, 2) * source.size).astype(int)
    corner = random.integers(0, np.array(source.size) - part + 1)
    return source.resize((width, height), Image.Resampling.BILINEAR, (*corner, *(corner + part)))


def make_odd(folder: Path, picture: Image.Image) -> int:
    """One file of each kind, NAME.SUFFIX; how many there are."""
    folder.mkdir(parents=True, exist_ok=True)

    def jpeg(name: str, image: Image.Image = picture, **options: object) -> None:
        image.save(folder / f"{name}.jpg", quality=90, **options)

    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        jpeg(f"exif-{orientation}", exif=exif)
    jpeg("gray", picture.convert("L"))
    jpeg("cmyk", picture.convert("CMYK"))
    jpeg("progressive", progressive=True)
    jpeg("444", subsampling="4:4:4")
    jpeg("422", subsampling="4:2:2")
    jpeg("420", subsampling="4:2:0")
    jpeg("restart-markers", restart_marker_rows=1)
    jpeg("tiny", picture.resize((3, 2)), subsampling="4:4:4")
    others: dict[str, Callable[[Path], None]] = {
        "png.png": picture.save,
        "webp.webp": lambda path: picture.save(path, quality=90),
        "bmp.bmp": picture.save,
        "tiff.tif": picture.save,
    }
    for name, save in others.items():
        save(folder / name)
    return len(list(folder.iterdir()))


if __name__ == "__main__":
    main()
