"""Which stretch of which photograph fills each slot of a batch, and what steps in for one that cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dist_colorize.data.columns import Photographs
from dist_colorize.data.config import DataConfig
from dist_colorize.data.order import Crops, Order, random_resized_crop

PADDING = -1
"""The row of a slot that holds no photograph; its weight is 0."""


@dataclass
class Plan:
    """One batch to be made. All arrays are [B]."""

    row: NDArray[np.int64]
    crops: Crops
    weight: NDArray[np.float32]
    substitute: Callable[[int, int], None]
    """substitute(slot, attempt): put something else into a slot, the first time with attempt 1."""


def training_plans(
    photographs: Photographs, config: DataConfig, order: Order, positions: NDArray[np.uint64]
) -> Iterator[Plan]:
    """What the order puts at these positions of the stream ([batches, B]): a random crop each.

    What cannot be read is replaced by another photograph, which depends on the position and the attempt alone.
    """
    # [batches, B] -> [batches * B]: drawn together, as for one batch numpy's calls would take longer than their work
    samples, uniforms = order.draw(positions.ravel())

    def crop(rows: NDArray[np.int64], u: NDArray[np.float64]) -> Crops:
        width, height = photographs.width[rows], photographs.height[rows]
        return random_resized_crop(u, width, height, config.scale, config.ratio, config.flip)

    crops = crop(samples, uniforms)

    def batch(start: int, size: int) -> Plan:
        part = slice(start, start + size)

        def substitute(slot: int, attempt: int) -> None:
            plan.row[slot] = order.substitute(int(positions.flat[start + slot]), attempt)
            one = slice(slot, slot + 1)
            for column, value in zip(plan.crops, crop(plan.row[one], uniforms[part][one]), strict=True):
                column[one] = value

        weight = np.ones(size, dtype=np.float32)
        plan = Plan(samples[part], Crops._make(column[part] for column in crops), weight, substitute)
        return plan

    number, size = positions.shape
    return (batch(start, size) for start in range(0, number * size, size))


def evaluation_plan(photographs: Photographs, rows: NDArray[np.int64]) -> Plan:
    """The middle square of each row, as large as it fits, not mirrored. Rows of PADDING weigh nothing.

    What cannot be read becomes padding: a substitute would count another photograph twice.
    """
    real = rows != PADDING
    width, height = (
        np.where(real, side[np.where(real, rows, 0)], 1) for side in (photographs.width, photographs.height)
    )
    side = np.minimum(width, height).astype(np.int32)
    x, y = ((width - side) // 2).astype(np.int32), ((height - side) // 2).astype(np.int32)
    crops = Crops(x, y, side, side.copy(), np.zeros(len(rows), dtype=np.bool_))

    def substitute(slot: int, attempt: int) -> None:
        plan.row[slot], plan.weight[slot] = PADDING, 0
        for column, value in zip(crops[:4], (0, 0, 1, 1), strict=True):
            column[slot] = value

    plan = Plan(rows.copy(), crops, real.astype(np.float32), substitute)
    return plan
