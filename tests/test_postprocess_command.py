"""The command, end to end, with an untrained network: what it writes, skips, reports and returns."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import pyvips
import torch
from conftest import CHECKOUT, kill_tree, rank_environment, torchrun_command
from PIL import Image
from skimage import data
from skimage.color import rgb2lab

from dist_colorize import checkpoint, config
from dist_colorize.data import DataConfig
from dist_colorize.errors import UserError
from dist_colorize.models import ModelConfig, build
from dist_colorize.postprocess.__main__ import main
from dist_colorize.postprocess.colorizer import NETWORK_BYTES, Colorizer, working_size
from dist_colorize.postprocess.cpu import TorchBackend
from dist_colorize.postprocess.images import Photograph, lightness, read, to_vips
from dist_colorize.postprocess.stages import load_preset
from dist_colorize.recipe import Recipe


def make_run(run: Path, recipe: Recipe) -> Path:
    torch.manual_seed(0)
    network = build(recipe.model)
    torch.nn.init.normal_(network.head.weight, std=0.3)
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(config.dump(recipe))
    state = {"step": 1, "model": network.state_dict(), "config": config.to_dict(recipe)}
    return checkpoint.save(run / "checkpoints", 1, state)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working folder with photographs of every kind in `in`, and one run in `runs/one`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    photos = tmp_path / "in"
    (photos / "deep").mkdir(parents=True)
    cat = data.chelsea()[:120, :160]
    Image.fromarray(cat).save(photos / "cat.jpg")
    Image.fromarray(cat).convert("L").save(photos / "deep" / "gray.png")
    to_vips(cat.astype(np.uint16) * 257).write_to_file(str(photos / "deep" / "cat16.tif"))
    Image.fromarray(np.dstack([cat, cat[..., 0]])).save(photos / "clear.webp", lossless=True)
    Image.fromarray(cat).quantize(64).save(photos / "cat.gif")
    Image.fromarray(cat[:1, :1]).save(photos / "dot.png")
    Image.fromarray(cat[:1].repeat(20, axis=1)).save(photos / "wide.png")
    recipe = Recipe(model=ModelConfig(width=0.1, encoder="scratch"), data=DataConfig(root=str(photos), crop=32))
    make_run(tmp_path / "runs" / "one", recipe)
    return tmp_path


RESULTS = ["cat.gif.png", "cat.jpg", "clear.webp", "deep/cat16.tif", "deep/gray.png", "dot.png", "wide.png"]


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_folder_with_every_kind_of_photograph(here, capsys):
    assert main(["--checkpoint", "runs/one", "in", "--output", "out"]) == 0
    assert files(here / "out") == RESULTS
    assert "7 colorized" in capsys.readouterr().out
    for name in RESULTS:
        source = here / "in" / ("cat.gif" if name == "cat.gif.png" else name)
        before, after = read(source), read(here / "out" / name)
        assert after.pixels.shape == (*before.size, 3)
        assert after.bits == before.bits
        assert (after.alpha is None) == (before.alpha is None)
        if before.alpha is not None:
            assert (after.alpha == before.alpha).all()
        # the photograph's own lightness, at its own resolution, as well as the format holds it
        difference = np.abs(rgb2lab(after.pixels)[..., 0] - lightness(before.pixels).numpy())
        assert difference.mean() < (1.5 if name.endswith(("jpg", "webp")) else 0.4 if after.bits == 8 else 0.01)
    # and colour, after all
    assert rgb2lab(read(here / "out/deep/gray.png").pixels)[..., 1:].std() > 1


def test_a_second_run_skips_what_is_finished(here, capsys):
    arguments = ["--checkpoint", "runs/one", "in", "--output", "out"]
    main(arguments)
    stamps = {name: (here / "out" / name).stat().st_mtime_ns for name in RESULTS}
    (here / "out/cat.jpg").unlink()
    assert main(arguments) == 0
    assert "1 colorized, 6 already there" in capsys.readouterr().out
    changed = [name for name in RESULTS if (here / "out" / name).stat().st_mtime_ns != stamps[name]]
    assert changed == ["cat.jpg"]
    assert main([*arguments, "--overwrite"]) == 0
    assert "7 colorized" in capsys.readouterr().out


def test_the_extras(here):
    arguments = ["--checkpoint", "runs/one", "in/cat.jpg", "in/deep/gray.png", "--output", "out"]
    assert main(arguments) == 0
    assert main([*arguments, "--confidence", "--raw", "--panel"]) == 0
    for name in ("cat.jpg", "gray.png"):
        suffix = Path(name).suffix
        assert read(here / f"out/{name}.confidence.png").pixels.shape == (120, 160, 1)
        assert read(here / f"out/{name}.raw{suffix}").pixels.shape == (120, 160, 3)
    # grayscale, raw, blended, repaired, and the truth where it is known
    widths = [read(here / f"out/{name}.panel.png").size[1] for name in ("cat.jpg", "gray.png")]
    assert widths == [5 * 160, 4 * 160]


def test_no_arguments_take_the_newest_run_and_its_validation_photographs(here, capsys):
    assert main([]) == 0
    # the index of the data set takes no GIF, no gray, no tiny photograph
    assert {"cat.jpg", "deep/cat16.tif"} <= set(files(here / "runs/one/colorized"))
    older = make_run(here / "runs/two", Recipe(model=ModelConfig(width=0.1, encoder="scratch")))
    os.utime(older, (1, 1))
    main(["in/cat.jpg"])
    assert "network: runs/one/" in capsys.readouterr().out


def test_the_checkpoint_may_be_a_run_its_folder_or_a_file(here):
    pictures = []
    for number, where in enumerate(["runs/one", "runs/one/checkpoints", "runs/one/checkpoints/step-00000001.pt"]):
        assert main(["--checkpoint", where, "in/cat.jpg", "--output", f"out{number}"]) == 0
        pictures.append((here / f"out{number}/cat.jpg").read_bytes())
    assert pictures[0] == pictures[1] == pictures[2]


def test_unreadable_photographs_are_reported_and_the_rest_goes_on(here, capsys):
    (here / "in/broken.jpg").write_bytes((here / "in/cat.jpg").read_bytes()[:900])
    (here / "in/text\n.jpg").write_text("no photograph")
    assert main(["--checkpoint", "runs/one", "in", "gone.jpg", "--output", "out"]) == 1
    assert files(here / "out") == RESULTS
    captured = capsys.readouterr()
    assert "failed: in/broken.jpg: " in captured.err
    assert "failed: in/text\\n.jpg: not a photograph" in captured.err
    assert "failed: gone.jpg: no such file" in captured.err
    assert "7 colorized, 3 failed" in captured.out


def test_a_giant_that_does_not_fit_into_memory_is_refused_by_name(here, capsys, monkeypatch):
    monkeypatch.setattr("dist_colorize.postprocess.memory.free_memory", lambda: 50_000)
    assert main(["--checkpoint", "runs/one", "in", "--output", "out"]) == 1
    assert "GiB of memory" in capsys.readouterr().err
    assert "dot.png" in files(here / "out")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--checkpoint", "nowhere", "in"], "nowhere"),
        (["--checkpoint", "in", "in"], "no checkpoint"),
        (["--checkpoint", "half.pt", "in", "--output", "out"], "half.pt"),
        (["--checkpoint", "other", "in", "--output", "out"], "architecture|another network"),
        (["--checkpoint", "alone.pt", "in"], "--output"),
        (["--checkpoint", "alone.pt", "--output", "out"], "name photographs"),
        (["in", "--preset", "best"], "best"),
        (["in", "--output", "file"], "file"),
        (["in", "--output", "/proc/nowhere"], "/proc/nowhere"),
        (["in", "--output", "in"], "its own result"),
        (["nothing/*.png"], "nothing"),
    ],
)
def test_wrong_usage_is_named(here, arguments, words):
    whole = here / "runs/one/checkpoints/step-00000001.pt"
    (here / "half.pt").write_bytes(whole.read_bytes()[:-3000])
    (here / "alone.pt").write_bytes(whole.read_bytes())
    (here / "file").write_text("")
    state = checkpoint.load(whole)
    state["config"]["model"]["width"] = 0.5
    (here / "other").mkdir()
    checkpoint.save(here / "other", 1, state)
    with pytest.raises(UserError, match=words):
        main(arguments)


@pytest.mark.parametrize("arguments", [["--size", "100"], ["--size", "x"], ["--jobs", "0"], ["--colour"]])
def test_wrong_options_leave_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_full_disk_ends_the_run_and_loses_nothing(here, capsys, monkeypatch):
    import dist_colorize.files as writing

    real, calls = writing.sync, []

    def sync(path):
        calls.append(path)
        if len(calls) > 4:  # each picture is synced, then its folder
            raise OSError(28, "No space left on device")
        real(path)

    monkeypatch.setattr(writing, "sync", sync)
    assert main(["--checkpoint", "runs/one", "in", "--output", "out", "--jobs", "1"]) == 1
    captured = capsys.readouterr()
    assert "error: cannot write" in captured.err
    assert "No space left" in captured.err
    assert "2 colorized" in captured.out
    assert all(not name.startswith(".") and not name.endswith(".tmp") for name in files(here / "out"))
    for name in files(here / "out"):
        read(here / "out" / name)
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert main(["--checkpoint", "runs/one", "in", "--output", "out"]) == 0
    assert files(here / "out") == RESULTS


def command(*arguments: str, **options) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dist_colorize.postprocess", *arguments],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_errors_come_without_a_traceback_and_help_teaches(here):
    process = command("--checkpoint", "nowhere", "in")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith("error: ")
    assert "Traceback" not in out + err
    process = command("--help")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "--checkpoint runs/RUN scan.tif archive/ --output colorized" in out


def test_an_interrupt_finishes_what_has_begun(here):
    (here / "many").mkdir()
    picture = (here / "in/cat.jpg").read_bytes()
    for number in range(400):
        (here / "many" / f"{number:03}.jpg").write_bytes(picture)
    process = command("--checkpoint", "runs/one", "many", "--output", "out", "--jobs", "2")
    deadline = time.monotonic() + 60
    while len(files(here / "out")) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    done = files(here / "out")
    assert process.returncode == 75, err
    assert f"{len(done)} colorized" in out
    assert f"{400 - len(done)} not done" in out
    assert "Traceback" not in err
    assert 3 <= len(done) < 400
    for name in done:  # no temporary, no half of a picture
        read(here / "out" / name)


class Flat(torch.nn.Module):
    """A network that is sure of one bin where L > 50, and of nothing elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Conv2d(1, 313, 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.head.weight[200] = 10.0
        self.seen: list[tuple[int, ...]] = []

    def features(self, lightness: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(lightness.shape))
        return torch.nn.functional.avg_pool2d((lightness > 50).float(), 2)


def test_colours_land_where_the_network_saw_them():
    """Left half dark, right half light, in a size that is no multiple of anything: the edge stays in its column."""
    pixels = np.zeros((211, 523, 1), np.uint8)
    pixels[:, 261:] = 200
    network = Flat()
    colorizer = Colorizer(network, load_preset("temperature"), TorchBackend(), size=128)
    photograph = Photograph(pixels, None)
    result = colorizer.paint(photograph, colorizer.predict(photograph).final)
    assert network.seen == [(1, 1, 128, 320)]
    chroma = np.hypot(*np.moveaxis(rgb2lab(result)[..., 1:], -1, 0))
    assert chroma[:, 300:].min() > 5
    assert chroma[:, :220].max() < 3
    assert np.abs(rgb2lab(result)[:, 300:, 0] - rgb2lab(np.full((1, 1, 3), 200, np.uint8))[0, 0, 0]).max() < 1


@pytest.mark.bits
def test_strips_do_not_change_the_picture(monkeypatch):
    pixels = data.chelsea()[:100, :150]
    colorizer = Colorizer(Flat(), load_preset("final"), TorchBackend(), size=64)
    photograph = Photograph(pixels[..., :1], None)
    ab = colorizer.predict(photograph).final
    whole = colorizer.paint(photograph, ab)
    monkeypatch.setattr("dist_colorize.postprocess.colorizer.STRIP_PIXELS", 7 * 150)
    assert (colorizer.paint(photograph, ab) == whole).all()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((512, 512), (256, 256)),
        ((300, 400), (256, 336)),
        ((400, 300), (336, 256)),
        ((1, 5000), (256, 1024)),
        ((1, 1), (256, 256)),
    ],
)
def test_working_size(shape, expected):
    assert working_size(*shape, 256) == expected


