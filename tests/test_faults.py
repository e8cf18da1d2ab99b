"""Faults injected into whole training runs, in this process: what was cut off ends as if nothing had happened."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import DEVICES
from PIL import Image
from test_train import TINY, assert_same_bits, last_state, losses

from dist_colorize import checkpoint, train
from dist_colorize.checkpoint import SaveError
from dist_colorize.distributed import World
from dist_colorize.errors import FAILURE, Interrupted, RunFailed, UserError
from dist_colorize.optimisation import Optimisation
from dist_colorize.stopping import StopFlag

Run = Callable[..., None]
SETTINGS = {
    "fp32": ["train.precision=fp32"],
    "bf16, accumulated, averaged": ["train.precision=bf16", "train.micro_batch=3", "train.ema=0.9"],
}


@pytest.fixture(autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One cache for all tests; signal handlers as they were."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    handlers = {number: signal.getsignal(number) for number in StopFlag.SIGNALS}
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def make_photographs(folder: Path, number: int) -> Path:
    """12 of them are one and a half steps of 8: every other epoch ends with a step."""
    folder.mkdir()
    generator = random.Random(3)
    for i in range(number):
        size = (48 + 2 * i, 60)
        Image.frombytes("RGB", size, generator.randbytes(3 * size[0] * size[1])).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    return make_photographs(tmp_path / "photographs", 12)


@pytest.fixture
def trained_on() -> str:
    """The device of a run; tests that hold for others as well are parametrized."""
    return "cpu"


@pytest.fixture
def run(tmp_path: Path, photographs: Path, trained_on: str) -> Run:
    """`run(folder, *overrides)`: six tiny steps in this process, unless the overrides say otherwise."""
    validation = make_photographs(tmp_path / "validation", 2)

    def start(folder: Path | None, *overrides: str) -> None:
        where = [f"distributed.device={trained_on}", *([f"run.dir={folder}"] if folder else [])]
        train.main([*TINY, f"data.root={photographs}", f"data.val_root={validation}", *where, *overrides])

    return start


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation takes no time, for tests of something else."""
    scored(monkeypatch, itertools.repeat(1.0))


def scored(monkeypatch: pytest.MonkeyPatch, values: Iterator[float]) -> None:
    def evaluate(*args: Any) -> SimpleNamespace:
        return SimpleNamespace(
            scores={"final": {"psnr": next(values)}}, pictures=[], count=2, table=lambda: "a table of scores"
        )

    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(train, "write_evaluation", lambda folder, *args: (folder / "evaluation.json").touch())


