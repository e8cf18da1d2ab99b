"""Builds a CUDA source with the host C++ compiler and launches its kernels on the CPU.

Flavours: "plain" is a library called in this process (guard pages, checked barriers, trapped misalignment);
"address" (AddressSanitizer and UndefinedBehaviorSanitizer) and "thread" (ThreadSanitizer) are programs that run one
launch each, so that a sanitizer sees the kernel alone. Whatever any of them finds becomes an EmulatorError.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

HERE = Path(__file__).resolve().parent
Flavour = Literal["plain", "address", "thread"]
FLAGS: dict[Flavour, tuple[str, ...]] = {
    # A misaligned float4 traps here, as it faults on a GPU; x86 would quietly load it.
    "plain": ("-O2", "-fPIC", "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"),
    "address": ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined,float-cast-overflow"),
    "thread": ("-O1", "-g", "-fsanitize=thread"),
}
# no-gnu-unique: or two libraries would share the shared memory of one header
COMMON = (
    "-std=c++17",
    "-fno-gnu-unique",
    "-Wall",
    "-Wno-attributes",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
    "-pthread",
)


class EmulatorError(Exception):
    """The kernel, or the way it was launched, is wrong."""


def compiler() -> str | None:
    """The host C++ compiler, or None where the emulator cannot work."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return None
    return shutil.which(os.environ.get("CXX", "g++"))


@dataclass(frozen=True)
class Array:
    """An array argument: bytes of host memory that stand for device memory, copied to guarded pages for the launch."""

    address: int
    bytes: int
    offset: int = 0
    """Bytes between the start of its allocation, which is aligned, and the array (a view into a larger one)."""


class _Argument(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("kind", ctypes.c_uint32),
        ("phase", ctypes.c_uint32),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("reversed", ctypes.c_uint32),
        ("at_start", ctypes.c_uint32),
        ("arguments", ctypes.c_uint32),
        ("unused", ctypes.c_uint32),
    ]


@dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel as the compiler sees it."""

    dtype: np.dtype
    pointer: bool
    const: bool


class Library:
    """One CUDA source, built; `launch` runs one of its kernels."""

    def __init__(self, source: str, include: tuple[Path, ...], flavour: Flavour = "plain") -> None:
        self.flavour = flavour
        folder = _build(source, include, "plain")
        self._library = ctypes.CDLL(str(folder / "kernels.so"))
        self._library.emulator_signature.restype = ctypes.c_char_p
        self._library.emulator_launch.restype = ctypes.c_char_p
        # The program of another flavour is beside it; the plain library still knows the signatures.
        self._program = None if flavour == "plain" else _build(source, include, flavour) / "kernels"

    def parameters(self, name: str) -> list[Parameter]:
        """The kernel's parameters; EmulatorError when there is no such kernel."""
        signature = self._library.emulator_signature(name.encode())
        if signature is None:
            raise EmulatorError(f"there is no kernel {name}")
        parameters = []
        for word in signature.decode().split(",")[:-1]:
            kind = np.dtype(word.removeprefix("const").removeprefix("*"))
            parameters.append(Parameter(kind, "*" in word, word.startswith("const*")))
        return parameters

    def largest_block(self, name: str) -> int:
        """The block size that the kernel's __launch_bounds__ promises not to exceed."""
        return int(self._library.emulator_largest_block(name.encode()))

    def launch(
        self,
        name: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: list[Array | np.generic],
        shared_bytes: int = 0,
        descending: bool = False,
        at_start: bool = False,
    ) -> None:
        """Runs the kernel over the whole grid; arrays that it may write are changed in place.

        `descending` runs threads and blocks in the opposite order; `at_start` puts every array right behind a guard
        page instead of right before one.
        """
        parameters = self.parameters(name)
        launch = _Launch(
            grid=grid,
            block=block,
            shared_bytes=shared_bytes,
            reversed=descending,
            at_start=at_start,
            arguments=len(arguments),
        )
        table, keep = (_Argument * len(arguments))(), []
        for entry, argument, parameter in zip(table, arguments, parameters, strict=True):
            if isinstance(argument, Array):
                entry.data, entry.bytes = argument.address, argument.bytes
                entry.kind, entry.phase = 1 if parameter.const else 2, argument.offset % 16
            else:
                keep.append(ctypes.create_string_buffer(argument.tobytes(), argument.nbytes))
                entry.data, entry.bytes = ctypes.addressof(keep[-1]), argument.nbytes
        if self._program is None:
            error = self._library.emulator_launch(name.encode(), ctypes.byref(launch), table)
            if error is not None:
                raise EmulatorError(f"{name}: {error.decode(errors='replace')}")
        else:
            self._launch_program(name, launch, table)

    def _launch_program(self, name: str, launch: _Launch, table: ctypes.Array[_Argument]) -> None:
        with tempfile.NamedTemporaryFile(prefix="launch-") as file:
            file.write(bytes(launch))
            offsets = []
            for entry in table:
                file.write(bytes(entry))
                offsets.append(file.tell())
                file.write(ctypes.string_at(entry.data, entry.bytes) if entry.bytes else b"")
            file.flush()
            # ThreadSanitizer needs its shadow where address randomisation may put a library
            prefix = ["setarch", "-R"] if self.flavour == "thread" and shutil.which("setarch") else []
            environment = {
                **os.environ,
                "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0",
                "UBSAN_OPTIONS": "print_stacktrace=1",
                "TSAN_OPTIONS": "halt_on_error=0:history_size=7:report_bugs=1:exitcode=66",
            }
            process = subprocess.run(
                [*prefix, str(self._program), name, file.name], capture_output=True, text=True, env=environment
            )
            if process.returncode or "runtime error" in process.stderr or "WARNING: ThreadSanitizer" in process.stderr:
                raise EmulatorError(f"{name} ({self.flavour}, exit {process.returncode}):\n{process.stderr[-6000:]}")
            for entry, offset in zip(table, offsets, strict=True):
                if entry.kind == 2 and entry.bytes:
                    file.seek(offset)
                    ctypes.memmove(entry.data, file.read(entry.bytes), entry.bytes)


