"""Stands in for the few CuPy names that dist_colorize.postprocess.kernels uses; strict where CuPy and CUDA are lax.

`emulated_gpu()` is a context in which `kernels.launch` runs the real launch configuration through the emulator: torch
tensors on the CPU stand for device memory. Errors: a wrong number or type of arguments, a Python number, an address
that is no living tensor's, a tensor that is not contiguous or of another dtype, an empty grid, a block above
__launch_bounds__, an output that overlaps another argument, a hidden copy to the host of anything but finished pixels.
Memory fresh from torch.empty holds NaN.
"""

from __future__ import annotations

import functools
import sys
import threading
import types
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from emulator.compiler import Array, EmulatorError, Flavour, Library

BARE_PATTERNS = {"float16": "int16", "bfloat16": "int16"}
"""Kernels take 16-bit floats as bare patterns."""
LIMITS = {"grid": (2**31 - 1, 65535, 65535), "block": (1024, 1024, 64), "threads": 1024, "shared": 48 * 1024}


@dataclass
class Setting:
    """How launches run in the current context, and what they were."""

    flavour: Flavour = "plain"
    descending: bool = False
    at_start: bool = False
    launches: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)


setting = Setting()


@functools.cache
def library(code: str, options: tuple[str, ...], flavour: Flavour) -> Library:
    include = tuple(Path(option.removeprefix("-I")) for option in options if option.startswith("-I"))
    return Library(code, include, flavour)


