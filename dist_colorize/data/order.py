"""Which sample, crop and flip comes when: a pure function of (fingerprint, seed, position).

Training reads one endless stream of positions g = 0, 1, 2, ... Position g lies in epoch g // size at place g % size,
and every epoch is a permutation of the data set: nothing is padded or dropped, batches may straddle two epochs.
Neither the world size nor the number of threads nor the point of a restart enters, and no table of the data set's
size exists: the permutation is a keyed Feistel network, the random numbers are hashes of the position.

    order = Order(size=1_000_000_000, fingerprint="3fa9...", seed=0)
    draw = order.draw(np.arange(64, dtype=np.uint64))    # the first 64 positions of the stream
    draw.sample, draw.uniforms                           # int64 [64], float64 [64, 5] in [0, 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from math import isqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

UNIFORMS = 5  # per position: area, aspect ratio, x, y, flip

UInt64s = NDArray[np.uint64]


class Draw(NamedTuple):
    """What comes at n positions."""

    sample: NDArray[np.int64]
    """[n] row of the data set, 0..size-1."""
    uniforms: NDArray[np.float64]
    """[n, 5] independent numbers, uniform in [0, 1)."""


class Crops(NamedTuple):
    """Rectangles to cut out of n images, in pixels of the displayed image."""

    x: NDArray[np.int32]
    y: NDArray[np.int32]
    width: NDArray[np.int32]
    height: NDArray[np.int32]
    flip: NDArray[np.bool_]


@dataclass(frozen=True)
class Order:
    """The order of one data set under one seed.

    Args: size: number of samples, 1 to 2^62. fingerprint: any string that identifies the data. seed: any integer.
    Raises ValueError for a size outside that range.
    """

    size: int
    fingerprint: str
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.size <= 1 << 62:
            raise ValueError(f"an order needs between 1 and 2^62 samples, got {self.size}")

    def epoch_position(self, position: int) -> tuple[int, int]:
        """(epoch, place within the epoch) of a position of the stream."""
        return divmod(position, self.size)

    def draw(self, positions: UInt64s) -> Draw:
        """Sample and random numbers at each of n positions ([n], any order, repeats allowed)."""
        from dist_colorize.data import feistel  # here, as numba takes long to import

        positions = np.ascontiguousarray(positions, dtype=np.uint64)
        sample = np.empty(len(positions), dtype=np.int64)
        uniforms = np.empty((len(positions), UNIFORMS), dtype=np.float64)
        # ceil(sqrt(size)), rounded up to even: adding modulo an odd number is an even permutation, and a rectangle with
        # two odd sides would only ever reach half of all orders.
        columns = np.uint64((isqrt(self.size - 1) + 2) // 2 * 2)
        keys = self._key("permutation"), self._key("crop")
        feistel.draw(positions, np.uint64(self.size), columns, *keys, sample, uniforms)
        return Draw(sample, uniforms)

    def substitute(self, position: int, attempt: int) -> int:
        """The row to use at `position` when what belongs there cannot be read, for the 1st, 2nd, ... attempt."""
        from dist_colorize.data import feistel

        key = self._key("substitute")
        return int(feistel.substitute(np.uint64(position), np.uint64(attempt), np.uint64(self.size), key))

    def _key(self, purpose: str) -> np.uint64:
        text = f"dist_colorize order 1\0{purpose}\0{self.seed}\0{self.fingerprint}"
        return np.uint64(int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little"))


def random_resized_crop(
    uniforms: NDArray[np.float64],
    width: NDArray[np.integer],
    height: NDArray[np.integer],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: bool,
) -> Crops:
    """Crops of n images ([n, 5] uniforms, [n] sizes in pixels) as torchvision's RandomResizedCrop draws them.

    The share of the area is uniform in `scale`, the logarithm of width / height uniform in `ratio`. torchvision draws
    again when a crop does not fit into its image; here the ratio is drawn from the part of `ratio` that fits, and where
    nothing fits (a panorama) the longer side of the nearest crop is cut. So one draw always suffices.
    """
    width_f, height_f = width.astype(np.float64), height.astype(np.float64)
    area = width_f * height_f * (scale[0] + (scale[1] - scale[0]) * uniforms[:, 0])
    # A crop of this area fits when sqrt(area * r) <= width and sqrt(area / r) <= height.
    lowest = np.clip(np.log(area / height_f**2), *np.log(ratio))
    highest = np.clip(np.log(width_f**2 / area), *np.log(ratio))
    drawn = np.exp(lowest + (highest - lowest) * uniforms[:, 1])
    w = np.clip(np.rint(np.sqrt(area * drawn)), 1, width_f)
    h = np.clip(np.rint(np.sqrt(area / drawn)), 1, height_f)
    x = np.floor(uniforms[:, 2] * (width_f - w + 1))
    y = np.floor(uniforms[:, 3] * (height_f - h + 1))
    x, y, w, h = (side.astype(np.int32) for side in (x, y, w, h))
    return Crops(x, y, w, h, (uniforms[:, 4] < 0.5) & flip)
