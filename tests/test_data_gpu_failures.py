"""A GPU that fails is told as that, with the remedy; photographs are blamed where they are broken, and by the CPU.

The GPU is a fake: its pipeline is the same graph on the CPU, which fails as a test tells it to.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dist_colorize.data import loader as loader_module
from dist_colorize.data import pipeline
from dist_colorize.data.catalog import build_index
from dist_colorize.data.columns import Photographs, open_index
from dist_colorize.data.config import DataConfig
from dist_colorize.data.failures import gpu_failure, named_samples, reason
from dist_colorize.data.loader import Batch, Loader
from dist_colorize.data.order import Order
from dist_colorize.data.prefetch import Prefetch
from dist_colorize.errors import RunFailed

BATCH = 4
CONFIG = DataConfig(crop=32, threads=1)


def jpeg(seed: int, side: int = 64) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(noise).resize((side, side)).save(file, "JPEG", quality=90)
    return file.getvalue()


GOOD = np.frombuffer(jpeg(99), dtype=np.uint8)
CONTEXT = (
    "Critical error in pipeline:\nError in MIXED operator `nvidia.dali.fn.decoders.image_slice`,\nwhich was used in "
    'the pipeline definition with the following traceback:\n\n  File "pipeline.py", line 91, in _define\n\nencountered:'
    "\n\n{}\nC++ context: [/opt/dali/x.h:1]\nCurrent pipeline object is no longer valid."
)
"""What stands around every error of an operator."""


@pytest.fixture
def photographs(tmp_path: Path) -> Photographs:
    root = tmp_path / "photographs"
    root.mkdir()
    for number in range(8):
        (root / f"{number}.jpg").write_bytes(jpeg(number))
    return open_index(build_index(root, 32, tmp_path / "index"))


def damage(monkeypatch: pytest.MonkeyPatch, *rows: int) -> None:
    """Of these photographs only the first tenth can be read from now on."""
    read = Photographs.read

    def read_a_part(photographs: Photographs, row: int) -> bytes:
        content = read(photographs, row)
        pixels = content.index(b"\xff\xda")
        return content[: pixels + (len(content) - pixels) // 10] if row in rows else content

    monkeypatch.setattr(Photographs, "read", read_a_part)


def loader_on(device: torch.device, photographs: Photographs) -> Loader:
    world: Any = SimpleNamespace(rank=0, size=1, local_size=1, device=device)
    return Loader(photographs, CONFIG, Order(len(photographs), photographs.fingerprint, 0), world, BATCH)


class FakeGpu:
    """GPU 1 of a machine that has none."""

    device = torch.device("cuda", 1)

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.build_fails: Exception | None = None
        self.run_fails: Exception | None = None
        self.tolerates = False
        """Whether its decoder takes what the CPU's does not, for another image."""
        self.pipelines = 0
        self.judges: Counter[str] = Counter()
        """Pipelines built to try single images, by device."""
        self.tried: Counter[str] = Counter()
        """Single images tried, by device."""
        self.selected: dict[str, Any] = {}
        """The CUDA device of each thread that selected one."""
        self.at_work: list[Any] = []
        """The CUDA device of the thread that built or ran a pipeline or delivered a batch."""
        self._build, self._define, self._decode = pipeline.build, pipeline._define_crop, pipeline.CropDecoder.decode
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "device", self.select)
        monkeypatch.setattr(pipeline, "build", self.build)
        monkeypatch.setattr(pipeline, "_define_crop", self.define_crop)
        monkeypatch.setattr(pipeline.CropDecoder, "decode", lambda *given: self.decode(*given))
        monkeypatch.setattr(loader_module._Decoder, "_deliver", lambda decoder, *given: self.deliver(*given))

    @contextmanager
    def select(self, device: torch.device) -> Iterator[None]:
        self.selected[threading.current_thread().name] = device
        yield
        del self.selected[threading.current_thread().name]

    def note_device(self) -> None:
        self.at_work.append(self.selected.get(threading.current_thread().name))

    def build(
        self, source: Any, batch: int, size: int, threads: int, device: str, gpu: int, whole: bool, load: float
    ) -> Any:
        assert (device, gpu, whole, load) == ("gpu", 1, True, 0.0)
        self.note_device()
        self.pipelines += 1
        if self.build_fails:
            raise self.build_fails

        def tolerant_source() -> Any:
            encoded, anchor, shape, flip = source()
            crops = zip(encoded, anchor.tolist(), shape.tolist(), strict=True)
            return (
                [image if self.cpu_decodes(image, *y_x, *h_w) else GOOD for image, y_x, h_w in crops],
                anchor,
                shape,
                flip,
            )

        dali = self._build(tolerant_source if self.tolerates else source, batch, size, threads, "cpu", None, True)
        return SimpleNamespace(run=lambda: self.run(dali))

    def run(self, dali: Any) -> Any:
        self.note_device()
        outputs = dali.run()
        if self.run_fails:
            raise self.run_fails
        return outputs

    def define_crop(self, device: str, load: float, **settings: Any) -> Any:
        self.judges[device] += 1
        return self._define("cpu", load, **(settings | {"device_id": None}))

    def decode(self, decoder: pipeline.CropDecoder, *given: Any) -> Any:
        self.tried[decoder._device] += 1
        if decoder._device == "gpu" and self.tolerates:
            return None
        return self._decode(decoder, *given)

    def cpu_decodes(self, *given: Any) -> bool:
        with suppress(RuntimeError):
            self._decode(pipeline.CropDecoder("cpu", None), *given)
            return True
        return False

    def deliver(self, outputs: Any, plan: Any, workers: Any) -> Batch:
        self.note_device()
        L, a, b = (torch.from_numpy(np.array(output.as_tensor())) for output in outputs)
        return Batch(L, torch.cat([a, b], dim=1), torch.ones(BATCH), torch.from_numpy(plan.row))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return FakeGpu(monkeypatch)


