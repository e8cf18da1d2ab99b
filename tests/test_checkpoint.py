"""A checkpoint is whole or absent: at each system call, at random kills, on full disks, with any byte damaged."""

from __future__ import annotations

import collections
import errno
import os
import pickle
import random
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import rank_environment

from dist_colorize import checkpoint
from dist_colorize.checkpoint import CheckpointConfig, SaveError, Writer, load, load_module, newest, save
from dist_colorize.errors import UserError


def state_at(step: int, size: int = 50) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model": collections.OrderedDict(weight=torch.randn(size, 3, generator=generator), count=torch.tensor(step)),
        "optimizer": {
            "state": {0: {"exp_avg": torch.randn(size, generator=generator)}},
            "param_groups": [{"lr": 1e-3}],
        },
        "rng": [torch.arange(16, dtype=torch.uint8), (step, "text", None, b"bytes", True)],
        "position": 2**60 + step,
    }


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert type(found) is type(expected)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected
        assert type(found) is type(expected)


def is_state(found: dict[str, Any], step: int, size: int = 50) -> None:
    assert_same(found, {**state_at(step, size), "format": 1, "step": step})


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ---------------------------------------------------------------- the plain story


def test_what_is_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 7, state_at(7))
    assert path == tmp_path / "checkpoints" / "step-00000007.pt"
    is_state(load(path), 7)
    assert (path.parent / "latest").readlink() == Path(path.name)
    assert "model" in torch.load(path.parent / "latest", weights_only=True)  # as outside scripts read it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
def test_every_dtype_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = (torch.randn(5, 4) * 3).to(dtype)
    assert_same(load(save(tmp_path, 1, {"x": tensor}))["x"], tensor)


def test_a_view_does_not_drag_its_storage_along(tmp_path: Path) -> None:
    big = torch.randn(1_000_000)
    path = save(tmp_path, 1, {"x": big[5:8], "y": big[:6].view(2, 3).T})
    assert path.stat().st_size < 10_000
    assert_same(load(path)["x"], big[5:8])
    assert_same(load(path)["y"], big[:6].view(2, 3).T)


def test_numpy_scalars_become_plain_and_anything_else_is_refused_when_saving(tmp_path: Path) -> None:
    assert_same(load(save(tmp_path, 1, {"lr": np.float64(0.1)}))["lr"], 0.1)
    with pytest.raises(TypeError, match=r"state\['rng'\]\[0\] is a ndarray"):
        save(tmp_path, 2, {"rng": [np.zeros(3)]})
    assert "step-00000002.pt" not in names(tmp_path)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step, state_at(step), keep=2)
    assert names(tmp_path) == ["latest", "step-00000030.pt", "step-00000040.pt"]
    (tmp_path / "step-best.pt").touch()  # not ours
    save(tmp_path, 50, state_at(50), keep=1)
    assert names(tmp_path) == ["latest", "step-00000050.pt", "step-best.pt"]


def test_the_file_is_readable_for_others_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert save(tmp_path, 1, state_at(1)).stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_a_folder_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    assert newest(tmp_path / "absent") is None
    (tmp_path / ".step-00000001.pt.tmp").write_bytes(b"half")
    (tmp_path / "latest").symlink_to("step-00000001.pt")
    assert newest(tmp_path) is None


