"""Training end to end, as a user starts it: what a run leaves, what resumes, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import DEVICES, rank_environment, run_torchrun
from PIL import Image

from dist_colorize.errors import UserError
from dist_colorize.train import main

TINY = [
    "model.width=0.0625",
    "data.crop=32",
    "train.steps=6",
    "train.global_batch=8",
    "train.warmup=2",
    "train.log_every=1",
    "train.precision=fp32",
    "train.validate_every=4",
    "checkpoint.every=3",
    "distributed.device=cpu",
    "distributed.threads=1",
]
Train = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def train(cache: dict[str, str]) -> Train:
    """`train(ranks, *arguments)` under torchrun; the tiny quickstart unless the arguments say otherwise."""

    def start(ranks: int, *arguments: str, config: Path | None = None) -> subprocess.CompletedProcess[str]:
        chosen = ["--config", str(config), *arguments] if config else [*TINY, *arguments]
        return run_torchrun(ranks, "-m", "dist_colorize.train", *chosen, env=cache, timeout=240)

    return start


@pytest.fixture(scope="module")
def finished(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    done = train(2, f"run.dir={folder}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"run: {folder}"
    return folder


def last_state(run: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(run / "checkpoints" / "latest", weights_only=True)
    return state


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def assert_same_bits(one: Any, other: Any, where: str = "state") -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same_bits(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same_bits(a, b, f"{where}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def cut_after(run: Path, step: int) -> None:
    """As if the run had been killed right after that checkpoint: `latest` and `best` may point nowhere."""
    for checkpoint in (run / "checkpoints").glob("step-*.pt"):
        if int(checkpoint.stem.removeprefix("step-")) > step:
            checkpoint.unlink()


def test_a_run_leaves_what_the_readme_says(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all({"step", "loss", "images_per_second", "data_wait"} <= line.keys() for line in lines)
    assert all(0 <= line["data_wait"] <= 1 and line["images_per_second"] > 0 for line in lines)
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == [
        "best",
        "latest",
        "step-00000003.pt",
        "step-00000004.pt",  # the best one when it was validated
        "step-00000006.pt",
    ]
    state = last_state(finished)
    assert {
        "model",
        "ema",
        "optimizer",
        "scaler",
        "schedule",
        "step",
        "position",
        "rng",
        "class_weights",
    } <= state.keys()
    assert (state["step"], state["position"], len(state["rng"])) == (6, 48, 2)
    assert state["class_weights"].shape == (313,)
    evaluation = json.loads((finished / "evaluation.json").read_text())
    assert list(evaluation["scores"]) == ["gray", "raw", "blended", "final"]
    assert all(score["psnr"] > 5 and score["mse"] > 0 for score in evaluation["scores"].values())
    assert evaluation["protocol"]["photographs"] == 8
    with Image.open(finished / "panels" / "final.png") as panel:
        assert panel.width >= 4 * 32 and panel.height >= 8 * 32
    assert list((finished / "tensorboard").glob("events.*"))
    assert json.loads((finished / "status.json").read_text())["state"] == "finished"
    assert yaml.safe_load((finished / "config.yaml").read_text())["model"]["width"] == 0.0625


@pytest.mark.bits
def test_resumed_equals_uninterrupted_to_the_bit(train: Train, finished: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(finished, cut, symlinks=True)
    cut_after(cut, 3)
    done = train(2, f"run.dir={cut}", config=cut / "config.yaml")
    assert done.returncode == 0, done.stderr
    assert "step 3" in done.stdout
    one, other = last_state(finished), last_state(cut)
    for state in (one, other):
        state.pop("run")
        state["config"].pop("run")
    assert_same_bits(one, other)
    assert losses(cut) == losses(finished)


@pytest.mark.slow
@pytest.mark.bits
def test_resumed_equals_uninterrupted_to_the_bit_at_four_ranks(train: Train, tmp_path: Path) -> None:
    """From three ranks on the order of summation matters, and DDP changes it after its first backward pass."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(4, f"run.dir={whole}").returncode == 0
    shutil.copytree(whole, cut, symlinks=True)
    cut_after(cut, 3)
    done = train(4, f"run.dir={cut}", config=cut / "config.yaml")
    assert done.returncode == 0, done.stderr
    assert_same_bits(last_state(cut)["model"], last_state(whole)["model"])
    assert losses(cut) == losses(whole)


def test_another_world_size_sees_the_same_samples(train: Train, finished: Path, tmp_path: Path) -> None:
    """Four steps with two ranks, then two with one, or with four: the losses follow within summation order."""
    for ranks in (1, 4):
        cut = tmp_path / str(ranks)
        shutil.copytree(finished, cut, symlinks=True)
        cut_after(cut, 3)
        done = train(ranks, f"run.dir={cut}", config=cut / "config.yaml")
        assert done.returncode == 0, done.stderr
        assert losses(cut) == pytest.approx(losses(finished), rel=1e-4)
        assert f"made by 2 ranks of 1 CPU threads, resumed by {ranks} of 1: the same samples" in done.stdout


