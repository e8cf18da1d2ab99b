"""How kernels are launched: what CuPy is given, on which device, in which stream. Records stand for CuPy and CUDA."""

from __future__ import annotations

import ctypes
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from dist_colorize.postprocess import kernels


class OnGpu(torch.Tensor):
    """A tensor that says it is on the second GPU, at an address that its shape gives."""

    @staticmethod
    def __new__(cls, *shape: int) -> OnGpu:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device="cuda:1")

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise AssertionError(f"{func} is called on a tensor that is only to be passed on")

    def data_ptr(self) -> int:
        return 2**40 + 16 * len(self)

    def __dlpack__(self, **_: Any) -> Any:
        raise AssertionError("DLPack records and waits for an event for each tensor")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What is asked of CuPy and of torch.cuda, in order."""
    seen: list[Any] = []

    @contextmanager
    def during(*what: Any) -> Iterator[None]:
        seen.append(what)
        yield
        seen.append(("end", *what))

    def module(code: str, options: tuple[str, ...]) -> Any:
        def function(name: str) -> Any:
            seen.append(("compiled", name))
            return lambda grid, block, passed: seen.append((name, grid, block, passed))

        return types.SimpleNamespace(get_function=function)

    streams = types.SimpleNamespace(from_external=lambda stream: during("stream", stream))
    # no other names: whatever else is asked of CuPy is an error
    cupy = types.SimpleNamespace(RawModule=module, cuda=types.SimpleNamespace(Stream=streams))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.cuda, "device", lambda device: during("device", str(device)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"torch's stream of {device}")
    kernels._function.cache_clear()
    yield seen
    kernels._function.cache_clear()


def test_a_kernel_gets_addresses_on_the_tensors_device_in_torchs_stream(calls: list[Any]) -> None:
    arguments = [OnGpu(3), OnGpu(5), np.int32(7), np.float32(0.5)]
    kernels.launch("chroma", "scale_chroma", (2, 1), (256,), arguments)
    passed = (np.uint64(2**40 + 48), np.uint64(2**40 + 80), np.int32(7), np.float32(0.5))
    stream = ("stream", "torch's stream of cuda:1")
    assert calls == [
        ("device", "cuda:1"),
        ("compiled", "scale_chroma"),
        stream,
        ("scale_chroma", (2, 1), (256,), passed),
        ("end", *stream),
        ("end", "device", "cuda:1"),
    ]
    assert [type(one) for one in calls[3][3]] == [np.uint64, np.uint64, np.int32, np.float32]


def test_tensors_on_two_devices_are_refused(calls: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"shape \(4,\) is on cpu, not cuda:1"):
        kernels.launch("chroma", "scale_chroma", (1,), (256,), [OnGpu(3), torch.zeros(4)])
    assert not calls


def test_cupy_passes_an_address_as_its_64_bits() -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed")
    from cupy._core import _scalar

    for address in (2**47 + 5, 2**63 + 2**40):
        passed = _scalar.CScalar(np.uint64(address))
        assert ctypes.c_uint64.from_address(passed.ptr).value == address
