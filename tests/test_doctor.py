"""The doctor never fails, and says of each thing that is missing why it matters and how to have it."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CHECKOUT, rank_environment
from emulator import compiler
from emulator.cupy_standin import emulated_gpu

from dist_colorize import doctor
from dist_colorize.data import preflight
from dist_colorize.errors import UserError
from dist_colorize.postprocess import selfcheck
from dist_colorize.postprocess.cuda import CudaBackend


def test_the_report_is_complete_and_leaves_with_0() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dist_colorize.doctor"],
        capture_output=True,
        text=True,
        env=rank_environment(),
        check=False,
    )
    assert done.returncode == 0
    assert done.stderr == ""
    lines = [line for line in done.stdout.splitlines() if line[2:4] in ("ok", "--", "!!")]
    assert [line[6:20].strip() for line in lines] == [name for checks in doctor.SECTIONS.values() for name in checks]
    assert not [line for line in lines if line[2:4] == "!!"]
    training = next(line for line in lines if "training" in line)
    assert ("on the CPU, gloo" in training) != torch.cuda.is_available()


def test_gpu_without_a_gpu_says_that_nothing_was_checked() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    command = [sys.executable, "-m", "dist_colorize.doctor", "--gpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=rank_environment(), check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: nothing was checked: no GPU can be used \(.*\): install .* driver .*\n", done.stderr)


CHECKS = 4 * 2 + 7
"""ab and confidence of decode for four kinds of features; blend, blur, scale chroma twice, repair, compose twice."""
TIMED = 7


@pytest.mark.parametrize("wrong", [False, True])
def test_gpu_reports_every_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: bool
) -> None:
    """On the emulated device, whose speeds are made up."""
    if compiler.compiler() is None:
        pytest.skip("the emulator needs g++ on x86-64 Linux")
    speeds = [selfcheck.Speed("blend", 2e-6, 4000, 0.5)]
    monkeypatch.setattr(selfcheck, "speeds", lambda backend: speeds)
    monkeypatch.setattr(doctor, "_decoding", lambda: doctor.Finding("decoding", "absent", "not looked at here"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    if wrong:
        real = CudaBackend.blend
        monkeypatch.setattr(CudaBackend, "blend", lambda self, *given: 1.01 * real(self, *given))
    with emulated_gpu(host_copies=True):
        assert doctor.main(["--gpu"]) == (1 if wrong else 0)
    out = capsys.readouterr().out
    assert out.count("  ok  ") == CHECKS - 2 * wrong
    assert out.count("  !!  ") == 2 * wrong
    assert "A card" in out
    assert "blend                  50.0 %   2 us, 2 GB/s" in out


def test_gpu_reports_a_decoder_that_crashes_and_keeps_the_exit_code_of_the_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if compiler.compiler() is None:
        pytest.skip("the emulator needs g++ on x86-64 Linux")
    monkeypatch.setattr(selfcheck, "agreements", lambda backend: [])
    monkeypatch.setattr(selfcheck, "speeds", lambda backend: [])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    monkeypatch.setattr(preflight, "own_failure", lambda gpu, load: "died of SIGSEGV")
    with emulated_gpu(host_copies=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert doctor.main(["--gpu"]) == 0
    assert re.search(
        r"  !!  decoding +DALI \S+ on the CPU: .* died of SIGSEGV\n +-> .*data\.device=cpu", capsys.readouterr().out
    )


@pytest.mark.gpu
def test_gpu_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--gpu"]) == 0
    assert capsys.readouterr().out.count(" GB/s") == TIMED


def test_gpu_with_full_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    if compiler.compiler() is None:
        pytest.skip("the emulator needs g++ on x86-64 Linux")

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    monkeypatch.setattr(CudaBackend, "decode", full)
    with emulated_gpu(host_copies=True), pytest.raises(UserError, match=r"not all was checked.*memory is full"):
        doctor.main(["--gpu"])


def test_packages_that_are_missing_or_broken_are_lines_of_the_report(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    (tmp_path / "cupy.py").write_text("raise ModuleNotFoundError('No module named cupy')")
    (tmp_path / "pyvips.py").write_text("raise OSError('libvips.so.42: cannot open shared object file')")
    command = [sys.executable, "-m", "dist_colorize.doctor"]
    env = rank_environment({"PYTHONPATH": f"{tmp_path}{os.pathsep}{CHECKOUT}"})
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    install = f"\n{'':20}-> install dist_colorize with its dependencies: pip install ."
    for name in ("processor", "GPU", "torch", "torchvision", "VGG16-BN", "training", "decoding", "postprocess"):
        assert f"  !!  {name:14}libcudart.so.13: cannot open shared object file{install}" in done.stdout, name
    assert f"  !!  CuPy          No module named cupy{install}" in done.stdout
    assert "  !!  pyvips        libvips.so.42: cannot open shared object file\n" in done.stdout
    assert "  ok  submitit" in done.stdout


@pytest.mark.parametrize(
    ("driver", "cuda", "state", "remedy"),
    [
        ("580.65.06", "13.0", "ok", ""),
        ("570.10", "13.0", "broken", "needs 580: update the driver, or install the CUDA 12 wheels"),
        ("570.10", "12.8", "ok", ""),
        ("470.1", "12.8", "broken", "needs 525: update the driver"),
        (None, "13.0", "absent", "install NVIDIA's driver"),
        ("570.10", None, "ok", ""),
    ],
)
def test_a_driver_too_old_for_the_wheels_is_told(
    monkeypatch: pytest.MonkeyPatch, driver: str | None, cuda: str | None, state: str, remedy: str
) -> None:
    monkeypatch.setattr(doctor, "_driver_version", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    finding = doctor.examine("driver", doctor._driver)
    assert finding.state == state
    assert remedy in finding.remedy


def test_the_driver_version_comes_from_nvidia_smi_where_proc_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has a driver of its own")
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\nprintf '580.65.06\\n580.65.06\\n'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert doctor._driver_version() == "580.65.06"
    command.write_text("#!/bin/sh\necho 'cannot talk to the driver'; exit 9\n")
    assert doctor._driver_version() is None


def test_several_gpus_are_counted_by_kind_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert doctor._gpus().facts == "8 x NVIDIA H100 (80.0 GiB, sm_90)"
    assert doctor._training().facts == "on 8 GPUs with torchrun --nproc_per_node=8, nccl between ranks, bf16"
    monkeypatch.setattr(preflight, "own_failure", lambda gpu, load: None)
    assert "on the GPU (mixed)" in doctor._decoding().facts
    monkeypatch.setattr(preflight, "own_failure", lambda gpu, load: "died of SIGSEGV")
    assert "on the CPU: on the GPU a trial decode of JPEG crops died of SIGSEGV" in doctor._decoding().facts
    assert doctor._postprocess().facts == "on the CPU; with --gpu by CUDA kernels"
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", None)
    assert "--gpu would fail" in doctor._postprocess().facts


@pytest.mark.parametrize(
    ("driver", "visible", "cuda", "state", "text"),
    [
        (None, None, "13.0", "absent", "everything runs on the CPU"),
        ("580.1", "", "13.0", "broken", "CUDA_VISIBLE_DEVICES hides them"),
        ("580.1", None, "13.0", "broken", "nvidia-smi"),
        ("580.1", None, None, "absent", "install torch from its CUDA index"),
    ],
)
def test_why_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, driver: str | None, visible: str | None, cuda: str | None, state: str, text: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(doctor, "_driver_version", lambda: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    finding = doctor._gpus()
    assert finding.state == state
    assert text in finding.remedy


def test_pretrained_weights_are_looked_for_where_torch_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    finding = doctor._weights()
    assert finding.state == "absent"
    assert f"copy it to {tmp_path}/hub/checkpoints, or set model.encoder=scratch" in finding.remedy
    name = finding.remedy.split()[2].rpartition("/")[2].rstrip(";")
    file = tmp_path / "hub" / "checkpoints" / name
    file.parent.mkdir(parents=True)
    file.touch()
    assert doctor._weights().facts == f"pretrained weights in {file}"


@pytest.mark.parametrize(("script", "state"), [("echo slurm 23.11.4", "ok"), ("echo no config >&2; exit 1", "absent")])
def test_slurm_is_found_by_its_srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, state: str) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._slurm().state == "absent"
    (tmp_path / "srun").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    finding = doctor._slurm()
    assert finding.state == state
    assert finding.facts == ("slurm 23.11.4, inside job 42" if state == "ok" else "no config")


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert doctor._cache().state == "ok"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    finding = doctor._cache()
    assert finding.state == "broken"
    assert "set XDG_CACHE_HOME" in finding.remedy


def test_dockers_little_shared_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(64 * 2**20, 0, 0))
    finding = doctor._shared_memory()
    assert (finding.state, finding.facts) == ("absent", "/dev/shm 64 MiB")
    assert "--shm-size" in finding.remedy


def test_every_package_of_the_list_can_be_imported_here() -> None:
    for name, check in doctor.SECTIONS["Software"].items():
        if name not in ("SLURM", "VGG16-BN"):
            assert doctor.examine(name, check).state == "ok", name
    assert importlib.import_module("dist_colorize").__version__