def test_impossible_settings() -> None:
    with pytest.raises(ValueError, match="every must be at least 1"):
        CheckpointConfig(every=0)
    with pytest.raises(ValueError, match="keep must be at least 1"):
        CheckpointConfig(keep=0)


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("damage", ["half", "empty", "flipped"])
def test_the_newest_whole_one_is_taken_and_the_others_are_named(tmp_path: Path, damage: str) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, state_at(step))
    path = tmp_path / "step-00000003.pt"
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[data.index(state_at(3)["model"]["weight"].numpy().tobytes()) + 17] ^= 4
    path.write_bytes({"half": data[: len(data) // 2], "empty": b"", "flipped": data}[damage])
    found = newest(tmp_path)
    assert found is not None
    is_state(found[0], 2)
    assert found[1] == tmp_path / "step-00000002.pt"
    assert len(found[2]) == 1
    assert "step-00000003.pt is not a whole checkpoint" in found[2][0]

    # Going on from step 2, a damaged later one must not push whole ones out.
    save(tmp_path, 2, state_at(2), keep=1)
    again = newest(tmp_path)
    assert again is not None
    is_state(again[0], 2)


def test_latest_that_points_nowhere_and_stale_temporaries_do_no_harm(tmp_path: Path) -> None:
    save(tmp_path, 1, state_at(1))
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("step-00000099.pt")
    (tmp_path / ".step-00000002.pt.tmp").write_bytes(b"half")
    (tmp_path / ".latest.tmp").symlink_to("nowhere")
    found = newest(tmp_path)
    assert found is not None
    assert (found[1].name, found[2]) == ("step-00000001.pt", [])
    save(tmp_path, 2, state_at(2))
    assert names(tmp_path) == ["latest", "step-00000001.pt", "step-00000002.pt"]
    assert (tmp_path / "latest").readlink() == Path("step-00000002.pt")


def test_when_none_is_whole_the_user_decides(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, state_at(step)).write_bytes(b"gone")
    with pytest.raises(UserError, match=r"(?s)no checkpoint in .* give another run.dir.*step-00000002.*step-00000001"):
        newest(tmp_path)


def test_any_flipped_byte_is_noticed(tmp_path: Path) -> None:
    data = save(tmp_path, 3, state_at(3, size=2)).read_bytes()
    path = tmp_path / "step-00000004.pt"
    generator = random.Random(1)
    for offset in range(len(data)):
        damaged = bytearray(data)
        damaged[offset] ^= generator.randrange(1, 256)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="not a whole checkpoint"):
            load(path)


def test_any_truncation_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path, 3, state_at(3, size=2))
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match="not a whole checkpoint"):
            load(path)


# ---------------------------------------------------------------- what is not ours


class Malicious:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    attack = {"format": 1, "step": 1, "model": Malicious(trace)}
    path = tmp_path / "step-00000001.pt"
    checkpoint._write(path, attack)  # an attacker knows how to make a digest
    with pytest.raises(UserError, match="refused: it does not hold plain tensors and values"):
        load(path)
    with pytest.raises(UserError, match="no checkpoint in"):
        newest(tmp_path)
    for plain in (pickle.dumps(attack), b"not a pickle"):
        path.write_bytes(plain)
        with pytest.raises(UserError, match="its end is missing"):
            load(path)
    torch.save(attack, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="its end is missing"):
        load(path)
    assert not trace.exists()
    path.unlink()
    checkpoint._write(path, attack)
    torch.load(path, weights_only=False)
    assert trace.exists()  # the attack was a real one


def test_other_peoples_files_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"conv.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not a whole checkpoint of dist_colorize: it has no digest, others wrote it"):
        load(path)
    path.unlink()
    checkpoint._write(path, {"format": 2})
    with pytest.raises(UserError, match="has format 2, this dist_colorize reads 1"):
        load(path)
    with pytest.raises(UserError, match=r"cannot read the checkpoint .*absent.pt: No such file"):
        load(tmp_path / "absent.pt")
    with pytest.raises(UserError, match="Is a directory"):
        load(tmp_path)


def test_another_architecture_is_named_with_the_remedy() -> None:
    small, large = torch.nn.Linear(2, 3), torch.nn.Linear(4, 3)
    with pytest.raises(
        UserError, match=r"run/x.pt holds another network .*weight is \[3, 2\] instead of \[3, 4\]; use"
    ):
        load_module(large, small.state_dict(), "run/x.pt")
    with pytest.raises(UserError, match=r"weight is missing, bias is missing, 0.weight is unknown here, and 1 more"):
        load_module(small, torch.nn.Sequential(torch.nn.Linear(2, 3)).state_dict(), "x")
    other = torch.nn.Linear(2, 3)
    load_module(other, small.state_dict(), "x")
    assert torch.equal(other.weight, small.weight)


# ---------------------------------------------------------------- disks


