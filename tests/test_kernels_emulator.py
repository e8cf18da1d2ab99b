"""The harness that runs the kernels on the CPU finds the bugs it is there for, planted into the real sources."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from emulator import compiler, cupy_standin
from emulator.compiler import EmulatorError
from emulator.cupy_standin import emulated_gpu

from dist_colorize.postprocess import kernels
from dist_colorize.postprocess.cuda import CudaBackend

pytestmark = pytest.mark.skipif(compiler.compiler() is None, reason="the emulator needs g++ on x86-64 Linux")

# 33 x 65 cells: two tiles and one cell more, downwards and to the right
HEIGHT, WIDTH = 33, 65


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], None]:
    """planted(file, old, new) changes the text of one kernel file in a copy that is used from then on."""
    folder = tmp_path / "kernels"
    shutil.copytree(kernels.resource("kernels"), folder)

    def plant(file: str, old: str, new: str) -> None:
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new))
        monkeypatch.setattr(kernels, "resource", lambda *parts: folder.joinpath(*parts[1:]))
        kernels.options.cache_clear()

    yield plant
    monkeypatch.undo()
    kernels.options.cache_clear()


def scene() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return 40 * torch.randn(1, 2, HEIGHT, WIDTH, generator=generator), torch.rand(1, HEIGHT, WIDTH, generator=generator)


def decode(backend: CudaBackend) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 4, 12, 12, generator=generator)
    return backend.decode(features, torch.randn(313, 4, generator=generator), torch.zeros(313), 1.0)[0]


def decode_rows(backend: CudaBackend) -> torch.Tensor:
    features = torch.randn(1, 4, 8, 8).to(memory_format=torch.channels_last)
    return backend.decode(features, torch.randn(313, 4), torch.zeros(313), 1.0)[0]


# sigma 6 needs two slabs of rows
def blend(backend: CudaBackend) -> torch.Tensor:
    return backend.blend(*scene(), sigma=6.0, low=0.2, high=0.6)


def repair(backend: CudaBackend) -> torch.Tensor:
    return backend.repair(*scene(), 10.0, 0.5, radius=1, min_neighbours=3, sweeps=2, sigma=1.0)


def compose(backend: CudaBackend) -> torch.Tensor:
    return backend.compose(torch.full((40, 33), 50.0), scene()[0][0], (40, 33), 0, 8)


PLANTED = [
    # (what, flavour, file, old, new, primitive, what the harness says)
    ("missing barrier", "plain", "decode.cu", "    __syncthreads();\n    const int mine = part",
     "    const int mine = part", decode, None),
    ("missing barrier", "thread", "gaussian.cuh", "__syncthreads();  // the slab before has been read", "", blend,
     "data race"),
    ("off by one, right border", "plain", "blend.cu", "column >= width", "column > width", blend, "outside its bounds"),
    ("off by one, bottom border", "plain", "blend.cu", "row + j * TILE_ROWS >= height", "row + j * TILE_ROWS > height",
     blend, "touched|outside its bounds"),
    ("non-atomic counter", "thread", "repair.cu", "atomicAdd(counts + sweep, first + second)",
     "counts[sweep] += first + second", repair, "data race"),
    ("shared-memory overrun", "address", "gaussian.cuh", "= sums[j];", "= sums[j], slab[SLAB][threadIdx.x] = 0.0f;",
     blend, "runtime error"),
    ("shared-memory overrun by a pointer", "address", "compose.cu", "+ i) * 3;", "+ i) * 3 + 1;", compose,
     "AddressSanitizer"),
    ("misaligned float4", "plain", "chroma.cu", "plane % 4 == 0", "true",
     lambda backend: backend.scale_chroma(*scene(), 10.0, 0.5, 0.0, 360.0, 0.5), "misaligned"),
    ("in-place neighbourhood update", "thread", "repair.cu", "window_sums(ab, state,", "window_sums(new_ab, new_state,",
     repair, "data race"),
    ("barrier that some threads miss", "plain", "decode.cu", "    __syncthreads();\n    const int mine = part",
     "    if (cell < cells) __syncthreads();\n    const int mine = part", decode, "wait for each other"),
    ("lane outside the mask", "plain", "decode.cu", "0xffffffffu, sums.total", "0x7fffffffu, sums.total",
     decode_rows,
     "leaves it out"),
    ("float out of int's range", "plain", "lab.cuh", "return __saturatef(linear >", "return 1e9f * (linear >", compose,
     "range"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("flavour", "file", "old", "new", "primitive", "message"),
    [
        pytest.param(*rest, id=f"{what}-{rest[0]}", marks=pytest.mark.slow if rest[0] == "thread" else ())
        for what, *rest in PLANTED
    ],
)
def test_planted_bug_is_found(flavour, file, old, new, primitive, message, planted):
    with torch.no_grad(), emulated_gpu("plain", host_copies=True) as device:
        right = primitive(CudaBackend(device))
    planted(file, old, new)
    with torch.no_grad(), emulated_gpu(flavour, host_copies=True) as device:
        if message is None:  # found by what was read: memory that nobody has written holds NaN
            assert torch.isfinite(right).all()
            assert not torch.isfinite(primitive(CudaBackend(device))).all()
            return
        with pytest.raises(EmulatorError, match=message):
            primitive(CudaBackend(device))


def launch(arguments: list, grid=(1,), block=(256,), kernel="repair_mark") -> None:
    with emulated_gpu(host_copies=True):
        kernels.launch("repair", kernel, grid, block, arguments)


def mark_arguments(**changed: object) -> list:
    arguments = {
        "ab": torch.zeros(1, 2, 4, 8),
        "confidence": torch.zeros(1, 4, 8),
        "state": torch.zeros(1, 4, 8, dtype=torch.uint8),
        "plane": np.int32(32),
        "min_chroma": np.float32(1),
        "max_confidence": np.float32(1),
    }
    assert changed.keys() <= arguments.keys()
    return list((arguments | changed).values())


def test_right_launch_is_accepted():
    arguments = mark_arguments()
    launch(arguments)
    assert (arguments[2] == 0).all()  # gray: neither suspect nor trusted


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ab": torch.zeros(1, 2, 4, 8, dtype=torch.float64)}, "must be the address of float32"),
        ({"state": torch.zeros(1, 4, 8, dtype=torch.int32)}, "must be the address of uint8"),
        ({"plane": np.float32(32)}, "must be int32"),
        ({"plane": torch.zeros(1)}, "must be int32"),
        ({"min_chroma": np.int32(1)}, "must be float32"),
        ({"confidence": np.float32(1)}, "must be the address"),
        ({"ab": torch.zeros(1, 2, 4, 7)}, "touched"),
        ({"state": torch.zeros(1, 4, 7, dtype=torch.uint8)}, "outside its bounds"),
    ],
)
def test_wrong_argument_is_refused(changed, message):
    with pytest.raises(EmulatorError, match=message):
        launch(mark_arguments(**changed))


def test_one_kind_of_16_bits_for_another_is_refused():
    logits, bias = torch.zeros(313, 128, dtype=torch.bfloat16), torch.zeros(313)
    ab, confidence = torch.zeros(1, 2, 1, 128), torch.zeros(1, 1, 128)
    scalars = [*map(np.int32, (128, 128, 0, 128)), np.float32(1)]
    with pytest.raises(EmulatorError, match="is bfloat16"), emulated_gpu(host_copies=True):
        kernels.launch("decode", "decode_planar_float16", (1,), (32, 8), [logits, bias, ab, confidence, *scalars])


def test_python_number_is_refused():
    # CuPy would pass 64 bits where the kernel reads 32
    with pytest.raises(TypeError, match=r"np\.int32"):
        launch(mark_arguments(plane=32))


def test_strided_array_is_refused():
    # CuPy would pass the pointer and forget the strides
    with pytest.raises(ValueError, match="not contiguous"):
        launch(mark_arguments(ab=torch.zeros(1, 2, 8, 4).transpose(2, 3)))


def mark(addresses: Callable[[list[torch.Tensor]], list[object]]) -> None:
    """Launches repair_mark with whatever `addresses` makes of its tensors, past the checks of kernels.launch."""
    *tensors, plane, min_chroma, max_confidence = mark_arguments()
    with emulated_gpu(host_copies=True):
        module = cupy_standin.RawModule(code=kernels.source("repair"), options=kernels.options())
        passed = addresses(tensors)
        with cupy_standin.Stream("torch's stream"):
            function = module.get_function("repair_mark")
            function((1,), (256,), (*passed, plane, min_chroma, max_confidence))


def test_addresses_of_living_tensors_are_accepted():
    mark(lambda tensors: [np.uint64(tensor.data_ptr()) for tensor in tensors])


@pytest.mark.parametrize(
    ("addresses", "message"),
    [
        (
            lambda tensors: [tensor.data_ptr() for tensor in tensors],
            "got int",
        ),  # a Python number's size is CuPy's choice
        (lambda tensors: [np.int32(1)] * 3, "got int32"),  # the kernel would read 64 bits
        (lambda tensors: [np.uint64(0)] * 3, "no living tensor"),
        (lambda tensors: [np.uint64(tensor.data_ptr() + 4) for tensor in tensors], "no living tensor"),
        (lambda tensors: [np.uint64(tensor.clone().data_ptr()) for tensor in tensors], "no living tensor"),
    ],
    ids=["int", "int32", "null", "inside", "freed"],
)
def test_what_is_no_address_of_a_living_tensor_is_refused(addresses, message):
    with pytest.raises(EmulatorError, match=message):
        mark(addresses)


def test_wrong_number_of_arguments_is_refused():
    with pytest.raises(EmulatorError, match="takes 6 arguments, got 5"):
        launch(mark_arguments()[:-1])


@pytest.mark.parametrize(("grid", "block"), [((1,), (512,)), ((1, 70000), (256,)), ((1,), (1, 1, 128))])
def test_launch_beyond_the_limits_is_refused(grid, block):
    with pytest.raises(EmulatorError, match=r"__launch_bounds__|outside"):
        launch(mark_arguments(), grid, block)


def test_empty_grid_is_refused():
    with pytest.raises(ValueError, match="empty"):
        launch(mark_arguments(), (0,))


def test_unknown_kernel_is_refused():
    with pytest.raises(EmulatorError, match="no kernel"):
        launch(mark_arguments(), kernel="nothing")


def test_output_over_an_input_is_refused():
    ab, _ = scene()
    state = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.uint8)
    counts = torch.zeros(1, dtype=torch.int32)
    scalars = [np.int32(n) for n in (0, HEIGHT, WIDTH, 1, 3)]
    with pytest.raises(EmulatorError, match="overlaps"):
        launch([ab, state, ab, state.clone(), counts, *scalars], (3, 3, 1), (32, 8), "repair_sweep")


def test_hidden_copy_to_the_host_is_refused():
    with emulated_gpu() as device:
        confidence = torch.zeros(3, device=device)
        for copy in (torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist, bool):
            with pytest.raises(EmulatorError, match="copies to the host"):
                copy(confidence.sum() if copy in (torch.Tensor.item, bool) else confidence)
        assert len(torch.zeros(3, dtype=torch.uint8).cpu().numpy()) == 3  # finished pixels may go


def test_fresh_memory_holds_nan():
    with emulated_gpu(host_copies=True) as device:
        assert torch.isnan(torch.empty(5, device=device)).all()
        assert torch.isnan(torch.empty_like(torch.zeros(2, 3))).all()


@pytest.mark.parametrize("flavour", ["plain", "address"])
def test_writing_to_a_const_array_is_found(flavour, planted):
    planted(
        "repair.cu",
        "    const size_t image = blockIdx.y;\n",
        "    const size_t image = blockIdx.y;\n    ((float*)ab)[0] = 1.0f;\n",
    )
    with (
        emulated_gpu(flavour, host_copies=True),
        pytest.raises(EmulatorError, match=r"const|SEGV|const and was written"),
    ):
        kernels.launch("repair", "repair_mark", (1,), (256,), mark_arguments())


def test_half_precision_is_read_right():
    """Every one of the 65536 bit patterns of both 16-bit formats, as numbers.cuh reads them, against torch."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    code = """#include "numbers.cuh"
    extern "C" __global__ void __launch_bounds__(256) widen(const short* bits, float* half, float* brain) {
        const int i = 4 * (blockIdx.x * 256 + threadIdx.x);
        *(float4*)(half + i) = Float16::four(bits + i);
        *(float4*)(brain + i) = BFloat16::four(bits + i);
    }"""
    with emulated_gpu(host_copies=True):
        function = cupy_standin.RawModule(code=code, options=kernels.options()).get_function("widen")
        half, brain = torch.empty(2**16), torch.empty(2**16)
        with cupy_standin.Stream("torch's stream"):
            function((64,), (256,), tuple(np.uint64(tensor.data_ptr()) for tensor in (patterns, half, brain)))
    torch.testing.assert_close(half, patterns.view(torch.float16).float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(brain, patterns.view(torch.bfloat16).float(), rtol=0, atol=0, equal_nan=True)


def test_shared_memory_of_a_template_is_refused():
    """Its section would be ignored by g++, so that it would hold zeros instead of NaN: the author is told."""
    code = """template <class T> __device__ void f(T* y) { __shared__ T s[32]; s[threadIdx.x] = 1; y[0] = s[5]; }
    extern "C" __global__ void __launch_bounds__(32) kernel(float* y) { f(y); }"""
    with pytest.raises(EmulatorError, match="outside of templates"):
        compiler.Library(code, ())
