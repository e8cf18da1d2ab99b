"""The CUDA backend against the CPU's and float64 loops: emulated on the CPU everywhere, on the device with a GPU.

`pytest -m gpu` runs the same cases on a GPU (where there is none they are skipped, and say so), `pytest --slow` runs
them under AddressSanitizer and UndefinedBehaviorSanitizer too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cuda_layouts import cuda_group_norm
from emulator import compiler, cupy_standin
from emulator.cupy_standin import emulated_gpu
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from skimage import data
from test_postprocess_command import files, here  # noqa: F401 (a fixture)
from test_postprocess_cpu import fields

from dist_colorize.color.gamut import bin_centers
from dist_colorize.errors import UserError
from dist_colorize.models import ModelConfig, build
from dist_colorize.postprocess import kernels, selfcheck
from dist_colorize.postprocess.__main__ import main
from dist_colorize.postprocess.colorizer import Colorizer
from dist_colorize.postprocess.cpu import TorchBackend
from dist_colorize.postprocess.cuda import CudaBackend, decode_logits
from dist_colorize.postprocess.images import Photograph, read
from dist_colorize.postprocess.stages import load_preset, preset_names

CPU = TorchBackend()
needs_emulator = pytest.mark.skipif(compiler.compiler() is None, reason="the emulator needs g++ on x86-64 Linux")
FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


WAYS = [
    pytest.param("plain", marks=needs_emulator, id="emulated"),
    pytest.param("address", marks=[needs_emulator, pytest.mark.slow], id="sanitized"),
    pytest.param("device", marks=pytest.mark.gpu),
]


@pytest.fixture(params=WAYS)
def gpu(request) -> Iterator[CudaBackend]:
    """Every case three ways: emulated, under AddressSanitizer and UndefinedBehaviorSanitizer, on a GPU."""
    with torch.no_grad():
        if request.param == "device":
            yield CudaBackend(kernels.open_device())
        else:
            with emulated_gpu(request.param, host_copies=True) as device:
                yield CudaBackend(device)


def scene(batch: int, height: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return 40 * torch.randn(batch, 2, height, width, generator=random), torch.rand(
        batch, height, width, generator=random
    )


def on(backend: CudaBackend, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.contiguous().to(backend.device) for tensor in tensors]


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=tolerance)


SIZES = [(1, 1, 1), (2, 31, 33), (1, 1, 5000), (1, 256, 256), (3, 5, 4)]


# ---------------------------------------------------------------- decode


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("batch", "height", "width"), SIZES[:3])
def test_decode(gpu, dtype, layout, batch, height, width):
    random = torch.Generator().manual_seed(1)
    features = torch.randn(batch, 64, height, width, generator=random).to(dtype).to(memory_format=layout)
    weight, bias = 0.4 * torch.randn(313, 64, generator=random), torch.randn(313, generator=random)
    ab, confidence = gpu.decode(features.to(gpu.device), *on(gpu, weight, bias), 0.38)
    expected = CPU.decode(features, weight, bias, 0.38)
    assert_near(ab, expected[0], 2e-3)
    assert_near(confidence, expected[1], 1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_decode_of_a_whole_working_grid(gpu, layout):
    random = torch.Generator().manual_seed(2)
    features = torch.randn(1, 16, 256, 256, generator=random).to(memory_format=layout)
    weight, bias = torch.randn(313, 16, generator=random), torch.zeros(313)
    ab, confidence = gpu.decode(features.to(gpu.device), *on(gpu, weight, bias), 1.0)
    expected = CPU.decode(features, weight, bias, 1.0)
    assert_near(ab, expected[0], 2e-3)
    assert_near(confidence, expected[1], 1e-5)


def oracle(logits: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """[313, n] -> ab [2, n], confidence [n] in float64."""
    clean = np.clip(np.nan_to_num(logits.astype(np.float64), nan=-1e30, posinf=1e30, neginf=-1e30), -1e30, 1e30)
    weights = np.exp((clean - clean.max(axis=0)) / temperature)
    share = weights / weights.sum(axis=0)
    return bin_centers().T @ share, share.max(axis=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["planar", "rows"])
@pytest.mark.parametrize("temperature", [0.001, 0.38, 1.0, 1000.0])
def test_decode_of_logits_with_every_kind_of_number(gpu, dtype, layout, temperature):
    random = torch.Generator().manual_seed(3)
    logits = 5 * torch.randn(313, 200, generator=random)
    for cell, value in enumerate([math.nan, math.inf, -math.inf, 3e38, -3e38, 0.0]):
        logits[:, cell] = value  # all bins
        logits[7 * cell, 10 + cell] = value  # one bin
        logits[::2, 20 + cell] = value  # every second
    logits = logits.to(dtype)
    given_logits = logits if layout == "planar" else logits.T.contiguous()
    ab, confidence = torch.empty(1, 2, 1, 210), torch.empty(1, 1, 210)
    ab[...], confidence[...] = 77.0, 77.0
    ab, confidence, bias, given_logits = on(gpu, ab, confidence, torch.zeros(313), given_logits)
    decode_logits(layout, given_logits, 200, bias, temperature, ab, confidence, 10)
    expected_ab, expected_confidence = oracle(logits.float().numpy(), temperature)
    assert (ab[..., :10] == 77).all()  # what lies before the chunk is another chunk's
    assert (confidence[..., :10] == 77).all()
    np.testing.assert_allclose(ab[0, :, 0, 10:].cpu(), expected_ab, rtol=0, atol=0.05 if temperature == 0.001 else 2e-3)
    np.testing.assert_allclose(confidence[0, 0, 10:].cpu(), expected_confidence, rtol=0, atol=1e-3)


def test_not_a_number_among_the_features_harms_only_its_cell(gpu):
    random = torch.Generator().manual_seed(4)
    features, weight = torch.randn(1, 64, 9, 9, generator=random), torch.randn(313, 64, generator=random)
    features[0, 5, 4, 4], features[0, 3, 8, 8] = math.nan, math.inf
    ab, confidence = gpu.decode(*on(gpu, features, weight, torch.zeros(313)), 0.38)
    expected = CPU.decode(features, weight, torch.zeros(313), 0.38)
    assert torch.isfinite(ab).all()
    assert_near(ab, expected[0], 2e-3)
    assert_near(confidence, expected[1], 1e-5)


@needs_emulator
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_logits_of_a_chunk_fit_into_half_of_the_cache(layout):
    random = torch.Generator().manual_seed(5)
    features = torch.randn(2, 8, 40, 41, generator=random).to(memory_format=layout)
    weight, bias = torch.randn(313, 8, generator=random), torch.zeros(313)
    results, chunks = [], []
    for l2_bytes in (2**24, 2**20):
        with torch.no_grad(), emulated_gpu(l2_bytes=l2_bytes, host_copies=True) as device:
            results.append(CudaBackend(device).decode(features, weight, bias, 0.38))
            chunks.append(len(cupy_standin.setting.launches))
    planar = layout == torch.contiguous_format
    # 2^19 bytes hold the fp32 logits of 3 * 128 cells
    assert chunks == ([2, 2 * 5] if planar else [1, 9])
    # the library's product may sum in another order for another width
    assert_near(results[1][0], results[0][0], 1e-3)


@needs_emulator
def test_decode_makes_smaller_chunks_when_memory_is_short(monkeypatch):
    random = torch.Generator().manual_seed(6)
    arguments = (
        torch.randn(1, 8, 40, 40, generator=random),
        torch.randn(313, 8, generator=random),
        torch.zeros(313),
        0.38,
    )
    with torch.no_grad(), emulated_gpu(host_copies=True) as device:
        backend = CudaBackend(device)
        plenty = backend.decode(*arguments)
        real = torch.empty

        def scarce(*shape, **options):
            size = math.prod(shape[0] if isinstance(shape[0], tuple) else shape)
            if size > limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(*shape, **options)

        monkeypatch.setattr(torch, "empty", scarce)
        limit = 313 * 300
        assert_near(backend.decode(*arguments)[0], plenty[0], 1e-3)
        limit = 2 * 40 * 40
        with pytest.raises(UserError, match=r"memory of .* is full"):
            backend.decode(*arguments)


# ---------------------------------------------------------------- the other primitives


@pytest.mark.parametrize(("batch", "height", "width"), SIZES)
@pytest.mark.parametrize(
    ("sigma", "low", "high"), [(2.0, 0.1, 0.4), (3.0, 0.5, 0.5), (0.1, 2.0, 2.0), (11.0, 0.0, 1.0), (1.5, 0.0, 0.0)]
)
def test_blend(gpu, batch, height, width, sigma, low, high):
    ab, confidence = scene(batch, height, width)
    found = gpu.blend(*on(gpu, ab, confidence), sigma, low, high)
    assert_near(found, CPU.blend(ab, confidence, sigma, low, high), 2e-4)
    sure = (confidence >= high).unsqueeze(1).expand_as(ab)
    assert torch.equal(found.cpu()[sure], ab[sure])


def test_blur_wider_than_the_image(gpu):
    ab, confidence = scene(1, 3, 5)
    assert_near(gpu.blend(*on(gpu, ab, confidence), 100.0, 2.0, 2.0), CPU.blend(ab, confidence, 100.0, 2.0, 2.0), 2e-4)


@pytest.mark.parametrize(("batch", "height", "width"), SIZES)
@pytest.mark.parametrize(
    "arguments",
    [(20.0, 0.5, 40.0, 60.0, 0.3), (30.0, 0.3, 0.0, 360.0, 0.3), (0.0, 2.0, 200.0, 359.0, 0.0), (1e9, 2, 0, 360, 0)],
)
def test_scale_chroma(gpu, batch, height, width, arguments):
    ab, confidence = scene(batch, height, width)
    found = gpu.scale_chroma(*on(gpu, ab, confidence), *arguments).cpu()
    expected = CPU.scale_chroma(ab, confidence, *arguments)
    # a hue exactly at the limit may fall on either side
    assert ((found - expected).abs() > 2e-4).double().mean() <= 1e-4
    untouched = confidence.unsqueeze(1).expand_as(ab) >= arguments[1]
    assert torch.equal(found[untouched], ab[untouched])


REPAIRS = [
    (20.0, 0.15, 2, 3, 8, 3.0),
    (20.0, 0.6, 1, 3, 3, 3.0),
    (0.0, 0.99, 3, 5, 16, 2.0),
    (0.0, 2.0, 1, 1, 2, 2.0),  # all masked, nobody trusted
    (1e9, 0.5, 1, 1, 2, 2.0),  # none masked
    (5.0, 0.5, 16, 1, 0, 2.0),  # no sweep
    (5.0, 0.9, 16, 700, 4, 2.0),
]


@pytest.mark.parametrize(("batch", "height", "width"), SIZES)
@pytest.mark.parametrize("arguments", REPAIRS)
def test_repair(gpu, batch, height, width, arguments):
    ab, confidence = scene(batch, height, width)
    found = gpu.repair(*on(gpu, ab, confidence), *arguments)
    assert_near(found, CPU.repair(ab, confidence, *arguments), 2e-4)


def test_repair_crosses_a_large_hole_sweep_by_sweep(gpu):
    """One trusted column at the left: each sweep repairs one more column, through both buffers, up to the early end."""
    ab, confidence = scene(1, 20, 70)
    confidence[...] = 0.0
    confidence[..., 0] = 1.0
    for sweeps in (1, 2, 5, 69, 100):
        arguments = (0.0, 0.5, 1, 1, sweeps, 1.0)
        assert_near(gpu.repair(*on(gpu, ab, confidence), *arguments), CPU.repair(ab, confidence, *arguments), 2e-4)


@FEW
@given(field=fields(40), values=st.tuples(st.sampled_from([0.0, 20.0, 60.0]), st.sampled_from([0.1, 0.15, 0.9])))
def test_repair_and_blend_of_odd_fields(gpu, field, values):
    ab, confidence = field
    min_chroma, max_confidence = values
    arguments = (min_chroma, max_confidence, 2, 3, 5, 1.5)
    found = gpu.repair(*on(gpu, ab, confidence), *arguments).cpu()
    assert_near(found, CPU.repair(ab, confidence, *arguments), 2e-4)
    assert torch.isfinite(found).all()
    assert_near(gpu.blend(*on(gpu, ab, confidence), 1.5, 0.1, 0.5), CPU.blend(ab, confidence, 1.5, 0.1, 0.5), 2e-4)


def levels_apart(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (found.cpu().int() - expected.int()).abs()


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (31, 33), (256, 256), (100, 1027), (5000, 1)])
@pytest.mark.parametrize("bits", [8, 16])
def test_compose(gpu, size, bits):
    ab, _ = scene(1, 13, 17)
    lightness = 100 * torch.rand(size, generator=torch.Generator().manual_seed(7))
    found = gpu.compose(*on(gpu, lightness, ab[0]), size, 0, bits)
    assert found.shape == (*size, 3)
    apart = levels_apart(found, CPU.compose(lightness, ab[0], size, 0, bits))
    # out of gamut a bisection step may fall on either side: 1 part in 4096 of the chroma
    assert apart.max() <= (1 if bits == 8 else 257)
    assert (apart > (0 if bits == 8 else 16)).double().mean() < (1e-3 if bits == 8 else 0.02)


def test_lightness_outside_its_range(gpu):
    lightness = torch.tensor([[-5.0, 0.0, 100.0, 105.0, math.nan, 50.0]])
    ab = torch.zeros(2, 1, 1)
    found = gpu.compose(*on(gpu, lightness, ab), (1, 6), 0, 8).cpu()
    assert found[0, :, 0].tolist() == [0, 0, 255, 255, 0, 119]


@pytest.mark.parametrize("bits", [8, 16])
def test_a_picture_in_strips_is_the_picture_at_once(gpu, bits):
    ab, _ = scene(1, 13, 17)
    size = (75, 101)
    lightness = 100 * torch.rand(size, generator=torch.Generator().manual_seed(8))
    lightness, cells = on(gpu, lightness, ab[0])
    whole = gpu.compose(lightness, cells, size, 0, bits).cpu()
    for rows in (1, 7, 40):  # strips of a larger tensor: their first pixel is aligned to nothing
        strips = [
            gpu.compose(lightness[row : row + rows], cells, size, row, bits).cpu() for row in range(0, size[0], rows)
        ]
        assert torch.equal(torch.cat(strips), whole)


# ---------------------------------------------------------------- order of threads, memory, races


def everything(device: torch.device) -> dict[str, torch.Tensor]:
    """All primitives on a grid of several blocks with remainders in both directions."""
    calls = selfcheck.primitives(CudaBackend(device), selfcheck.scene(20, 40, scale=2))
    chosen = {name: call() for name, call in calls.items() if not name.endswith(("fp16", "bf16"))}
    return {f"{name}: {output}": tensor for name, outputs in chosen.items() for output, tensor in outputs.items()}


@needs_emulator
def test_bits_depend_on_no_order_and_no_place_in_memory():
    results = []
    for options in ({}, {"descending": True}, {"at_start": True}):
        with torch.no_grad(), emulated_gpu(host_copies=True, **options) as device:
            results.append(everything(device))
    for other in results[1:]:
        for name, tensor in results[0].items():
            assert torch.equal(tensor, other[name]), name


def masks(device: torch.device, height: int, width: int) -> dict[str, torch.Tensor]:
    """What the sanitizers see of the extremes: all cells masked, none, numbers that are none, 16-bit features."""
    backend, results = CudaBackend(device), {}
    ab, confidence = scene(1, height, width)
    for name, arguments in {"all": (0.0, 2.0, 1, 1, 2, 2.0), "none": (1e9, 0.5, 1, 1, 2, 2.0)}.items():
        results[f"repair {name}"] = backend.repair(ab, confidence, *arguments)
        results[f"scale {name}"] = backend.scale_chroma(ab, confidence, arguments[0], 2.0, 0.0, 360.0, 0.3)
        results[f"blend {name}"] = backend.blend(ab, confidence, 2.0, *((2.0, 2.0) if name == "all" else (0.0, 0.0)))
    random = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(313, 8, generator=random), torch.zeros(313)
    features = torch.randn(1, 8, height, width, generator=random)
    features.view(-1)[::5], features.view(-1)[2::7], features.view(-1)[3::11] = math.nan, math.inf, -math.inf
    results["decode"] = backend.decode(features, weight, bias, 0.38)[0]
    for layout in ("planar", "rows"):
        for dtype in (torch.float16, torch.bfloat16):
            logits = torch.randn(313, 4 * height * width, generator=random).to(dtype)
            logits[::3, 0], logits[::2, 1], logits[:, 2] = math.nan, math.inf, -math.inf
            out, sure = torch.zeros(1, 2, height, width), torch.zeros(1, height, width)
            passed = logits if layout == "planar" else logits.T.contiguous()
            decode_logits(layout, passed, height * width, bias, 0.38, out, sure, 0)
            results[f"{layout} {dtype}"] = out
    lightness = torch.tensor([math.nan, -5.0, 50.0, 105.0, math.inf]).repeat(height * width)[: height * width]
    for bits in (8, 16):
        results[f"compose{bits}"] = backend.compose(lightness.view(height, width), ab[0], (height, width), 0, bits)
    return results


@needs_emulator
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (31, 33)])
def test_sanitizers_find_nothing_at_the_extremes(height, width):
    """What `pytest --slow -k sanitized` does with every case, here with the few that are most likely to fail."""
    results = []
    for kind in ("plain", "address"):
        with torch.no_grad(), emulated_gpu(kind, host_copies=True) as device:
            results.append(masks(device, height, width))
    for name, tensor in results[0].items():
        assert_near(
            results[1][name].float(), tensor.float(), 257 if name == "compose16" else 1 if "comp" in name else 2e-3
        )


@needs_emulator
@pytest.mark.parametrize("flavour", ["address", pytest.param("thread", marks=pytest.mark.slow)])
def test_sanitizers_find_nothing(flavour):
    """AddressSanitizer with UndefinedBehaviorSanitizer; ThreadSanitizer. Planted bugs: test_kernels_emulator.py."""
    results = []
    for kind in ("plain", flavour):
        with torch.no_grad(), emulated_gpu(kind, host_copies=True) as device:
            results.append(everything(device))
    for name, tensor in results[0].items():
        levels = 257 if "16 bits" in name else 1
        assert_near(results[1][name].float(), tensor.float(), levels if "pixels" in name else 1e-3)


@needs_emulator
def test_nothing_waits_for_the_gpu():
    """No primitive copies to the host or asks the device anything."""
    data_ = selfcheck.scene(20, 40)
    with torch.no_grad(), emulated_gpu(host_copies=False) as device:
        for call in selfcheck.primitives(CudaBackend(device), data_).values():
            call()


# ---------------------------------------------------------------- whole pictures, the command


@pytest.mark.parametrize("preset", preset_names())
def test_whole_pictures_agree_with_the_cpu(gpu, preset):
    torch.manual_seed(0)
    network = build(ModelConfig(width=0.1, encoder="scratch"))
    torch.nn.init.normal_(network.head.weight, std=0.3)
    photograph = Photograph(data.astronaut()[:300, :401], None)
    pictures = []
    for backend in (CPU, gpu):
        colorizer = Colorizer(network, load_preset(preset), backend, 96)
        prediction = colorizer.predict(photograph)
        pictures.append(colorizer.paint(photograph, prediction.final).astype(int))
    apart = np.abs(pictures[1] - pictures[0]).max(axis=-1)
    assert np.ptp(pictures[0], axis=-1).mean() > 2  # there is colour to compare
    assert (apart <= 1).mean() >= 0.999


@pytest.mark.gpu
def test_group_norm_on_a_gpu_answers_in_the_layout_that_the_other_tests_assume():
    norm, seen = torch.nn.GroupNorm(2, 16), torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    with cuda_group_norm(), torch.no_grad():
        assumed = norm(seen), torch.autocast("cpu", torch.bfloat16)(norm)(seen.bfloat16())
    norm.cuda()
    with torch.no_grad():
        found = norm(seen.cuda()), torch.autocast("cuda", torch.bfloat16)(norm)(seen.cuda().bfloat16())
    for one, other in zip(found, assumed, strict=True):
        assert (one.dtype, one.stride()) == (other.dtype, other.stride())


@pytest.mark.parametrize("way", WAYS)
def test_the_command_runs_on_the_gpu_from_end_to_end(here, way, monkeypatch):  # noqa: F811
    used = set()

    def noted(name, kernel, *rest):
        used.add(kernel)
        kernels.launch(name, kernel, *rest)

    monkeypatch.setattr("dist_colorize.postprocess.cuda.launch", noted)
    arguments = ["--checkpoint", "runs/one", "in", "--raw", "--confidence", "--panel", "--output"]
    assert main([*arguments, "cpu"]) == 0
    assert not used
    if way == "device":
        assert main([*arguments, "gpu", "--gpu"]) == 0
    else:
        with cuda_group_norm(), emulated_gpu(way, host_copies=True):
            assert main([*arguments, "gpu", "--gpu"]) == 0
    # the last thing before the features is a GroupNorm, which answers in NCHW on CUDA
    stages = {"blend", "repair_mark", "repair_sweep", "repair_finish"}
    assert used == {"decode_planar_float32", *stages, "compose8", "compose16"}
    assert files(here / "gpu") == files(here / "cpu")
    for name in files(here / "cpu"):
        ours, theirs = (read(here / side / name) for side in ("gpu", "cpu"))
        apart = np.abs(ours.pixels.astype(int) - theirs.pixels.astype(int)).max(axis=-1)
        lossy = name.endswith((".jpg", ".webp"))  # a level more or less is enough for another quantised coefficient
        assert (apart <= (1 if ours.bits == 8 else 257) + 8 * lossy).mean() >= 0.999, name


def test_gpu_without_a_gpu_is_an_error(here):  # noqa: F811
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(UserError, match=r"no GPU can be used \(.*driver.*nvidia-smi"):
        main(["--checkpoint", "runs/one", "in", "--output", "out", "--gpu"])
    assert not (here / "out").exists()


# ---------------------------------------------------------------- what keeps a GPU from being used


@pytest.fixture
def driver(monkeypatch) -> SimpleNamespace:
    """A driver whose answers a test sets."""
    answers = SimpleNamespace(error=None, count=1, capability=(9, 0), chosen=[])

    def init() -> None:
        if answers.error:
            raise RuntimeError(answers.error)

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: answers.count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: answers.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A card")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: answers.chosen.append(str(device)))
    return answers


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"error": "Found no NVIDIA driver on your system.\nMore."}, r"no GPU can be used \(Found no NVIDIA driver"),
        ({"error": "The NVIDIA driver on your system is too old (found version 11040)."}, "too old.*580 or newer"),
        ({"error": ""}, None),
        ({"count": 0}, "CUDA_VISIBLE_DEVICES"),
        ({"count": 2, "error": None}, None),
        ({"capability": (7, 0)}, r"A card\) has compute capability 7\.0, the kernels need 7\.5"),
    ],
)
def test_what_a_driver_may_answer(driver, changed, message):
    vars(driver).update(changed)
    if message is None:
        assert kernels.open_device() == torch.device("cuda", 0)
        return
    with pytest.raises(UserError, match=message) as caught:
        kernels.open_device()
    assert "\n" not in str(caught.value)
    # every rank of the node says the same, but for what is amiss with its own GPU
    assert caught.value.shared == ("capability" not in changed) and not driver.chosen


def test_each_process_of_a_node_has_its_gpu(driver):
    assert kernels.open_device(3) == torch.device("cuda", 0)  # the cluster shows it its own one only
    driver.count = 8
    assert [kernels.open_device(rank).index for rank in range(10)] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    # without that, threads and libraries would take GPU 0, and half a gigabyte of it for each process
    assert driver.chosen == ["cuda:0", *(f"cuda:{index}" for index in [0, 1, 2, 3, 4, 5, 6, 7, 0, 1])]


def test_a_process_opens_no_gpu_but_its_own(driver, here, monkeypatch):  # noqa: F811
    """Rank 3 of 8: not even to see whether there are any."""
    driver.count = 8
    monkeypatch.setenv("LOCAL_RANK", "3")
    opened = []

    class Opened(CudaBackend):
        def __init__(self, device):
            opened.append(str(device))
            raise UserError("that is enough")

    monkeypatch.setattr("dist_colorize.postprocess.cuda.CudaBackend", Opened)
    with pytest.raises(UserError, match="enough"):
        main(["--checkpoint", "runs/one", "in", "--output", "out", "--gpu"])
    assert driver.chosen == opened == ["cuda:3"]


def test_a_gpu_computes_in_ieee_single_precision(driver):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    kernels.open_device()
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_without_cupy(driver, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    with pytest.raises(UserError, match="pip install cupy-cuda13x"):
        kernels.open_device()


# ---------------------------------------------------------------- the self-check of the doctor


def test_selfcheck_agrees(gpu):
    found = list(selfcheck.agreements(gpu))
    assert [str(check) for check in found if not check.ok] == []
    assert len(found) == 4 * 2 + 7


@pytest.mark.gpu
def test_torch_on_a_gpu_agrees_with_the_cpu():
    """What scores validation photographs on a GPU."""
    found = selfcheck.agreements(TorchBackend(kernels.open_device()))
    assert [str(check) for check in found if not check.ok] == []


def broken(breakage: str, tensor: torch.Tensor, tolerance: float) -> torch.Tensor:
    if breakage == "shape":
        return tensor[..., :1]
    if breakage == "zero":
        return torch.zeros_like(tensor)
    if breakage == "off":
        return tensor + (tolerance + (0.5 * tolerance if tensor.is_floating_point() else 1))
    changed = tensor.double()
    changed.view(-1)[len(changed.view(-1)) // 2] = math.nan
    return changed


KINDS = {
    "decode": (torch.float32, True),
    "decode, channels last": (torch.float32, False),
    "decode, fp16": (torch.float16, True),
    "decode, bf16": (torch.bfloat16, True),
}


@pytest.mark.parametrize("breakage", ["shape", "zero", "off", "nan"])
@pytest.mark.parametrize("output", [0, 1], ids=["ab", "confidence"])
@pytest.mark.parametrize("variant", KINDS)
def test_selfcheck_notices_a_wrong_decode(variant, output, breakage):
    """Each of its two results, in each of its four variants alone."""
    name = ("ab", "confidence")[output]

    class Broken(TorchBackend):
        def decode(self, features, weight, bias, temperature):
            results = list(super().decode(features, weight, bias, temperature))
            if (features.dtype, features.is_contiguous()) == KINDS[variant]:
                results[output] = broken(breakage, results[output], selfcheck.TOLERANCES[name])
            return tuple(results)

    found = [(check.name, check.output) for check in selfcheck.agreements(Broken()) if not check.ok]
    assert found == [(variant, name)]


def test_selfcheck_notices_a_confidence_that_is_a_thousandth_off():
    class Broken(TorchBackend):
        def decode(self, *arguments):
            ab, confidence = super().decode(*arguments)
            return ab, confidence + 1e-3

    found = [(check.name, check.output) for check in selfcheck.agreements(Broken()) if not check.ok]
    assert found == [(variant, "confidence") for variant in KINDS]


@pytest.mark.parametrize("breakage", ["shape", "zero", "off", "nan"])
@pytest.mark.parametrize(
    ("primitive", "names"),
    [
        ("blend", ["blend", "blur"]),
        ("scale_chroma", ["scale chroma", "scale chroma, red"]),
        ("repair", ["repair"]),
        ("compose", ["compose", "compose, 16 bits"]),
    ],
)
def test_selfcheck_notices_a_wrong_result(primitive, names, breakage):
    class Broken(TorchBackend):
        pass

    def method(self, *arguments):
        right = getattr(TorchBackend, primitive)(self, *arguments)
        tolerance = 16.0 if right.dtype == torch.uint16 else 1.0 if right.dtype == torch.uint8 else 2e-3
        return broken(breakage, right.double() if breakage == "off" else right, tolerance)

    setattr(Broken, primitive, method)
    assert [check.name for check in selfcheck.agreements(Broken()) if not check.ok] == names


@needs_emulator
def test_selfcheck_notices_a_wrong_kernel():
    class Wrong(CudaBackend):
        def blend(self, ab, confidence, sigma, low, high):
            return super().blend(ab, confidence, sigma * 1.05, low, high)

    with emulated_gpu(host_copies=True) as device:
        assert [check.name for check in selfcheck.agreements(Wrong(device)) if not check.ok] == ["blend", "blur"]


def test_what_is_timed_is_the_primitive_alone():
    """No copy of the check's own: what a call gives is what the backend returned, tensor by tensor."""
    returned = []

    class Watched(TorchBackend):
        def __getattribute__(self, name):
            value = super().__getattribute__(name)
            return watch(value) if name in ("decode", "blend", "scale_chroma", "repair", "compose") else value

    def watch(genuine):
        def call(*arguments):
            results = genuine(*arguments)
            returned.extend(results if isinstance(results, tuple) else [results])
            return results

        return call

    for call in selfcheck.primitives(Watched(), selfcheck.scene(8, 9)).values():
        returned.clear()
        given = list(call().values())
        assert [id(tensor) for tensor in given] == [id(tensor) for tensor in returned]


def test_selfcheck_measures(gpu, monkeypatch):
    """Where there is no GPU, only that the measuring itself works: a clock that stands for the device's events."""
    if gpu.device.type == "cpu":

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None: ...

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: Event) -> float:
                return 1.0

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(selfcheck, "REPEATS", 1)
    found = {speed.name: speed for speed in selfcheck.speeds(gpu, 16 if gpu.device.type == "cpu" else 512)}
    assert len(found) == 7
    assert all(speed.seconds > 0 and speed.share_of_copy > 0 for speed in found.values())