def test_a_full_disk_at_any_byte_leaves_the_older_one_and_no_litter(tmp_path: Path) -> None:
    size = save(tmp_path, 1, state_at(1, 2000)).stat().st_size
    before = names(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 1, 100, 4096, size // 3, size // 2, size - 200, size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(SaveError, match=r"cannot save .*step-00000002.pt: File too large .*older .* untouched"):
                save(tmp_path, 2, state_at(2, 2000), keep=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert names(tmp_path) == before
        is_state(load(tmp_path / "latest"), 1, 2000)
    save(tmp_path, 2, state_at(2, 2000))
    is_state(load(tmp_path / "latest"), 2, 2000)


@pytest.mark.parametrize("call", ["fsync", "open"])
@pytest.mark.parametrize("code", [errno.EROFS, errno.EIO, errno.ENOSPC])
def test_a_disk_that_refuses_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    save(tmp_path, 1, state_at(1))
    before = names(tmp_path)

    def refuse(*args: Any, **options: Any) -> Any:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        if call == "open":
            patch.setattr("builtins.open", refuse)
        else:
            patch.setattr(os, "fsync", refuse)
        with pytest.raises(SaveError, match=os.strerror(code)):
            save(tmp_path, 2, state_at(2))
    assert names(tmp_path) == before
    save(tmp_path, 2, state_at(2))


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match="Not a directory"):
        save(tmp_path / "file" / "checkpoints", 1, state_at(1))


def test_a_file_system_without_links_still_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: str) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    is_state(load(save(tmp_path, 1, state_at(1))), 1)


def test_a_disk_that_lies_is_found_before_the_name_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = checkpoint._write

    def lie(path: Path, state: dict[str, Any]) -> None:
        write(path, state)
        data = bytearray(path.read_bytes())
        data[data.index(b"archive/data/0") + 300] ^= 1
        path.write_bytes(data)

    save(tmp_path, 1, state_at(1))
    before = names(tmp_path)
    monkeypatch.setattr(checkpoint, "_write", lie)
    with pytest.raises(SaveError, match="did not read back"):
        save(tmp_path, 2, state_at(2))
    assert names(tmp_path) == before


# ---------------------------------------------------------------- kills

# A process forks writers that are cut off; after each cut the newest checkpoint must be whole, and none may be lost
# that `save` had returned for. Writers are forked because to import torch takes longer than a thousand saves.
KILLS = """
import os, pathlib, random, signal, sys, time
sys.path.insert(0, sys.argv[2])
from test_checkpoint import checkpoint, is_state, names, state_at
folder, mode, seed = pathlib.Path(sys.argv[1]), sys.argv[3], int(sys.argv[4])
calls = [(os, "fsync"), (os, "open"), (os, "close"), (pathlib.Path, "replace"), (pathlib.Path, "symlink_to"),
         (pathlib.Path, "unlink"), (pathlib.Path, "mkdir"), (pathlib.Path, "glob"), (checkpoint, "_check")]

def die_at(number):
    left = [number]
    def cut(function):
        def called(*args, **options):
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
            result = function(*args, **options)
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
            return result
        return called
    for owner, name in calls:
        setattr(owner, name, cut(getattr(owner, name)))

def writer(first, report, cut):
    if cut:
        die_at(cut)
    for step in range(first, first + 1000):
        checkpoint.save(folder, step, state_at(step, 3000), keep=2)
        os.write(report, b"%d\\n" % step)
        if cut and step == first + 1:
            os._exit(0)

random.seed(seed)
last = cut = 0
for _ in range(1000):
    cut += 1
    read, report = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            writer(last + 1, report, cut if mode == "calls" else 0)
        finally:
            os._exit(1)
    os.close(report)
    with os.fdopen(read, "rb") as pipe:
        promised = [last]
        if mode == "times":
            # counted in saves, so that a slow machine makes as many
            promised += [int(pipe.readline()) for _ in range(random.randrange(3))]
            time.sleep(random.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)
        promised = max(promised + [int(line) for line in pipe])
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found = checkpoint.newest(folder)
    if promised:
        state, path, skipped = found
        assert not skipped, skipped
        assert state["step"] in (promised, promised + 1), (state["step"], promised)
        is_state(state, state["step"], 3000)
        last = state["step"]
    if mode == "calls" and status == 0 or mode == "times" and cut == 60:
        checkpoint.save(folder, last + 1, state_at(last + 1), keep=2)
        assert len(names(folder)) == 3, names(folder)  # two checkpoints and latest: no litter after so many cuts
        print("cuts", cut, "steps", last)
        break
    assert status == (9 if mode == "calls" else -9), status
"""