@pytest.mark.bits
def test_a_run_resumed_in_another_precision_says_so(
    cache: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", cache["XDG_CACHE_HOME"])
    threads = torch.get_num_threads()
    short = [*TINY, f"run.dir={tmp_path / 'run'}", "train.validate_every=0", "evaluate.pictures=0", "train.ema=0.9"]
    for steps, precision in ((2, "fp32"), (3, "fp16"), (4, "fp16"), (5, "bf16")):
        main([*short, f"train.steps={steps}", f"train.precision={precision}"])
        said = capfd.readouterr().out
        assert ("made in fp32, resumed in fp16; the loss scale" in said) == (steps == 3)
        assert ("made in fp16, resumed in bf16 (see train.precision)" in said) == (steps == 5)
    assert len(losses(tmp_path / "run")) == 5
    torch.set_num_threads(threads)


def test_the_saved_config_repeats_the_run(train: Train, finished: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    done = train(2, f"run.dir={again}", config=finished / "config.yaml")
    assert done.returncode == 0, done.stderr
    assert_same_bits(last_state(again)["model"], last_state(finished)["model"])


@pytest.mark.slow
def test_eight_ranks(train: Train, tmp_path: Path) -> None:
    """The command of the mission, on one processor: `torchrun --nproc_per_node=8 -m dist_colorize.train`."""
    done = train(8, f"run.dir={tmp_path / 'eight'}", "train.steps=2", "evaluate.batch=1")
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "eight")) == 2
    assert json.loads((tmp_path / "eight" / "evaluation.json").read_text())["protocol"]["photographs"] == 8


def test_a_frozen_encoder_from_a_file(train: Train, tmp_path: Path) -> None:
    """The final method's own configuration, its weights from a local file; two steps, with EMA and accumulation."""
    import torchvision

    weights = tmp_path / "vgg16_bn.pth"
    torch.manual_seed(0)
    torch.save(torchvision.models.vgg16_bn(weights=None).features.state_dict(prefix="features."), weights)
    run = tmp_path / "run"
    config = Path(__file__).parent.parent / "configs" / "final.yaml"
    small = ["data.root=sample-photographs", "data.val_fraction=0.3", "data.crop=32", "train.steps=2", "train.warmup=1"]
    small += ["train.global_batch=4", "train.micro_batch=1", "distributed.device=cpu"]
    done = train(2, f"run.dir={run}", f"model.encoder={weights}", *small, config=config)
    assert done.returncode == 0, done.stderr
    state = last_state(run)
    frozen = [name for name in state["model"] if name.startswith("encoder.")]
    assert state["ema"].keys() == state["model"].keys() - set(frozen)
    assert len(state["optimizer"]["state"]) == len(state["model"]) - len(frozen)
    assert json.loads((run / "evaluation.json").read_text())["protocol"]["photographs"] < 8