MEMORY = "train.micro_batch or data.prefetch, or end other programs"
RESTART = r"start the run again with run\.dir=RUN"
CPU = r"set data\.device=cpu to decode on the CPU$"
ERRORS = {
    "torch's memory": ("CUDA out of memory. Tried to allocate 2.00 GiB", MEMORY),
    "DALI's memory": ("Can't allocate 123 bytes on device 1.", MEMORY),
    "CUDA's memory": ("CUDA allocation failed", MEMORY),
    "the codec's memory": ("nvImageCodec failure: '#5'", MEMORY),
    "runtime": ("CUDA runtime API error cudaErrorIllegalAddress (700):\nan illegal memory access", RESTART),
    "driver": ("CUDA driver API error CUDA_ERROR_LAUNCH_FAILED (719)", RESTART),
    "codec": ("nvImageCodec failure: '#8'", CPU),
    "sample": ("Failed to decode sample #2 : ", CPU),
}
"""What DALI may say of a GPU, and a part of the remedy."""


@pytest.mark.parametrize(("text", "remedy"), ERRORS.values(), ids=ERRORS)
def test_a_gpu_that_fails_is_told_and_no_photograph_is_blamed(
    photographs: Photographs, gpu: FakeGpu, text: str, remedy: str
) -> None:
    gpu.run_fails = RuntimeError(CONTEXT.format(text))
    with loader_on(gpu.device, photographs) as loader:
        with pytest.raises(RunFailed, match=f"decoding fails on cuda:1.*{remedy}") as raised:
            next(loader.batches())
        assert loader.replaced == []
    assert " ".join(text.split()).rstrip(": ") in str(raised.value)
    assert "_define" not in str(raised.value)
    assert gpu.pipelines == 1
    assert gpu.judges == {"cpu": 1}  # one for all that were in work
    assert gpu.tried["cpu"] >= BATCH


def test_a_gpu_that_fails_when_the_pipeline_is_built_is_told_too(photographs: Photographs, gpu: FakeGpu) -> None:
    gpu.build_fails = MemoryError("std::bad_alloc")
    with loader_on(gpu.device, photographs) as loader, pytest.raises(RunFailed, match=r"train\.micro_batch"):
        next(loader.batches())


