"""Every kernel compiled by NVRTC for every architecture, without a driver, and held to what its file promises.

The assembler's own report gives registers, spills, stack and shared memory; the occupancy follows from them and must be
the one that the file states. The PTX shows the width of the memory accesses and every division.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from dist_colorize.color.gamut import bin_centers
from dist_colorize.postprocess import kernels

nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="CuPy, which binds NVRTC, is not installed")

SOURCES = sorted(path.stem for path in kernels.resource("kernels").glob("*.cu"))


@dataclass(frozen=True)
class Multiprocessor:
    """What a multiprocessor holds (CUDA C++ Programming Guide, table of compute capabilities)."""

    threads: int
    blocks: int
    shared_kib: int
    reserved_bytes: int  # shared memory that the system takes for each block


ARCHITECTURES = {
    75: Multiprocessor(1024, 16, 64, 0),
    80: Multiprocessor(2048, 32, 164, 1024),
    86: Multiprocessor(1536, 16, 100, 1024),
    89: Multiprocessor(1536, 24, 100, 1024),
    90: Multiprocessor(2048, 32, 228, 1024),
    100: Multiprocessor(2048, 32, 228, 1024),
    120: Multiprocessor(1536, 24, 100, 1024),
}


@dataclass(frozen=True)
class Report:
    """What ptxas says of one kernel, and its PTX."""

    stack: int
    spills: int
    registers: int
    shared: int
    threads: int
    ptx: str

    def occupancy(self, machine: Multiprocessor) -> int:
        """Percent of the multiprocessor's threads that can be resident at the launch size."""
        warps = self.threads // 32
        # registers are given out to a warp in pieces of 256
        by_registers = 65536 // (-(-self.registers * 32 // 256) * 256) // warps
        by_shared = machine.shared_kib * 1024 // max(self.shared + machine.reserved_bytes, 1)
        blocks = min(machine.blocks, machine.threads // self.threads, by_registers, by_shared)
        return 100 * blocks * self.threads // machine.threads


@functools.cache
def compiled(source: str, architecture: int) -> tuple[dict[str, Report], bytes]:
    """{kernel: Report} of one file, and its machine code."""
    program = nvrtc.createProgram(kernels.source(source), f"{source}.cu", [], [])
    try:
        nvrtc.compileProgram(program, [*kernels.options(), f"-arch=sm_{architecture}", "--ptxas-options=-v"])
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    log, ptx = nvrtc.getProgramLog(program), nvrtc.getPTX(program)
    ptx = ptx.decode() if isinstance(ptx, bytes) else ptx
    code = nvrtc.getCUBIN(program)
    assert "warning" not in log, log
    reports = {}
    for text in re.split(r"\.(?:visible|weak) \.entry ", ptx)[1:]:
        name = re.match(r"\w+", text).group()
        # "Compiling entry function 'NAME' ..." is followed by the lines about it
        found = log.split(f"Compiling entry function '{name}'")[1].split("Compiling entry")[0]
        number = functools.partial(_number, found)
        reports[name] = Report(
            stack=number(r"(\d+) bytes stack frame"),
            spills=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            registers=number(r"Used (\d+) registers"),
            shared=number(r"(\d+) bytes smem", 0),
            threads=_number(text, r"\.maxntid (\d+)"),
            ptx=text,
        )
    return reports, code


def _number(text: str, pattern: str, default: int | None = None) -> int:
    found = re.search(pattern, text)
    if found is None:
        assert default is not None, f"{pattern} is not in: {text}"
        return default
    return int(found.group(1))


def all_reports(architecture: int = 80) -> dict[str, Report]:
    return {name: report for source in SOURCES for name, report in compiled(source, architecture)[0].items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_no_spills_no_local_memory_no_double_precision(source, architecture):
    reports, _ = compiled(source, architecture)
    assert reports
    for name, report in reports.items():
        assert (report.stack, report.spills) == (0, 0), name
        assert ".local" not in report.ptx, name
        assert not re.search(r"\.f64|\.b64 %fd", report.ptx), name


@pytest.mark.parametrize("source", SOURCES)
def test_occupancy_is_what_the_file_states(source):
    stated = {
        name: [int(percent) for percent in numbers.split()]
        for name, numbers in re.findall(r"^// occupancy (\w+): ([\d ]+)%", kernels.source(source), re.MULTILINE)
    }
    names = compiled(source, 80)[0]
    found = {
        name: [compiled(source, number)[0][name].occupancy(machine) for number, machine in ARCHITECTURES.items()]
        for name in names
    }
    assert found.keys() == stated.keys()
    for name, numbers in found.items():
        assert min(stated[name]) >= 75
        assert all(now >= promised for now, promised in zip(numbers, stated[name], strict=True)), (name, numbers)


def test_four_cells_are_loaded_and_stored_at_once():
    reports = all_reports()
    for name in ("decode_planar_float32", "scale_chroma", "compose8", "compose16"):
        assert re.search(r"ld\.global\.(nc\.)?v4\.[fub]32", reports[name].ptx), name
    for name in ("decode_planar_float16", "decode_planar_bfloat16"):
        assert re.search(r"ld\.global\.(nc\.)?v2\.[ub]32", reports[name].ptx), name
    for name in ("scale_chroma", "compose8", "compose16"):
        assert re.search(r"st\.global\.v4\.[fub]32", reports[name].ptx), name


def test_integer_divisions():
    """None, but for one a thread where pixels or cells are numbered through; never in a loop."""
    allowed = {"compose8": 1, "compose16": 1} | {
        f"decode_rows_{kind}": 1 for kind in ("float32", "float16", "bfloat16")
    }
    for name, report in all_reports().items():
        assert len(re.findall(r"\bdiv\.[us](32|64)", report.ptx)) == allowed.get(name, 0), name
        assert not re.findall(r"\brem\.[us](32|64)", report.ptx), name


def test_every_launch_is_as_large_as_its_bounds():
    for name, report in all_reports().items():
        assert report.threads == 256, name


def test_table_of_centres():
    text = kernels.resource("kernels", "centers.cuh").read_text()
    pairs = [(int(a), int(b)) for a, b in re.findall(r"\{(-?\d+), (-?\d+)\}", text)]
    assert pairs == [tuple(center) for center in bin_centers().astype(int)]


def test_constants_of_lab():
    """lab.cuh holds the numbers of the CPU's reference."""
    from dist_colorize.color import lab
    from dist_colorize.postprocess import merge

    text = kernels.resource("kernels", "lab.cuh").read_text()
    matrix = [
        [float(sign.replace(" ", "") + number) for sign, number in re.findall(r"([-+]? ?)([\d.e-]+)f \* [xyz]", row)]
        for row in re.search(r"return \{(.*?)\};", text, re.DOTALL).group(1).split(",")
    ]
    for found, expected in zip(matrix, merge._MATRIX, strict=True):
        assert found == pytest.approx(expected, rel=1e-7)
    assert _float(text, r"LOWEST_LINEAR = ([-\d.e]+)f") == pytest.approx(merge._LOWEST, rel=1e-7)
    assert _float(text, r"HIGHEST_LINEAR = ([-\d.e]+)f") == pytest.approx(merge._HIGHEST, rel=1e-7)
    assert _float(text, r"GAMUT_STEPS = (\d+)") == lab.GAMUT_STEPS
    assert _float(text, r"f - ([\d.]+)f\)") == pytest.approx(lab.OFFSET, rel=1e-7)
    assert _float(text, r"f\) \* ([\d.]+)f") == pytest.approx(1 / lab.SLOPE, rel=1e-7)


def _float(text: str, pattern: str) -> float:
    return float(re.search(pattern, text).group(1))


def test_a_changed_header_changes_the_key_of_cupys_cache(tmp_path: Path, monkeypatch):
    folder = tmp_path / "kernels"
    shutil.copytree(kernels.resource("kernels"), folder)
    monkeypatch.setattr(kernels, "resource", lambda *parts: folder.joinpath(*parts[1:]))
    kernels.options.cache_clear()
    before = kernels.options()
    (folder / "grid.cuh").write_text((folder / "grid.cuh").read_text() + "\n// changed\n")
    kernels.options.cache_clear()
    try:
        assert kernels.options() != before
    finally:
        kernels.options.cache_clear()


@pytest.mark.parametrize("architecture", [75, 90, 120])
def test_machine_code(architecture, tmp_path: Path):
    """What the PTX promises is in the machine code too (needs nvdisasm: pip install nvidia-cuda-nvdisasm)."""
    tool = _nvdisasm()
    if tool is None:
        pytest.skip("nvdisasm is not installed")
    for source in SOURCES:
        file = tmp_path / f"{source}.cubin"
        # CuPy's binding drops the last byte
        file.write_bytes(compiled(source, architecture)[1] + b"\0")
        text = subprocess.run([tool, "-c", file], capture_output=True, text=True, check=True).stdout
        assert "EXIT" in text
        assert not re.search(r"\b(DADD|DMUL|DFMA|DSETP|LDL|STL)\b", text), source
        if source in ("decode", "chroma", "compose"):
            assert re.search(r"LDG\.E\.(\w+\.)*128", text), source
        if source in ("chroma", "compose"):
            assert re.search(r"STG\.E\.(\w+\.)*128", text), source


def _nvdisasm() -> str | None:
    for package in ("nvidia/cu13/bin", "nvidia/cuda_nvdisasm/bin"):
        found = sorted(Path(pytest.__file__).parents[1].glob(f"{package}/nvdisasm"))
        if found:
            return str(found[0])
    return shutil.which("nvdisasm")