@pytest.mark.parametrize("mode", ["calls", "times"])
def test_a_kill_at_any_moment_loses_nothing(tmp_path: Path, mode: str) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(folder), str(Path(__file__).parent), mode, "5"],
        capture_output=True,
        text=True,
        env=rank_environment(),
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    _, cuts, _, steps = done.stdout.split()
    assert int(cuts) >= 40
    assert int(steps) >= 10


# ---------------------------------------------------------------- in the background


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before the event is set."""
    ready = threading.Event()
    genuine = checkpoint._write

    def write(path: Path, state: dict[str, Any]) -> None:
        assert ready.wait(30)
        genuine(path, state)

    monkeypatch.setattr(checkpoint, "_write", write)
    return ready


def test_save_returns_before_the_disk_does_and_what_changes_then_is_not_saved(
    tmp_path: Path, slow_disk: threading.Event
) -> None:
    state = state_at(1)
    with Writer(tmp_path, keep=3) as writer:
        writer.save(1, state)
        state["model"]["weight"].zero_()
        state["optimizer"]["state"][0]["exp_avg"].add_(1)
        state["rng"].append("later")
        assert newest(tmp_path) is None
        slow_disk.set()
    is_state(load(tmp_path / "latest"), 1)


def test_there_is_never_more_than_one_save_under_way_and_waiting_counts_as_stall(
    tmp_path: Path, slow_disk: threading.Event
) -> None:
    with Writer(tmp_path, keep=2) as writer:
        writer.save(1, state_at(1))
        assert writer.read_stall() < 0.5
        threading.Timer(0.6, slow_disk.set).start()
        for step in (2, 3):
            writer.save(step, state_at(step))
        assert load(tmp_path / "step-00000002.pt")["step"] == 2
        assert writer.read_stall() > 0.5
        assert writer.read_stall() == 0
    assert names(tmp_path) == ["latest", "step-00000002.pt", "step-00000003.pt"]


def test_a_failed_save_is_told_kept_and_overcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, state: dict[str, Any]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Writer(tmp_path, keep=1) as writer:
        writer.save(1, state_at(1))
        assert writer.wait() is None
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_write", full)
            writer.save(2, state_at(2))
            assert "No space left" in str(writer.wait())
        assert "WARNING: cannot save" in capsys.readouterr().err
        assert names(tmp_path) == ["latest", "step-00000001.pt"]
        writer.save(3, state_at(3))
        assert writer.wait() is None
    assert names(tmp_path) == ["latest", "step-00000003.pt"]


def test_the_best_one_stays_until_another_is_better(tmp_path: Path) -> None:
    with Writer(tmp_path, keep=1) as writer:
        for step in range(1, 7):
            writer.save(step, state_at(step))
            if step in (2, 5):
                writer.mark_best(step)
            writer.wait()
            found = [int(name[5:13]) for name in names(tmp_path) if name.startswith("step")]
            # the former best goes with the save after the one that was found better
            assert found == {1: [1], 2: [2], 3: [2, 3], 4: [2, 4], 5: [2, 5], 6: [5, 6]}[step]
    assert (tmp_path / "best").readlink() == Path("step-00000005.pt")


def test_steps_decide_which_is_newest_not_clocks(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        os.utime(save(tmp_path, step, state_at(step), keep=2), (2e9 - 1e6 * step, 2e9 - 1e6 * step))
    assert names(tmp_path) == ["latest", "step-00000002.pt", "step-00000003.pt"]
    found = newest(tmp_path)
    assert found is not None
    assert found[0]["step"] == 3