@pytest.mark.bits
def test_strips_become_lower_where_memory_is_short(monkeypatch):
    """... down to one row; the picture stays the same to the bit."""
    photograph = Photograph(data.chelsea()[:100, :150], None)
    colorizer = Colorizer(Flat(), load_preset("final"), TorchBackend(), size=64)
    ab = colorizer.predict(photograph).final
    whole = colorizer.paint(photograph, ab)
    real, limit, strips = colorizer.backend.compose, 13, []

    def scarce(level, *arguments):
        if len(level) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        strips.append(len(level))
        return real(level, *arguments)

    monkeypatch.setattr(colorizer.backend, "compose", scarce, raising=False)
    assert (colorizer.paint(photograph, ab) == whole).all()
    assert max(strips) <= 13
    assert sum(strips) == 100
    limit = 0
    with pytest.raises(UserError, match="memory of cpu is full"):
        colorizer.paint(photograph, ab)


class Scarce(Flat):
    """Has room for so many photographs at a time."""

    room = 2

    def features(self, lightness):
        if len(lightness) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().features(lightness)


@pytest.mark.parametrize("message", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "another one"])
def test_a_network_that_does_not_fit_is_told(monkeypatch, message):
    def to(*_):
        raise RuntimeError(message)

    monkeypatch.setattr(Flat, "to", to)
    expected = RuntimeError if message == "another one" else UserError
    with pytest.raises(expected, match="another one" if expected is RuntimeError else "memory of cpu is full"):
        Colorizer(Flat(), load_preset("final"), TorchBackend(), size=64)


