"""The DALI pipeline: encoded bytes in, L and ab out on a GPU, decoded crops on a CPU. One definition for both.

Only the crop is decoded where the format allows it (JPEG by blocks, TIFF by tiles). On a GPU it is then resized to a
square with a triangular filter whose support grows with the reduction (no aliasing), mirrored, and converted to Lab; on
a CPU `data.finish` does that in one pass.

How Lab is made of DALI's operators, measured per 224 x 224 image on one CPU core, as no GPU was there (DALI 2.4; all
are within 3e-4 of scikit-image):

    two 3x3 coord_transforms, f by a mask of cbrt and line        3.9 ms    the textbook way
    f by cbrt(max(t, eps)) + slope * min(t - eps, 0)              3.8 ms    cbrt itself costs 12 ns a value
    f by pow                                                      3.0 ms
    three 3 -> 1 coord_transforms, f by tables, magic rounding    1.4 ms    this one

Three 3 -> 1 coord_transforms are three times faster than a 3 -> 3 one, and leave planes, which is the layout wanted. f
is a first-order Taylor series around the nearest q of 16384 nodes: f(t) = f(q) + f'(q) (t - q), with an error below
max |f''| / 8 / 16383^2 = 3e-7. The two coefficients come from tables, already scaled and shifted for L, a and b.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
import nvidia.dali
import torch
from numpy.typing import NDArray
from nvidia.dali import pipeline_def

from dist_colorize.color.lab import EPSILON, OFFSET, SLOPE, WHITE, XYZ_FROM_RGB, linear_from_srgb

# As Any: DALI makes these names at run time, where a type checker does not see them.
fn: Any = nvidia.dali.fn
types: Any = nvidia.dali.types

NODES = 1 << 14
"""Six small tables: they stay in the cache, and a pipeline is built in 0.1 s; with 2^16, DALI's limit, in 0.4 s."""
_ROUNDER = float(1 << 23)
"""From 2^23 to 2^24 float32 are the integers: adding 2^23 leaves the rounded number in the lower bits."""

_KEYS = list(range(NODES))

Source = Callable[[], tuple[Sequence[NDArray[np.uint8]], NDArray[Any], NDArray[Any], NDArray[Any]]]
"""One batch: encoded images (uint8 [n] each), anchors and shapes (int32 [B, 2]: y, x in pixels), flips (int32 [B])."""


def build(
    source: Source,
    batch: int,
    size: int,
    threads: int,
    device: Literal["cpu", "gpu"],
    device_id: int | None,
    whole: bool,
    hw_decoder_load: float = 0.0,
) -> Any:
    """A built pipeline, `batch` images a `run()`. On a GPU its JPEG engine takes the share `hw_decoder_load` of them.

    With `whole`, `run()` gives L, a and b, float32 [1, size, size] each; else the decoded crops, uint8 [h, w, 3], and
    the flips, for `data.finish`, which does the rest faster on a CPU.

    `source` raises StopIteration after its last batch. `run()` raises RuntimeError for the whole batch when one of its
    images cannot be decoded, or is smaller than its crop; the pipeline is then unusable.
    """
    pipeline = _define(
        source,
        size,
        device,
        whole,
        hw_decoder_load,
        batch_size=batch,
        num_threads=threads,
        device_id=device_id,
        # Two batches in work: one is read or delivered while the other is decoded.
        prefetch_queue_depth=2,
    )
    pipeline.build()
    return pipeline


class CropDecoder:
    """Decodes one crop at a time, as the pipeline does: what can fail there on a bad image fails here.

    Its own small pipeline is built for the first crop, and again only after an image has broken it.
    """

    def __init__(self, device: Literal["cpu", "gpu"], device_id: int | None, hw_decoder_load: float = 0.0) -> None:
        self._device, self._device_id, self._load = device, device_id, hw_decoder_load
        self._pipeline: Any = None

    def decode(self, encoded: NDArray[np.uint8], y: int, x: int, height: int, width: int) -> NDArray[np.uint8]:
        """The crop, uint8 [height, width, 3] on the CPU. RuntimeError where the pipeline's `run()` raises one."""
        if self._pipeline is None:
            pipeline = _define_crop(
                self._device,
                self._load,
                batch_size=1,
                num_threads=1,
                device_id=self._device_id,
                prefetch_queue_depth=1,
            )
            pipeline.build()
            self._pipeline = pipeline
        anchor, shape = (np.array([pair], dtype=np.int32) for pair in ((y, x), (height, width)))
        try:
            (image,) = self._pipeline.run(encoded=[encoded], anchor=anchor, shape=shape)
        except BaseException:
            self._pipeline = None
            raise
        # a copy: the memory is the pipeline's
        return np.array(image.as_cpu()[0])