def at_step(monkeypatch: pytest.MonkeyPatch, action: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
    """`action(step, L)` runs before each step, counted from 0, and returns the L that is trained on."""
    genuine = Optimisation.step
    monkeypatch.setattr(
        Optimisation, "step", lambda self, number, L, ab: genuine(self, number, action(number, L.clone()), ab)
    )


def stopping_after(steps: int) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """The signal comes in the step before the last one: its answer travels during that."""

    def stop(step: int, L: torch.Tensor) -> torch.Tensor:
        if step + 2 == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return L

    return stop


# ---------------------------------------------------------------- interrupted == uninterrupted


class Cut:
    """Sends this process a real signal when it enters its n-th collective: waiting, counting, a step, a validation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.at, self.signal = 0, 0, signal.SIGTERM

        def counted(world: World) -> None:
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), self.signal)

        monkeypatch.setattr(World, "_enter", counted)

    def after(self, collectives: int, number: signal.Signals) -> None:
        self.count, self.at, self.signal = 0, collectives, number
        for each in StopFlag.SIGNALS:  # the last collective of a run comes after its StopFlag has gone
            signal.signal(each, signal.SIG_IGN)


def cut_and_resume(
    run: Run, whole: Path, folder: Path, settings: list[str], cut: Cut, points: Callable[[], int]
) -> int:
    """Interrupts the run at each point until it ends of itself; compares it with the whole one; returns the cuts."""
    cuts = 0
    while True:
        number = StopFlag.SIGNALS[cuts % len(StopFlag.SIGNALS)]
        cut.after(points(), number)
        try:
            run(folder, *settings)
            break
        except Interrupted:
            cuts += 1
            assert json.loads((folder / "status.json").read_text())["state"] == "interrupted"
    cut.after(0, signal.SIGTERM)
    assert losses(folder) == losses(whole)
    one, other = last_state(folder), last_state(whole)
    assert one.pop("run") != other.pop("run")
    for state in (one, other):
        state["config"].pop("run")
    assert_same_bits(one, other)
    return cuts


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.bits
def test_a_run_cut_at_random_collectives_ends_to_the_bit_like_a_whole_one(
    run: Run, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = Cut(monkeypatch)
    run(tmp_path / "whole", *settings)
    generator, total = random.Random(1), cut.count
    points = iter([2, total // 2, *(generator.randrange(4, total) for _ in range(3))])  # the first: waiting for rank 0
    cuts = cut_and_resume(run, tmp_path / "whole", tmp_path / "cut", settings, cut, lambda: next(points, 10**9))
    assert cuts >= 3


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.bits
def test_a_run_cut_at_every_collective_ends_to_the_bit_like_a_whole_one(
    run: Run, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting for rank 0, counting colours (the cache of the counts is removed), first step, end of an epoch (the third
    step), validation, last step, final evaluation."""
    cut = Cut(monkeypatch)
    run(tmp_path / "whole", *settings)
    total, cuts = cut.count, 0
    for first in range(1, total + 1):
        for cached in Path(os.environ["XDG_CACHE_HOME"]).glob("**/colours/*.npy"):
            cached.unlink()
        points = iter([first])
        folder = tmp_path / f"cut-{first}"
        cuts += cut_and_resume(
            run, tmp_path / "whole", folder, settings, cut, lambda points=points: next(points, 10**9)
        )
    assert cuts >= total - 6  # the whole one waited for its index, too; and the last few come too late


# ---------------------------------------------------------------- disks


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A disk that refuses the checkpoints of the steps in `full`."""
    state: dict[str, Any] = {"full": ()}
    genuine = checkpoint._write

    def write(path: Path, content: dict[str, Any]) -> None:
        if content["step"] in state["full"]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        genuine(path, content)

    monkeypatch.setattr(checkpoint, "_write", write)
    return state


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.bits
def test_training_goes_on_when_a_save_fails_and_the_next_one_is_made(
    run: Run, quick: None, tmp_path: Path, disk: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "whole", "train.validate_every=0", "checkpoint.every=2")
    disk["full"] = (4,)
    run(tmp_path / "run", "train.validate_every=0", "checkpoint.every=2")
    told = capsys.readouterr().err
    assert told.count("WARNING: cannot save") == 1 and "step-00000004.pt: No space left on device" in told
    assert "older checkpoints are untouched" in told and "trying again at the next checkpoint" in told
    assert checkpoints(tmp_path / "run") == ["best", "latest", "step-00000002.pt", "step-00000006.pt"]
    assert_same_bits(last_state(tmp_path / "run")["model"], last_state(tmp_path / "whole")["model"])


def test_when_the_last_save_fails_the_run_says_so_and_keeps_the_older_one(
    run: Run, quick: None, tmp_path: Path, disk: dict[str, Any]
) -> None:
    disk["full"] = (6,)
    with pytest.raises(SaveError, match=r"step-00000006.pt: No space left .* older checkpoints are untouched") as error:
        run(tmp_path / "run", "train.validate_every=0")
    assert error.value.code == FAILURE
    assert (tmp_path / "run" / "evaluation.json").exists()  # what could be had
    assert last_state(tmp_path / "run")["step"] == 3
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    disk["full"] = ()
    run(tmp_path / "run", "train.validate_every=0")
    assert last_state(tmp_path / "run")["step"] == 6


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 8 MiB; a checkpoint of these tests takes about 1."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"a small disk cannot be mounted here, which takes root: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> None:
    """Others take what is left, but for a part of the next checkpoint."""
    free = shutil.disk_usage(disk).free - 300_000
    (disk / "others").write_bytes(bytes(free))


@pytest.mark.slow
@pytest.mark.parametrize("room_again", [True, False], ids=["room again", "full to the end"])
@pytest.mark.bits
def test_a_whole_run_on_a_disk_that_becomes_full(
    run: Run,
    small_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    room_again: bool,
) -> None:
    """Full from step 3 on, in the middle of writing; with room again from step 6 on, or never."""
    settings = ["checkpoint.every=2", "checkpoint.keep=1", "train.steps=8", "train.validate_every=0"]
    run(tmp_path / "whole", *settings)
    folder = small_disk / "run"

    def others(step: int, L: torch.Tensor) -> torch.Tensor:
        for thread in threading.enumerate():  # what is being saved, first
            if thread.name == "checkpoint":
                thread.join()
        if step == 3:
            fill(small_disk)
        if step == 6 and room_again:
            (small_disk / "others").unlink()
        return L

    capsys.readouterr()
    with monkeypatch.context() as patch:
        at_step(patch, others)
        if room_again:
            run(folder, *settings)
        else:
            with pytest.raises(SaveError, match=r"step-00000008.pt: No space left on device \(0 MiB free\); older"):
                run(folder, *settings)
    told = capsys.readouterr().err
    assert told.count("WARNING: cannot save") == (2 if room_again else 3)
    assert "No space left on device" in told and "trying again at the next checkpoint" in told
    kept = 8 if room_again else 2
    assert checkpoints(folder) == ["best", "latest", f"step-{kept:08d}.pt"][0 if room_again else 1 :]
    assert last_state(folder)["step"] == kept and not list(folder.glob("checkpoints/.*"))
    if not room_again:
        (small_disk / "others").unlink()
        run(folder, *settings)
    assert_same_bits(last_state(folder)["model"], last_state(tmp_path / "whole")["model"])


def test_an_interrupted_run_tries_again_what_failed_before(
    run: Run, quick: None, tmp_path: Path, disk: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save of step 3 failed and no step was made since: the last one before leaving must be made all the same."""

    at_step(monkeypatch, stopping_after(3))
    failing = iter([True])
    genuine = checkpoint._write

    def once(path: Path, content: dict[str, Any]) -> None:
        disk["full"] = (3,) if next(failing, False) else ()
        genuine(path, content)

    monkeypatch.setattr(checkpoint, "_write", once)
    with pytest.raises(Interrupted):
        run(tmp_path / "run")
    assert last_state(tmp_path / "run")["step"] == 3


@pytest.mark.parametrize("trained_on", DEVICES)
def test_the_best_checkpoint_stays(run: Run, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored(monkeypatch, iter([5.0, 7.0, 6.0, 4.0, 3.0, 2.0]))
    often = ["train.validate_every=1", "checkpoint.every=100", "checkpoint.keep=1"]
    with monkeypatch.context() as patch:
        at_step(patch, stopping_after(4))
        with pytest.raises(Interrupted):  # validated after steps 1, 2, 3
            run(tmp_path / "run", *often)
    assert checkpoints(tmp_path / "run") == ["best", "latest", "step-00000002.pt", "step-00000004.pt"]
    run(tmp_path / "run", *often)  # validates after steps 4, 5 and 6, all worse than the best before the interruption
    assert checkpoints(tmp_path / "run") == ["best", "latest", "step-00000002.pt", "step-00000006.pt"]
    assert (tmp_path / "run" / "checkpoints" / "best").readlink() == Path("step-00000002.pt")


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("trained_on", DEVICES)
def test_a_batch_of_nan_changes_nothing_and_is_counted(
    run: Run, precision: str, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[Mapping[str, torch.Tensor]] = []
    genuine = Optimisation.step

    def step(self: Optimisation, number: int, L: torch.Tensor, ab: torch.Tensor) -> torch.Tensor:
        loss = genuine(self, number, L * (float("nan") if number in (2, 3) else 1), ab)
        moments = {f"{i}.{k}": v for i, (_, s) in enumerate(self.adam.state.items()) for k, v in s.items()}
        states.append({k: v.clone() for k, v in (self.module.network.state_dict() | moments).items()})
        return loss

    monkeypatch.setattr(Optimisation, "step", step)
    run(tmp_path / "run", "train.validate_every=0", f"train.precision={precision}")
    assert_same_bits(states[2], states[1])
    assert_same_bits(states[3], states[1])
    assert any(not torch.equal(states[4][name], states[3][name]) for name in states[4])
    assert all(torch.isfinite(tensor).all() for tensor in states[-1].values())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 2, 2, 2]
    assert [line["loss"] is None for line in lines] == [False, False, True, True, False, False]


@pytest.mark.parametrize("trained_on", DEVICES)
def test_nothing_but_nan_stops_the_run_with_the_last_good_weights(
    run: Run, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, lambda step, L: L * float("inf") if step >= 2 else L)
    with pytest.raises(RunFailed, match=r"3 steps in a row had a loss .* train.max_skipped=2.* train.lr") as error:
        run(tmp_path / "run", "train.max_skipped=2", "train.steps=20", "checkpoint.every=2", "train.validate_every=0")
    assert error.value.code == FAILURE
    state = last_state(tmp_path / "run")
    assert state["step"] == 5 and state["skipped"].tolist() == [3, 3]
    good = checkpoint.load(tmp_path / "run" / "checkpoints" / "step-00000002.pt")
    assert_same_bits(state["model"], good["model"])
    assert_same_bits(state["optimizer"]["state"], good["optimizer"]["state"])


# ---------------------------------------------------------------- photographs


def going_bad(names: list[str], photographs: Path) -> Callable[[int, torch.Tensor], torch.Tensor]:
    def damage(step: int, L: torch.Tensor) -> torch.Tensor:
        if step == 1:
            for name in names:
                path = photographs / name
                path.write_bytes(path.read_bytes()[:300]) if name != "0.png" else path.unlink()
        return L

    return damage


def test_photographs_that_go_bad_are_listed_once_and_training_goes_on(
    run: Run, quick: None, tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, going_bad(["0.png", "1.png"], photographs))
    data = ["data.max_bad=0.2", "train.validate_every=0", "train.steps=8"]
    run(tmp_path / "run", *data)
    lines = [json.loads(line) for line in (tmp_path / "run" / "replaced.jsonl").read_text().splitlines()]
    assert sorted(line["name"] for line in lines) == ["0.png", "1.png"]
    assert {line["name"]: "cannot be read" in line["reason"] for line in lines}["0.png"]
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["replaced"] == 0 and metrics[-1]["replaced"] == 2
    assert list(losses(tmp_path / "run")) == list(range(1, 9))


def replaced(folder: Path) -> list[tuple[int, str, str]]:
    """(step, folder, name) of each line of replaced.jsonl."""
    lines = [json.loads(line) for line in (folder / "replaced.jsonl").read_text().splitlines()]
    return [(line["step"], Path(line["root"]).name, line["name"]) for line in lines]


def test_photographs_that_go_bad_outside_the_steps_are_listed_too(
    run: Run, tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One before the colours are counted, with the same name one of the validation set before the last scores."""
    run(tmp_path / "first", "train.steps=1", "train.validate_every=0")  # makes the indexes
    counts = Path(os.environ["XDG_CACHE_HOME"], "dist_colorize", "colours")
    for cached in counts.glob("*.npy"):
        cached.unlink()
    (photographs / "3.png").write_bytes(b"3")

    def damage(step: int, L: torch.Tensor) -> torch.Tensor:
        if step == 5:
            (tmp_path / "validation" / "1.png").write_bytes(b"1")
        return L

    at_step(monkeypatch, damage)
    run(tmp_path / "run", "data.max_bad=0.2")
    assert replaced(tmp_path / "run") == [(1, "photographs", "3.png"), (6, "validation", "1.png")]
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["protocol"]["photographs"] == 1
    assert not list(counts.glob("*.npy")), "counts without a photograph are not those of the data set"


@pytest.mark.bits
def test_a_run_goes_on_with_the_photographs_it_began_with(
    run: Run, tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files are gone, bad and new when it starts again, and another run has indexed all that anew meanwhile."""
    tolerant = "data.max_bad=0.3"
    run(tmp_path / "first", "train.steps=1", tolerant)  # makes the indexes
    for bad in (photographs / "4.png", photographs / "7.png", tmp_path / "validation" / "0.png"):
        bad.write_bytes(b"bad")  # in place: the indexes count as up to date
    run(tmp_path / "whole", tolerant)
    with monkeypatch.context() as patch:
        at_step(patch, stopping_after(3))
        with pytest.raises(Interrupted):
            run(tmp_path / "cut", tolerant)
    (photographs / "4.png").unlink()
    (tmp_path / "validation" / "0.png").unlink()
    Image.effect_noise((60, 50), 80).convert("RGB").save(photographs / "gray.png")
    (photographs / "new.png").write_bytes((photographs / "0.png").read_bytes())
    run(tmp_path / "another", "train.steps=1", tolerant)
    capsys.readouterr()
    run(tmp_path / "cut", tolerant)
    assert capsys.readouterr().out.count("has changed; the run goes on with the list of photographs that it began") == 2
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert_same_bits(last_state(tmp_path / "cut")["model"], last_state(tmp_path / "whole")["model"])
    assert last_state(tmp_path / "another")["fingerprint"] != last_state(tmp_path / "cut")["fingerprint"]
    scores = [json.loads((tmp_path / name / "evaluation.json").read_text())["scores"] for name in ("cut", "whole")]
    assert scores[0] == scores[1]
    assert {name for _, _, name in replaced(tmp_path / "cut")} == {"4.png", "7.png", "0.png"}


def test_a_run_whose_photographs_nobody_knows_any_more_is_refused(
    run: Run, quick: None, tmp_path: Path, photographs: Path
) -> None:
    run(tmp_path / "run", "train.steps=1")
    (photographs / "4.png").unlink()
    shutil.rmtree(os.environ["XDG_CACHE_HOME"])
    with pytest.raises(UserError, match=r"the photographs are not those of the checkpoint .*give those, or another"):
        run(tmp_path / "run")


def test_too_many_bad_photographs_stop_the_run(
    run: Run, quick: None, tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, going_bad(["0.png", "1.png", "2.png"], photographs))
    data = ["data.max_bad=0.2", "train.validate_every=0", "train.steps=100"]
    with pytest.raises(RunFailed, match=r"3 of 14 photographs .* data.max_bad=0.2; see replaced.jsonl"):
        run(tmp_path / "run", *data)
    assert last_state(tmp_path / "run")["step"] == max(losses(tmp_path / "run"))


@pytest.mark.bits
def test_data_that_are_gone_fail_the_run_and_it_goes_on_when_they_are_back(
    run: Run, quick: None, tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network disk that was away: not the user's mistake, so that a launcher may try again."""
    settings = ["train.validate_every=0", "train.schedule=constant", "data.max_bad=1"]
    run(tmp_path / "whole", *settings)

    def unplug(step: int, L: torch.Tensor) -> torch.Tensor:
        if step == 4:
            photographs.rename(tmp_path / "away")
        return L

    with monkeypatch.context() as patch:
        at_step(patch, unplug)
        with pytest.raises(RunFailed, match=r"32 photographs in a row .* are the data still there") as error:
            run(tmp_path / "run", *settings, "train.steps=100")
    assert error.value.code == FAILURE and last_state(tmp_path / "run")["step"] >= 3
    (tmp_path / "away").rename(photographs)
    for later in (tmp_path / "run" / "checkpoints").glob("step-*.pt"):
        if later.name != "step-00000003.pt":
            later.unlink()
    run(tmp_path / "run", *settings)
    assert_same_bits(last_state(tmp_path / "run")["model"], last_state(tmp_path / "whole")["model"])


# ---------------------------------------------------------------- torchrun starts workers again


def test_restarted_workers_find_the_folder_of_their_first_attempt(
    run: Run, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Crash(Exception):
        pass

    def crash(step: int, L: torch.Tensor) -> torch.Tensor:
        if step == 4:
            raise Crash
        return L

    def attempt(job: str, number: int) -> None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))
        run(None, f"run.root={tmp_path}")

    with monkeypatch.context() as patch:
        at_step(patch, crash)
        with pytest.raises(Crash):
            attempt("job", 0)
        with pytest.raises(Crash):
            attempt("another", 0)
    first, second = sorted((path for path in tmp_path.glob("quickstart-*")), key=lambda path: path.stat().st_mtime)
    attempt("job", 1)
    assert sorted(tmp_path.glob("quickstart-*")) == sorted([first, second])
    assert last_state(first)["step"] == 6 and last_state(second)["step"] == 4
    assert len(list(tmp_path.glob(".torchrun-*"))) == 1  # that of the other job
    attempt("job", 0)  # the same name later is another job
    assert len(list(tmp_path.glob("quickstart-*"))) == 3