def _run(command: list[str]) -> str:
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise EmulatorError(f"{' '.join(command)}\n{process.stderr[-6000:]}")
    return process.stdout


def _headers(include: tuple[Path, ...]) -> list[Path]:
    return sorted(path for folder in include for path in folder.glob("*.cuh"))


def _runtime(cxx: str, cache: Path, library: bool) -> Path:
    """runtime.cpp as an object file, for a library or with its main program; the same one for all kernels."""
    flags = [*COMMON, "-O2", "-g", "-fPIC", *(() if library else ("-DEMULATOR_MAIN",))]
    digest = hashlib.sha256(repr((cxx, flags)).encode())
    for name in ("cuda_names.h", "runtime.cpp"):
        digest.update((HERE / name).read_bytes())
    finished = cache / f"runtime-{digest.hexdigest()[:24]}.o"
    if not finished.exists():
        with tempfile.TemporaryDirectory(dir=cache) as work:
            built = Path(work) / "runtime.o"
            _run([cxx, *flags, f"-I{HERE}", "-c", str(HERE / "runtime.cpp"), "-o", str(built)])
            built.replace(finished)
    return finished


@functools.cache
def _build(source: str, include: tuple[Path, ...], flavour: Flavour) -> Path:
    """The folder with kernels.so (plain) or kernels (a program); built once per text of source and headers."""
    cxx = compiler()
    if cxx is None:
        raise EmulatorError("the emulator needs a C++ compiler and Linux on x86-64")
    digest = hashlib.sha256(repr((cxx, flavour, FLAGS[flavour], COMMON)).encode())
    for path in (HERE / "cuda_names.h", HERE / "runtime.cpp", *_headers(include)):
        digest.update(path.read_bytes())
    digest.update(source.encode())
    cache = Path(tempfile.gettempdir()) / f"dist_colorize-emulator-{os.getuid()}"
    folder = cache / digest.hexdigest()[:24]
    if folder.is_dir():
        return folder
    cache.mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        work = Path(name)
        includes = [f"-I{HERE}", *(f"-I{path}" for path in include)]
        # C++ has no static variable without a size: the one declaration that must be said otherwise
        text = re.sub(
            r"extern\s+__shared__\s+(\w+)\s+(\w+)\[\];", r"\1* const \2 = emulator::dynamic_shared<\1>();", source
        )
        (work / "kernels.cpp").write_text(f'#include <utility>\n#include "cuda_names.h"\n#line 1 "kernels.cu"\n{text}')
        expanded = _run([cxx, *COMMON, "-E", "-P", *includes, str(work / "kernels.cpp")])
        kernels = re.findall(
            r'extern\s+"C"\s+__attribute__\(\(used\)\)\s+void\s+__attribute__\(\(launch_bounds\(\s*([^,()]+?)\s*(?:,[^()]*)?\)\)\)'
            r"\s+(\w+)\s*\(",
            expanded,
        )
        if len(kernels) != len(re.findall(r'extern\s+"C"\s+__attribute__\(\(used\)\)', expanded)) or not kernels:
            raise EmulatorError('every kernel must read: extern "C" __global__ void __launch_bounds__(N) name(...)')
        with (work / "kernels.cpp").open("a") as file:
            file.writelines(f"\nEMULATOR_KERNEL({kernel}, {bounds})" for bounds, kernel in kernels)
            file.write("\n")
        flags = list(FLAGS[flavour])
        if flavour == "address":
            flags += ["-fsanitize-sections=shared_memory"]
        _run([cxx, *COMMON, *flags, *includes, "-c", str(work / "kernels.cpp"), "-o", str(work / "kernels.o")])
        # g++ ignores the section of a static variable of a template: it would neither be poisoned nor checked
        if stray := re.findall(
            r"\.bss\S*\s+\S+\s+(_ZZ(?!N8emulator)\S+)", _run(["objdump", "-t", str(work / "kernels.o")])
        ):
            raise EmulatorError(f"declare __shared__ variables outside of templates: {', '.join(stray)}")
        runtime = _runtime(cxx, cache, flavour == "plain")
        target = ["-shared", "-o", str(work / "kernels.so")] if flavour == "plain" else ["-o", str(work / "kernels")]
        link = [flag for flag in flags if flag.startswith("-fsanitize=") and flavour != "plain"]
        _run([cxx, *link, str(work / "kernels.o"), str(runtime), "-pthread", *target])
        finished = work / "finished"
        finished.mkdir()
        for built in ("kernels.so", "kernels"):
            if (work / built).exists():
                (work / built).rename(finished / built)
        try:
            finished.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder
