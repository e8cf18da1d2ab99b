"""What a run writes: truthful after a resume, and no reason for a training to end."""

from __future__ import annotations

import errno
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_colorize.distributed import DistributedConfig, World, session
from dist_colorize.errors import Interrupted, UserError
from dist_colorize.run_folder import RunConfig
from dist_colorize.tracking import open_run


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.delenv("RANK", raising=False)
    threads = torch.get_num_threads()
    with session(DistributedConfig(device="cpu")) as world:
        yield world
    torch.set_num_threads(threads)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def points(path: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(path / "tensorboard"))
    board.Reload()
    return [(point.step, point.value) for point in board.Scalars(tag)]


def status(path: Path) -> dict[str, Any]:
    return json.loads((path / "status.json").read_text())


def test_an_open_run_has_its_folder_and_a_status(tmp_path: Path, world: World) -> None:
    run = open_run(RunConfig(root=str(tmp_path)), world, "a: 1\n")
    names = {path.name for path in run.path.iterdir()}
    assert names == {"checkpoints", "tensorboard", "panels", "config.yaml", "status.json"}
    assert (run.checkpoints, run.panels) == (run.path / "checkpoints", run.path / "panels")


def test_a_folder_that_cannot_be_made_is_an_error_of_the_user(tmp_path: Path, world: World) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot make the run folder .*file/run: Not a directory; set run.dir"):
        open_run(RunConfig(dir=str(tmp_path / "file" / "run")), world, "")


@pytest.mark.world_size(2)
def test_all_ranks_get_one_folder_and_one_rank_writes(tmp_path: Path, torchrun: Any) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from dist_colorize.distributed import DistributedConfig, session\n"
        "from dist_colorize.run_folder import RunConfig\n"
        "from dist_colorize.tracking import open_run\n"
        "with session(DistributedConfig(device='cpu')) as world:\n"
        "    with open_run(RunConfig(root=sys.argv[1]), world, 'a: 1') as run:\n"
        "        run.resume(0)\n"
        "        run.log(1, rank=world.rank)\n"
        "    paths = world.gather_objects(str(run.path))\n"
        "    assert len(set(paths)) == 1, paths\n"
    )
    done = torchrun(2, program, tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "runs").iterdir()
    assert done.stdout == f"run: {path}\n"
    assert lines(path) == [{"step": 1, "rank": 0.0}]


def test_logs_after_a_resume_are_those_of_one_run(tmp_path: Path, world: World) -> None:
    config = RunConfig(dir=str(tmp_path))
    with open_run(config, world, "") as run:
        run.resume(0)
        for step in range(1, 6):
            run.log(step, loss=torch.tensor(step / 2), rate=step)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # a kill in the middle of a line
    with open_run(config, world, "") as run:
        run.resume(3)
        for step in (4, 5, 6):
            run.log(step, loss=step * 10, rate=step)
    expected = [(1, 0.5), (2, 1.0), (3, 1.5), (4, 40.0), (5, 50.0), (6, 60.0)]
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == expected
    assert points(tmp_path, "loss") == expected
    with open_run(config, world, "") as run:
        run.resume(0)
        run.log(1, loss=7)
    assert lines(tmp_path) == [{"step": 1, "loss": 7.0}]
    assert points(tmp_path, "loss") == [(1, 7.0)]


def test_each_line_is_there_as_soon_as_it_is_logged_and_is_strict_json(tmp_path: Path, world: World) -> None:
    run = open_run(RunConfig(dir=str(tmp_path)), world, "")
    run.log(1, loss=float("nan"), rate=float("inf"), n=3)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None, "rate": None, "n": 3.0}
    with pytest.raises(RuntimeError, match="resume comes before"):
        run.resume(1)
    run.close()


def test_tensorboard_gets_settings_final_scores_and_a_layout(tmp_path: Path, world: World) -> None:
    """Read back as TensorBoard's own tabs HPARAMS and CUSTOM SCALARS do."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    recipe = "train:\n  lr: 0.002\n  steps: 4\n  clip: null\nmodel:\n  method: final\ndata:\n  flip: true\n"
    with open_run(RunConfig(dir=str(tmp_path)), world, recipe) as run:
        run.resume(0)
        run.log(2, loss=0.5, images_per_second=7)
        run.validation(2, {"raw": {"psnr": 20.0, "mse": 9.0}, "final": {"psnr": 21.0, "mse": 8.0}}, None)
        run.validation(4, {"raw": {"psnr": 22.0, "mse": 7.0}, "final": {"psnr": 23.5, "mse": 6.5}}, None)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()

    said = {tag: HParamsPluginData.FromString(c) for tag, c in board.PluginTagToContent("hparams").items()}
    start = said["_hparams_/session_start_info"].session_start_info.hparams
    assert {name: getattr(value, value.WhichOneof("kind")) for name, value in start.items()} == {
        "train.lr": 0.002,
        "train.steps": 4,
        "train.clip": "None",
        "model.method": "final",
        "data.flip": True,
    }
    metrics = {info.name.tag for info in said["_hparams_/experiment"].experiment.metric_infos}
    assert {tag: board.Scalars(tag)[-1].value for tag in metrics} == {
        "psnr/raw": 22.0,
        "mse/raw": 7.0,
        "psnr/final": 23.5,
        "mse/final": 6.5,
    }

    (event,) = board.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    shown = {title: {t for t in board.Tags()["scalars"] if re.search(tag, t)} for title, (tag,) in charts.items()}
    assert shown == {
        "loss": {"loss"},
        "images/s": {"images_per_second"},
        "PSNR of each stage": {"psnr/raw", "psnr/final"},
        "MSE of each stage": {"mse/raw", "mse/final"},
    }


def test_validation_reaches_tensorboard_to_the_bit(tmp_path: Path, world: World) -> None:
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    with open_run(RunConfig(dir=str(tmp_path)), world, "") as run:
        run.validation(3, {"raw": {"psnr": 21.5}, "final": {"psnr": 22.25}}, picture)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("psnr/final")] == [(3, 22.25)]
    assert [(e.step, e.value) for e in board.Scalars("psnr/raw")] == [(3, 21.5)]
    (event,) = board.Images("panel")
    assert event.step == 3
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), picture)


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (None, "finished"),
        (Interrupted("x"), "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
        (KeyError(), "failed"),
    ],
)
def test_the_status_tells_how_the_run_ended(
    tmp_path: Path, world: World, error: BaseException | None, state: str
) -> None:
    try:
        with open_run(RunConfig(dir=str(tmp_path)), world, "") as run:
            assert status(tmp_path)["state"] == "running"
            assert status(tmp_path)["pid"] == os.getpid()
            run.log(8, loss=1)
            if error:
                raise error
    except (Interrupted, KeyboardInterrupt, KeyError):
        pass
    assert status(tmp_path)["state"] == state
    assert status(tmp_path)["step"] == 8


def test_a_full_disk_costs_a_warning_and_no_training(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_run(RunConfig(dir=str(tmp_path)), world, "")

    def full(*args: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", full)
        patch.setattr(Path, "write_text", full)
        run.log(1, loss=1)
        run.log(2, loss=1)
    run.log(3, loss=1)
    run.close()
    assert lines(tmp_path) == [{"step": 3, "loss": 1.0}]
    assert capsys.readouterr().err == f"warning: cannot write to {tmp_path}: No space left on device; going on\n"