def test_a_broken_photograph_is_replaced_on_a_gpu_as_on_a_cpu(
    photographs: Photographs, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(monkeypatch, 3, 6)
    with loader_on(torch.device("cpu"), photographs) as loader:
        batches = loader.batches()
        expected = [next(batches).sample for _ in range(10)]
        assert {item.name for item in loader.replaced} == {photographs.name(row) for row in (3, 6)}
    gpu = FakeGpu(monkeypatch)
    with loader_on(gpu.device, photographs) as loader:
        batches = loader.batches()
        assert torch.equal(torch.stack([next(batches).sample for _ in range(10)]), torch.stack(expected))
        assert {item.name for item in loader.replaced} == {photographs.name(row) for row in (3, 6)}
    assert gpu.pipelines <= 3  # once more for each bad file
    # each failure breaks the small pipeline that met it; nothing else has one built
    failures = gpu.tried["gpu"]
    assert gpu.tried["cpu"] > failures
    assert gpu.judges["cpu"] <= failures + 1
    assert gpu.judges["gpu"] <= failures


def test_the_photograph_that_is_named_is_tried_first_and_explains_the_failure(
    photographs: Photographs, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = Order(len(photographs), photographs.fingerprint, 0)
    bad = int(order.draw(np.arange(BATCH, dtype=np.uint64)).sample[2])
    damage(monkeypatch, bad)
    with loader_on(gpu.device, photographs) as loader:
        assert bad not in next(loader.batches()).sample
    # the slot of this name in the two or three batches in work, and later the row wherever it comes again
    assert gpu.tried["cpu"] < 2 * BATCH


def test_what_the_gpu_decodes_is_good_whatever_has_failed_beside_it(
    photographs: Photographs, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the photograph of a slot would depend on which others lie in its batch."""
    damage(monkeypatch, *range(len(photographs)))
    gpu.tolerates = True
    gpu.run_fails = RuntimeError(CONTEXT.format("nvImageCodec failure: '#8'"))
    with loader_on(gpu.device, photographs) as loader:
        batches = loader.batches()
        with pytest.raises(RunFailed, match=r"data\.device=cpu"):
            deque(batches, maxlen=0)
        assert loader.replaced == []
    assert gpu.tried["gpu"] >= 1


def test_the_thread_that_decodes_is_on_the_ranks_gpu(photographs: Photographs, gpu: FakeGpu) -> None:
    """A thread begins on GPU 0, where it would make a context of half a gigabyte."""
    with loader_on(gpu.device, photographs) as loader:
        batches = loader.batches()
        for _ in range(3):
            next(batches)
    assert len(gpu.at_work) > 6
    assert set(gpu.at_work) == {gpu.device}
    assert gpu.selected == {}


def test_a_thread_works_within_its_context_from_the_first_item_to_the_closing() -> None:
    log: list[str] = []

    @contextmanager
    def context() -> Iterator[None]:
        log.append("in")
        yield
        log.append("out")

    def items() -> Iterator[int]:
        try:
            log.append("first")
            yield 1
            yield 2
        finally:
            log.append("closed")

    with Prefetch(items(), 1, context()) as ahead:
        assert next(ahead) == 1
    assert log == ["in", "first", "closed", "out"]


def test_what_dali_says_is_understood() -> None:
    """Of two images the second is cut off."""
    whole = np.frombuffer(jpeg(0), dtype=np.uint8)
    many = ([whole, whole[: len(whole) // 2]], *(np.array([pair] * 2, np.int32) for pair in ((0, 0), (64, 64))))
    dali = pipeline.build(lambda: (*many, np.zeros(2, np.int32)), 2, 32, 1, "cpu", None, False)
    with pytest.raises(RuntimeError, match="sample #1") as raised:
        dali.run()
    assert named_samples(raised.value) == {1}
    assert reason(raised.value) == "Failed to decode sample #1"
    assert named_samples(RuntimeError("CUDA allocation failed")) == set()
    assert reason(RuntimeError("")) == "RuntimeError"
    assert gpu_failure(raised.value, torch.device("cuda", 3)).code == 1