def test_memory_for_the_network_is_bounded_and_its_lack_told():
    network = Scarce()
    colorizer = Colorizer(network, load_preset("final"), TorchBackend(), size=64, memory=5 * 64 * 96 * NETWORK_BYTES)
    looks = [torch.rand(1, 1, 64, 96) * 100 for _ in range(5)]
    assert colorizer.together(looks[0]) == 5
    assert colorizer.together(torch.rand(1, 1, 64, 64)) == 7
    assert colorizer.together(torch.rand(1, 1, 640, 960)) == 1
    with pytest.raises(UserError, match=r"too small for 5 x 96x64 pixels .* choose a --size below 64"):
        colorizer.predict_together(looks)
    assert colorizer.together(looks[0]) == 2  # the next time with fewer
    assert len(colorizer.predict_together(looks[:2])) == 2


@pytest.mark.parametrize("preset", ["final", "blend"])
def test_company_in_the_network_changes_no_photograph(preset):
    """The same colours, whether alone or with others: 2e-3 of ab, as between CPU and GPU."""
    torch.manual_seed(0)
    network = build(ModelConfig(width=0.1, encoder="scratch"))
    torch.nn.init.normal_(network.head.weight, std=0.3)
    colorizer = Colorizer(network, load_preset(preset), TorchBackend(), size=64)
    looks = [colorizer.look(Photograph(data.chelsea()[i : 96 + i, :128], None)) for i in (0, 90, 200)]
    together = colorizer.predict_together(looks)
    for look, prediction in zip(looks, together, strict=True):
        (alone,) = colorizer.predict_together([look])
        torch.testing.assert_close(prediction.final, alone.final, rtol=0, atol=2e-3)
        torch.testing.assert_close(prediction.confidence, alone.confidence, rtol=0, atol=1e-5)