@pytest.mark.parametrize("device", DEVICES)
def test_a_signal_saves_and_leaves_with_its_own_exit_code(device: str, cache: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "dist_colorize.train", *TINY, f"run.dir={run}", "train.steps=100000"]
    command += [f"distributed.device={device}"]
    process = subprocess.Popen(command, env=rank_environment(cache), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "Traceback" not in errors and f"run.dir={run}" in errors
    state = last_state(run)
    assert state["step"] == max(losses(run))
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"


@pytest.mark.parametrize(
    ("device", "precision"),
    [
        pytest.param("cpu", "bf16"),
        pytest.param("cpu", "fp16", marks=pytest.mark.slow),
        *(pytest.param("cuda", precision, marks=pytest.mark.gpu) for precision in ("bf16", "fp16")),
    ],
)
def test_a_run_that_is_killed_and_stopped_ends_like_a_whole_one(
    device: str, precision: str, cache: dict[str, str], tmp_path: Path
) -> None:
    """kill -9 in step 9, SIGTERM in step 14, 20 steps in all; on a GPU through DALI there and NCCL, with one rank."""
    worker = str(Path(__file__).parent / "workers" / "cut.py")
    settings = [*TINY, f"distributed.device={device}", f"train.precision={precision}", "train.ema=0.9"]
    settings += ["train.steps=20", "train.validate_every=0", "checkpoint.every=5"]

    def life(run: Path, number: signal.Signals, step: int, saved: int) -> subprocess.CompletedProcess[str]:
        checkpoint = run / "checkpoints" / f"step-{saved:08d}.pt"
        command = [sys.executable, worker, number.name, str(step), str(checkpoint), *settings, f"run.dir={run}"]
        return subprocess.run(command, env=rank_environment(cache), capture_output=True, text=True, timeout=240)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = life(whole, signal.SIGKILL, 10**6, 0)
    assert done.returncode == 0, done.stderr
    done = life(cut, signal.SIGKILL, 8, 5)
    assert done.returncode == -signal.SIGKILL, done.stderr
    done = life(cut, signal.SIGTERM, 13, 10)
    assert done.returncode == 75, done.stderr
    assert "step 5\n" in done.stdout and "Traceback" not in done.stderr
    assert json.loads((cut / "status.json").read_text())["state"] == "interrupted"
    assert last_state(cut)["step"] == 15  # the answer of the signal's step is there when the next one is done
    done = life(cut, signal.SIGKILL, 10**6, 0)
    assert done.returncode == 0, done.stderr
    assert "step 15\n" in done.stdout
    assert list(losses(cut)) == list(range(1, 21)) and (cut / "evaluation.json").exists()
    # On a GPU sums may be rounded otherwise each time.
    assert losses(cut) == (losses(whole) if device == "cpu" else pytest.approx(losses(whole), rel=0.05))
    state, other = last_state(cut), last_state(whole)
    assert any(not torch.equal(state["ema"][name], state["model"][name]) for name in state["model"])
    if device == "cpu":
        for part in ("model", "ema", "optimizer", "scaler"):
            assert_same_bits(state[part], other[part], part)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["data.root={folder}"], "{folder}: no photographs here"),
        (["data.root={folder}/missing"], "{folder}/missing"),
        (["train.step=3"], "train.steps"),
        (["train.steps=[1]"], "train.steps"),
        (["data.crop=100"], "multiple of 16"),
        (["data.val_fraction=1.5"], "data.val_fraction"),
        (["model.encoder={folder}/no.pth"], "{folder}/no.pth: no such file"),
        (["evaluate.preset=nonsense"], "nonsense"),
        (["run.dir={folder}/file/run"], "run.dir"),
        (["--config", "{folder}/tab.yaml"], "tab.yaml"),
        (["--config", "{folder}/missing.yaml"], "missing.yaml"),
    ],
)
def test_bad_input_is_named(
    arguments: list[str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").touch()
    (folder / "tab.yaml").write_text("train:\n\tsteps: 3\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    filled = [argument.format(folder=folder) for argument in arguments]
    with pytest.raises(UserError) as error:
        main([*TINY, f"run.dir={tmp_path / 'run'}", *filled])
    assert complaint.format(folder=folder) in str(error.value)


def test_bad_input_under_torchrun_is_one_line_and_no_traceback_of_ours(train: Train, tmp_path: Path) -> None:
    done = train(2, f"run.dir={tmp_path / 'run'}", "train.global_batch=7")
    assert done.returncode != 0 and "exitcode  : 2" in done.stderr
    assert done.stderr.count("error: train.global_batch=7 cannot be shared by 2 ranks") == 1
    assert "dist_colorize/train.py" not in done.stderr


def test_another_recipe_does_not_resume_a_run(train: Train, finished: Path, tmp_path: Path) -> None:
    for changed, complaint in (("train.lr=0.5", "train.lr=0.002"), ("model.width=0.125", "model.width=0.0625")):
        cut = tmp_path / changed
        shutil.copytree(finished, cut, symlinks=True)
        done = train(1, f"run.dir={cut}", changed)
        assert done.returncode != 0 and complaint in done.stderr
        assert last_state(cut)["step"] == 6


@pytest.mark.slow
def test_more_ranks_than_photographs(train: Train, tmp_path: Path) -> None:
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    Image.effect_mandelbrot((64, 48), (-2, -1.5, 1, 1.5), 50).convert("RGB").point(lambda v: v // 2).save(
        photographs / "gray.png"
    )
    Image.radial_gradient("L").convert("RGB").save(photographs / "also gray.png")
    colour = Image.merge("RGB", [Image.radial_gradient("L").rotate(90 * i) for i in range(3)])
    Image.merge("RGB", [Image.linear_gradient("L"), Image.radial_gradient("L"), colour.getchannel(0)]).save(
        photographs / "one colour photograph.jpg"
    )
    run = tmp_path / "run"
    done = train(4, f"run.dir={run}", f"data.root={photographs}", "data.val_root=null", "train.steps=2")
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "evaluation.json").read_text())["protocol"]["photographs"] == 1


def test_no_argument_means_the_quickstart() -> None:
    """What the README's first command runs; .ci/run runs it whole."""
    help_text = subprocess.run(
        [sys.executable, "-m", "dist_colorize.train", "--help"],
        env=rank_environment(dict(os.environ)),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "configs/quickstart.yaml" in help_text and "train.global_batch" in help_text
