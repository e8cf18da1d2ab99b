"""The CUDA sources of kernels/ as callable functions: found, compiled for the device at first use, cached, launched.

Everything that needs CuPy or a driver is here, behind two functions: `open_device` says whether a GPU can be used, and
`launch` runs one kernel on torch tensors in torch's current stream, without copies. CuPy is imported when first
needed, so a machine without it can still run everything else.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from collections.abc import Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_colorize.errors import UserError
from dist_colorize.hardware import use_ieee_fp32
from dist_colorize.resources import resource

OPTIONS = ("-std=c++17", "--use_fast_math")
"""Of NVRTC. Fast mathematics: exponentials, logarithms and divisions of 1e-6 relative accuracy, denormals are zero."""
OLDEST_ARCHITECTURE = (7, 5)
"""The oldest compute capability that the kernels are compiled and checked for (Turing)."""
DRIVER_REMEDY = (
    "install an NVIDIA driver that supports CUDA 13 (580 or newer; for older drivers the README's CUDA 12 route), "
    "check with nvidia-smi, or leave --gpu away to use the CPU"
)


def source(name: str) -> str:
    """The text of kernels/NAME.cu."""
    return resource("kernels", f"{name}.cu").read_text(encoding="utf-8")


@functools.cache
def options() -> tuple[str, ...]:
    """NVRTC's options: where the headers are, and a digest of them.

    CuPy keeps compiled kernels on disk under a key of source text and options; without the digest, a changed header
    would go unnoticed.
    """
    folder = resource("kernels")
    digest = hashlib.sha256()
    for header in sorted(folder.glob("*.cuh")):
        digest.update(header.read_bytes())
    return (*OPTIONS, f"-I{folder}", f"-DHEADERS=0x{digest.hexdigest()[:8]}")


def open_device(local_rank: int = 0) -> torch.device:
    """The GPU of this process of the node, ready for use; UserError in one line with the remedy where there is none.

    It becomes the current device of the calling thread, and fp32 means IEEE single precision from then on
    (hardware.use_ieee_fp32). Processes beyond the number of GPUs share them in turn; a cluster may show each task its
    own one only.
    """
    cupy_module()
    try:
        torch.cuda.init()
        count = torch.cuda.device_count()
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"no GPU can be used ({first_line}): {DRIVER_REMEDY}", shared=True) from None
    if count == 0:
        raise UserError(f"no GPU is visible (CUDA_VISIBLE_DEVICES?): {DRIVER_REMEDY}", shared=True)
    index = local_rank % count
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_ARCHITECTURE:
        found, needed = (".".join(map(str, version)) for version in (capability, OLDEST_ARCHITECTURE))
        raise UserError(
            f"GPU {index} ({torch.cuda.get_device_name(index)}) has compute capability {found}, the kernels need "
            f"{needed} or newer: leave --gpu away to use the CPU"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    use_ieee_fp32()
    return device


def cupy_module() -> ModuleType:
    """CuPy, imported at the first call."""
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        raise UserError(
            f"--gpu needs CuPy, which cannot be imported ({error}): pip install cupy-cuda13x, or cupy-cuda12x "
            "for CUDA 12 drivers",
            shared=True,
        ) from None


@functools.cache
def _function(name: str, kernel: str, device_index: int | None) -> Any:
    """The kernel of kernels/NAME.cu, compiled for this device's architecture."""
    module = cupy_module().RawModule(code=source(name), options=options())
    return module.get_function(kernel)


def launch(
    name: str,
    kernel: str,
    grid: Sequence[int],
    block: Sequence[int],
    arguments: Sequence[Tensor | np.int32 | np.float32],
) -> None:
    """Runs a kernel of kernels/NAME.cu in torch's current stream of the tensors' device.

    Tensors go as the addresses of their first elements, scalars as they are: tensors must be contiguous and on one
    device, scalars np.int32 or np.float32 (CuPy passes a Python number as 64 bits). The kernel alone knows how many
    elements of which kind it finds at an address. TypeError or ValueError otherwise, and for an empty grid.
    """
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    device = tensors[0].device
    for argument in arguments:
        if not isinstance(argument, (Tensor, np.int32, np.float32)):
            raise TypeError(f"{kernel}: scalars must be np.int32 or np.float32, got {type(argument).__name__}")
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise ValueError(f"{kernel}: a tensor of shape {tuple(tensor.shape)} is not contiguous")
        if tensor.device != device:
            raise ValueError(f"{kernel}: a tensor of shape {tuple(tensor.shape)} is on {tensor.device}, not {device}")
    if min(grid) < 1:
        raise ValueError(f"{kernel}: the grid {tuple(grid)} is empty")
    # 64 bits each. The memory stays the tensors' until the kernel has run: torch gives what is freed to later work of
    # the same stream alone.
    passed = [np.uint64(item.data_ptr()) if isinstance(item, Tensor) else item for item in arguments]
    # CuPy takes the device that torch has made current, and in a thread that chose none torch takes GPU 0
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        function = _function(name, kernel, device.index)
        with cupy_module().cuda.Stream.from_external(torch.cuda.current_stream(device)):
            function(tuple(grid), tuple(block), tuple(passed))