class Addresses:
    """Which tensor an address stands for: the last one that was asked for it, as long as it lives."""

    def __init__(self) -> None:
        self._tensors: dict[int, weakref.ref[Tensor]] = {}

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Within it Tensor.data_ptr notes what it gives out."""
        genuine = Tensor.data_ptr

        def data_ptr(tensor: Tensor) -> int:
            address = genuine(tensor)
            self._tensors[address] = weakref.ref(tensor)
            return address

        with mock.patch.object(Tensor, "data_ptr", data_ptr):
            yield

    def tensor(self, address: int) -> Tensor | None:
        """None where no living tensor has given out this address."""
        noted = self._tensors.get(address)
        return None if noted is None else noted()


_addresses = Addresses()


class RawModule:
    def __init__(self, *, code: str, options: tuple[str, ...] = ()) -> None:
        self.code, self.options = code, options

    def get_function(self, name: str) -> RawKernel:
        library(self.code, self.options, "plain").parameters(name)
        return RawKernel(self, name)


class RawKernel:
    def __init__(self, module: RawModule, name: str) -> None:
        self.module, self.name = module, name

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], *, shared_mem: int = 0
    ) -> None:
        if _stream[0] is None:
            raise EmulatorError(f"{self.name} is launched outside torch's stream")
        built = library(self.module.code, self.module.options, setting.flavour)
        arguments = self._checked(built, args)
        sizes = [(*size, 1, 1)[:3] for size in (grid, block)]
        for word, size in zip(("grid", "block"), sizes, strict=True):
            if not all(1 <= n <= most for n, most in zip(size, LIMITS[word], strict=True)):
                raise EmulatorError(f"{self.name}: the {word} {size} is outside 1..{LIMITS[word]}")
        threads, most = int(np.prod(sizes[1])), built.largest_block(self.name)
        if threads > most:
            raise EmulatorError(f"{self.name}: {threads} threads in a block, __launch_bounds__ allows {most}")
        if shared_mem > LIMITS["shared"]:
            raise EmulatorError(f"{self.name}: {shared_mem} bytes of dynamic shared memory")
        setting.launches.append((self.name, sizes[0], sizes[1]))
        built.launch(self.name, sizes[0], sizes[1], arguments, shared_mem, setting.descending, setting.at_start)

    def _checked(self, built: Library, args: tuple[Any, ...]) -> list[Array | np.generic]:
        parameters = built.parameters(self.name)
        if len(args) != len(parameters):
            raise EmulatorError(f"{self.name} takes {len(parameters)} arguments, got {len(args)}")
        arguments: list[Array | np.generic] = []
        spans = []
        for place, (argument, parameter) in enumerate(zip(args, parameters, strict=True)):
            where = f"{self.name}, argument {place}"
            if not parameter.pointer:
                if type(argument) is not parameter.dtype.type:
                    raise EmulatorError(f"{where}: must be {parameter.dtype}, got {type(argument).__name__}")
                arguments.append(argument)
                continue
            # 64 bits, as CuPy passes a scalar by the size of its type
            if not isinstance(argument, np.uint64):
                raise EmulatorError(f"{where}: must be the address of {parameter.dtype}, got {type(argument).__name__}")
            tensor = _addresses.tensor(int(argument))
            if tensor is None:
                raise EmulatorError(f"{where}: {int(argument):#x} is the address of no living tensor")
            kind = str(tensor.dtype).removeprefix("torch.")
            if BARE_PATTERNS.get(kind, kind) != str(parameter.dtype):
                raise EmulatorError(f"{where}: must be the address of {parameter.dtype}, got {tensor.dtype}")
            if kind in BARE_PATTERNS and not self.name.endswith(f"_{kind}"):
                raise EmulatorError(f"{where}: is {kind}, which this kernel is not for")
            if not tensor.is_contiguous():
                raise EmulatorError(f"{where}: is not contiguous")
            offset = tensor.data_ptr() - tensor.untyped_storage().data_ptr()
            arguments.append(Array(tensor.data_ptr(), tensor.nbytes, offset))
            spans.append((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, parameter.const, place))
        for start, end, const, place in spans:
            for other_start, other_end, _, other in spans:
                if not const and place != other and start < other_end and other_start < end:
                    raise EmulatorError(f"{self.name}: writes argument {place}, which overlaps argument {other}")
        return arguments


_stream: list[Any] = [None]


class Stream:
    """CuPy's current stream: a kernel may only run in torch's. One thread at a time; the emulator is one device."""

    _device = threading.Lock()

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    @classmethod
    def from_external(cls, stream: Any) -> Stream:
        return cls(stream)

    def __enter__(self) -> Stream:
        self._device.acquire()
        _stream[0] = self.stream
        return self

    def __exit__(self, *_: object) -> None:
        _stream[0] = None
        self._device.release()


class DeviceMemory(TorchFunctionMode):
    """Makes tensors behave as on a device: fresh memory holds NaN, and a hidden copy to the host is an error.

    Such a copy would stop the stream; only finished pixels (uint8, uint16) may go.
    """

    FORBIDDEN = (
        "item",
        "tolist",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "__array__",
        "nonzero",
        "is_nonzero",
    )

    def __init__(self, host_copies: bool) -> None:
        super().__init__()
        self.host_copies = host_copies

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        pixels = args and isinstance(args[0], Tensor) and args[0].dtype in (torch.uint8, torch.uint16)
        if not self.host_copies and (name in self.FORBIDDEN or (name in ("cpu", "numpy") and not pixels)):
            raise EmulatorError(f"Tensor.{name} copies to the host and waits for the GPU")
        result = func(*args, **(kwargs or {}))
        if func in (torch.empty, torch.empty_like, Tensor.new_empty):
            result.view(torch.uint8).fill_(0xFF) if result.dim() else result.fill_(torch.nan)
        return result


def standin() -> types.ModuleType:
    """A module with CuPy's name and the names used of it."""
    module = types.ModuleType("cupy")
    module.RawModule = RawModule  # type: ignore[attr-defined]
    module.cuda = types.SimpleNamespace(Stream=Stream)  # type: ignore[attr-defined]
    return module


@contextmanager
def _module(name: str, module: types.ModuleType) -> Iterator[None]:
    """Puts a module in the place of another. (mock.patch.dict would forget every module imported meanwhile.)"""
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        yield
    finally:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before


@contextmanager
def emulated_gpu(
    flavour: Flavour = "plain",
    descending: bool = False,
    at_start: bool = False,
    l2_bytes: int = 4 * 2**20,
    host_copies: bool = False,
) -> Iterator[torch.device]:
    """Within it, CuPy, the driver and the GPU seem to be there; gives the device, on which torch itself is the CPU's.

    `l2_bytes` is what decode sizes its chunks by. `host_copies` allows a test to look at tensors inside the context.
    """
    from dist_colorize.postprocess import kernels

    global setting
    before, setting = setting, Setting(flavour, descending, at_start)
    properties = types.SimpleNamespace(L2_cache_size=l2_bytes)
    kernels._function.cache_clear()
    with (
        _module("cupy", standin()),
        _addresses.noted(),
        mock.patch.object(torch.cuda, "current_stream", return_value="torch's stream"),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(kernels, "open_device", return_value=torch.device("cpu")),
        DeviceMemory(host_copies),
    ):
        try:
            yield torch.device("cpu")
        finally:
            kernels._function.cache_clear()
            setting = before