def test_the_command_with_several_at_a_time(here, monkeypatch):
    """A folder of equal photographs in batches: the same results as one by one, to a level."""
    for number in range(12):
        Image.fromarray(data.chelsea()[5 * number :][:64, :96]).save(here / "in" / f"like{number}.png")
    together, sizes = Colorizer.predict_together, []

    def counted(self, looks):
        sizes.append(len(looks))
        return together(self, looks)

    monkeypatch.setattr(Colorizer, "predict_together", counted)
    assert main(["--checkpoint", "runs/one", "in", "--output", "alone"]) == 0
    assert set(sizes) == {1}
    monkeypatch.setattr(Colorizer, "together", lambda self, look: 8)
    assert main(["--checkpoint", "runs/one", "in", "--output", "many", "--jobs", "8"]) == 0
    assert max(sizes) > 1
    assert files(here / "many") == files(here / "alone")
    for name in files(here / "many"):
        one, other = (read(here / side / name).pixels.astype(int) for side in ("alone", "many"))
        assert (np.abs(one - other) <= (1 if "16" not in name else 257)).mean() >= 0.999, name


def share(nproc: int, *arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """The command under torchrun, in a session of its own."""
    whole = torchrun_command(nproc, *launcher, "-m", "dist_colorize.postprocess", *arguments)
    return subprocess.Popen(
        whole,
        env=rank_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], seconds: float = 240) -> tuple[str, str]:
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        raise