@pipeline_def
def _define(source: Source, size: int, device: str, whole: bool, hw_decoder_load: float) -> Any:
    encoded, anchor, shape, flip = fn.external_source(
        source, num_outputs=4, batch=True, dtype=[types.UINT8, types.INT32, types.INT32, types.INT32], ndim=[1, 1, 1, 0]
    )
    image = _decode(encoded, anchor, shape, device, hw_decoder_load)
    if not whole:
        return image, flip
    # [h, w, 3] -> [size, size, 3]
    image = fn.resize(image, size=[size, size], interp_type=types.INTERP_LINEAR, antialias=True)
    return lab(fn.flip(image, horizontal=flip), size)


@pipeline_def
def _define_crop(device: str, hw_decoder_load: float) -> Any:
    inputs = {"encoded": types.UINT8, "anchor": types.INT32, "shape": types.INT32}
    encoded, anchor, shape = (fn.external_source(name=name, dtype=dtype, ndim=1) for name, dtype in inputs.items())
    return _decode(encoded, anchor, shape, device, hw_decoder_load)


def _decode(encoded: Any, anchor: Any, shape: Any, device: str, hw_decoder_load: float) -> Any:
    """The crop of each image, uint8 [h, w, 3] sRGB. Anchors count in the displayed image, after EXIF's rotation."""
    where = {"device": "mixed", "hw_decoder_load": hw_decoder_load} if device == "gpu" else {"device": "cpu"}
    return fn.decoders.image_slice(encoded, anchor, shape, axis_names="HW", output_type=types.RGB, **where)


def lab(image: Any, size: int) -> tuple[Any, Any, Any]:
    """uint8 sRGB [size, size, 3] -> L, a, b, float32 [1, size, size] each (CIE 15:2004; constants of scikit-image)."""
    levels = linear_from_srgb(torch.arange(256, dtype=torch.float64) / 255)
    linear = fn.lookup_table(image, keys=list(range(256)), values=levels.tolist(), dtype=types.FLOAT)
    L_table, a_table, b_table = _f_table(116.0), _f_table(500.0), _f_table(200.0)
    x, y, z = (_plane(linear, row, size) for row in np.array(XYZ_FROM_RGB) / np.array(WHITE)[:, None])
    # 116 f(y) - 16; with the -16 in all three tables, 500 f(y) is L's series times 500 / 116.
    L = _series(y, L_table)
    a = _series(x, a_table) - L * (500.0 / 116.0)
    b = L * (200.0 / 116.0) - _series(z, b_table)
    return L, a, b


def _plane(linear: Any, weights: NDArray[np.float64], size: int) -> Any:
    """X / Xn (or Y, Z) of each pixel in units of the tables' nodes, 0 .. NODES - 1."""
    plane = fn.coord_transform(linear, M=(weights * (NODES - 1)).tolist())
    # [size, size, 1] -> [1, size, size]
    return fn.reshape(plane, shape=[1, size, size], layout="CHW")


def _series(t: Any, table: tuple[list[float], list[float]]) -> Any:
    # A cast to integers would cost 2.4 ns a value, this costs 0.5.
    node = fn.reinterpret(t + _ROUNDER, dtype=types.INT32) & (NODES - 1)
    constant, slope = (fn.lookup_table(node, keys=_KEYS, values=values, dtype=types.FLOAT) for values in table)
    return constant + slope * t


@cache
def _f_table(scale: float) -> tuple[list[float], list[float]]:
    """Constant and slope of scale * f(t) - 16 * scale / 116 around each node, for t in units of nodes."""
    t = np.arange(NODES) / (NODES - 1)
    root = np.cbrt(np.maximum(t, EPSILON))
    f = np.where(t > EPSILON, root, SLOPE * t + OFFSET)
    derivative = np.where(t > EPSILON, 1 / (3 * root**2), SLOPE)
    constant = scale * (f - derivative * t - 16.0 / 116.0)
    return constant.tolist(), (scale * derivative / (NODES - 1)).tolist()