def test_two_processes_share_the_photographs(here):
    """Each photograph once. One process finds only broken ones and waits for the other, as torchrun would end it."""
    picture = (here / "in/cat.jpg").read_bytes()
    (here / "pairs").mkdir()
    for number in range(100):
        (here / f"pairs/{number:02}.jpg").write_bytes(picture[: 900 if number % 2 else None])
    # slow and many enough that the other has not begun them all when torchrun would end it
    options = ("--output", "out", "--jobs", "1", "--size", "256")
    process = share(2, "--checkpoint", "runs/one", "pairs", "gone.jpg", *options)
    out, err = finish(process)
    assert process.returncode == 1, err  # torchrun's own, where a process left with another code than 0
    assert files(here / "out") == [f"{number:02}.jpg" for number in range(0, 100, 2)]
    assert out.count("network: ") == 1
    assert [err.count(f"failed: pairs/{number:02}.jpg: ") for number in range(100)] == [0, 1] * 50
    assert err.count("failed: gone.jpg: ") == 1
    assert sorted(re.findall(r"^\[rank .*$", out, re.MULTILINE)) == [
        "[rank 0] 50 colorized, 1 failed",
        "[rank 1] 0 colorized, 50 failed",
    ]
    assert err.count("Traceback") == err.count("ChildFailedError(") == 1  # torchrun's


def test_an_error_of_all_processes_is_told_once(here):
    process = share(2, "--checkpoint", "nowhere", "in")
    _, err = finish(process)
    assert process.returncode == 1
    assert err.count("cannot read the checkpoint nowhere") == 1, err


def test_a_killed_process_loses_only_what_it_had_begun(here):
    """kill -9 of one of two; torchrun starts both again, and they leave alone what is there."""
    (here / "many").mkdir()
    picture = (here / "in/cat.jpg").read_bytes()
    for number in range(150):
        (here / "many" / f"{number:03}.jpg").write_bytes(picture)
    arguments = ("--checkpoint", "runs/one", "many", "--output", "out", "--jobs", "1")
    process = share(2, *arguments, launcher=("--max-restarts=1",))
    deadline = time.monotonic() + 120
    while len(done := files(here / "out")) < 6 and time.monotonic() < deadline:
        time.sleep(0.02)
    stamps = {name: (here / "out" / name).stat().st_mtime_ns for name in done if not name.startswith(".")}
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    os.kill(int(listed.stdout.split()[1]), signal.SIGKILL)
    out, err = finish(process)
    assert process.returncode == 0, err
    assert files(here / "out") == [f"{n:03}.jpg" for n in range(150)]  # also nothing of the killed one's last picture
    assert all((here / "out" / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())
    assert " already there" in out
    for name in files(here / "out"):
        read(here / "out" / name)


@pytest.mark.slow
def test_a_hundred_megapixels_stay_under_4_gib(here):
    import resource

    noise = pyvips.Image.gaussnoise(10000, 10000, mean=128, sigma=20).cast("uchar")
    noise.bandjoin([noise, noise]).copy(interpretation="srgb").tiffsave(str(here / "big.tif"))
    process = command("--checkpoint", "runs/one", "big.tif", "--output", "out")
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert read(here / "out/big.tif").size == (10000, 10000)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert peak < 4 * 2**30
