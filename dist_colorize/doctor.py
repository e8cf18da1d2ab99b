"""What this machine has, and which paths dist_colorize will take on it.

    python -m dist_colorize.doctor
    python -m dist_colorize.doctor --gpu      # instead: checks the GPU's decoder and every CUDA kernel against the CPU

Each line is `ok`, `--` (absent, fine without; the line below says how to have it) or `!!` (needed, and missing or
broken; the line below says what to do).
The exit code is 0: a machine without a GPU is not ill. With --gpu it is 0 where every kernel agrees with the CPU, 1
where one does not, and 2 where nothing was checked because no GPU can be used. A decoder of JPEG crops that fails is a
line, and leaves the exit code alone: training then decodes on the CPU. Speeds are figures and no verdicts: a kernel's
share of the speed at which the device copies memory, for the bytes that it has to move at least.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dist_colorize import __version__
from dist_colorize.errors import FAILURE, OK, UserError, run_command

# Everything heavy is imported inside a check, so that a package that cannot be imported is a line and not the end.


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    state: Literal["ok", "absent", "broken"]
    facts: str
    remedy: str = ""

    def __str__(self) -> str:
        mark = {"ok": "ok", "absent": "--", "broken": "!!"}[self.state]
        below = f"\n{'':20}-> {self.remedy}" if self.remedy else ""
        return f"  {mark}  {self.name:14}{self.facts}{below}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gpu", action="store_true", help="check decoder and CUDA kernels on this machine's GPU, and measure"
    )
    if parser.parse_args(argv).gpu:
        return check_kernels()
    print(f"dist_colorize {__version__}")
    for title, checks in SECTIONS.items():
        print(f"\n{title}")
        for name, check in checks.items():
            print(examine(name, check), flush=True)
    return OK


def check_kernels() -> int:
    """Prints what selfcheck finds on the first visible GPU; the exit code. UserError where there is none."""
    import torch

    from dist_colorize.postprocess import selfcheck
    from dist_colorize.postprocess.cuda import CudaBackend
    from dist_colorize.postprocess.kernels import open_device

    try:
        backend = CudaBackend(open_device())
        print(examine("decoding", _decoding), flush=True)
        print(f"kernels on {torch.cuda.get_device_name(backend.device)}, against the CPU", flush=True)
        wrong = 0
        for found in selfcheck.agreements(backend):
            wrong += not found.ok
            print(f"  {'ok' if found.ok else '!!'}  {found}", flush=True)
        print("speed, as a share of the speed of this device's own copy", flush=True)
        for speed in selfcheck.speeds(backend):
            print(f"      {speed}", flush=True)
    except UserError as error:
        raise UserError(f"nothing was checked: {error}") from None
    except torch.OutOfMemoryError:
        raise UserError("not all was checked, the GPU's memory is full: end other programs on it") from None
    return FAILURE if wrong else OK


def examine(name: str, check: Callable[[], Finding]) -> Finding:
    """The finding of one check; whatever it raises is a finding too."""
    try:
        return check()
    except ImportError as error:
        return Finding(name, "broken", str(error), "install dist_colorize with its dependencies: pip install .")
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        return Finding(name, "broken", reason, "see the error; often a package that was built for another version")


# ---------------------------------------------------------------- machine


def _python() -> Finding:
    return Finding("Python", "ok", f"{platform.python_version()}, {platform.system()} {platform.machine()}")


def _processor() -> Finding:
    import torch

    from dist_colorize.hardware import cpu_has_bf16, usable_cores

    name = torch.cpu.get_capabilities().get("cpu_name", platform.processor())
    bf16 = "multiplies bf16" if cpu_has_bf16() else "no bf16 (AVX512-BF16 or AMX)"
    return Finding("processor", "ok", f"{name}, {usable_cores()} of {os.cpu_count()} cores usable, {bf16}")


def _memory() -> Finding:
    facts = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE))
    total, free = (int(facts[name]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    container = f", container limit {_gib(int(text))}" if text.isdigit() and int(text) < total else ""
    return Finding("memory", "ok", f"{_gib(total)}, {_gib(free)} available{container}")


def _shared_memory() -> Finding:
    total = shutil.disk_usage("/dev/shm").total
    # Docker's default of 64 MiB is too little for the buffers of NCCL between GPUs of one node.
    small = total < 2**28
    remedy = "NCCL needs more for several GPUs: docker run --shm-size=8g, or --ipc=host" if small else ""
    return Finding("shared memory", "absent" if small else "ok", f"/dev/shm {_gib(total)}", remedy)


def _network() -> Finding:
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        return Finding("network", "absent", f"{host} has no address", "for several nodes: name it in /etc/hosts or DNS")
    if address.startswith("127."):
        remedy = "for several nodes set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface between them"
        return Finding("network", "ok", f"{host} is {address}, this machine only", remedy)
    return Finding("network", "ok", f"{host} is {address}")


def _cache() -> Finding:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        remedy = "set XDG_CACHE_HOME to a writable folder; indexes of photographs are kept there"
        return Finding("cache", "broken", f"cannot write to {folder}: {error.strerror}", remedy)
    return Finding("cache", "ok", f"{folder}, {_gib(shutil.disk_usage(folder).free)} free")


# ---------------------------------------------------------------- GPU


def _driver() -> Finding:
    version = _driver_version()
    if version is None:
        return Finding("driver", "absent", "no NVIDIA driver", "for training on a GPU: install NVIDIA's driver")
    import torch

    # The oldest drivers that run a CUDA 12 or 13 of any minor version; NVIDIA's table of minor version compatibility.
    needed = {"12": 525, "13": 580}.get((torch.version.cuda or "").partition(".")[0])
    if needed and int(version.partition(".")[0]) < needed:
        remedy = f"torch is built for CUDA {torch.version.cuda}, which needs {needed}: update the driver"
        remedy += ", or install the CUDA 12 wheels (see the README)" if needed == 580 else ""
        return Finding("driver", "broken", f"NVIDIA {version} is too old", remedy)
    return Finding("driver", "ok", f"NVIDIA {version}")


def _driver_version() -> str | None:
    kernel = Path("/proc/driver/nvidia/version")
    if kernel.exists():
        found = re.search(r"\b(\d{3,}\.[\d.]+)\b", kernel.read_text())
        if found:
            return found[1]
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.split() else None


def _gpus() -> Finding:
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = [f"{d.name} ({_gib(d.total_memory)}, sm_{d.major}{d.minor})" for d in devices]
        kinds = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
        return Finding("GPU", "ok", ", ".join(kinds))
    if torch.version.cuda is None:
        return Finding("GPU", "absent", "torch is built without CUDA", "install torch from its CUDA index")
    if _driver_version() is None:
        return Finding("GPU", "absent", "none", "none is needed: everything runs on the CPU, more slowly")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    remedy = "CUDA_VISIBLE_DEVICES hides them; unset it" if hidden in ("", "-1") else "see the driver line, nvidia-smi"
    return Finding("GPU", "broken", "there is a driver, but torch sees no GPU", remedy)


def _collectives() -> Finding:
    import torch
    import torch.distributed as dist

    have = ["gloo"] if dist.is_gloo_available() else []
    if dist.is_nccl_available():
        have.append("nccl " + ".".join(str(part) for part in torch.cuda.nccl.version()))
    if not dist.is_gloo_available():
        return Finding("collectives", "broken", ", ".join(have) or "none", "install torch from its own index or PyPI")
    return Finding("collectives", "ok", ", ".join(have))


def _nvrtc() -> Finding:
    from cupy_backends.cuda.libs import nvrtc

    # Compiling needs no driver; it is what a broken installation of CuPy fails at.
    program = nvrtc.createProgram(
        'extern "C" __global__ void probe(float* x) { x[threadIdx.x] += 1; }', "probe.cu", [], []
    )
    try:
        nvrtc.compileProgram(program, ["-arch=sm_75"])
    finally:
        nvrtc.destroyProgram(program)
    return Finding("NVRTC", "ok", "{}.{}, compiles CUDA kernels".format(*nvrtc.getVersion()))


# ---------------------------------------------------------------- software


def _package(name: str, module: str, needed_for: str) -> Callable[[], Finding]:
    def check() -> Finding:
        version = getattr(importlib.import_module(module), "__version__", "of unknown version")
        return Finding(name, "ok", f"{version}, {needed_for}")

    return check


def _torch() -> Finding:
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    return Finding("torch", "ok", f"{torch.__version__}, built for {built}")


def _slurm() -> Finding:
    command = shutil.which("srun")
    if command is None:
        return Finding("SLURM", "absent", "no srun here", "needed only to submit to a cluster; torchrun needs none")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=30, check=False)
    job = f", inside job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    if done.returncode:
        reason = done.stderr.strip().partition("\n")[0] or "srun --version fails"
        return Finding("SLURM", "absent", reason, "srun is installed but finds no cluster; torchrun needs none")
    return Finding("SLURM", "ok", f"{done.stdout.strip()}{job}")


def _weights() -> Finding:
    import torch
    from torchvision.models import VGG16_BN_Weights

    url = VGG16_BN_Weights.IMAGENET1K_V1.url
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if file.is_file():
        return Finding("VGG16-BN", "ok", f"pretrained weights in {file}")
    remedy = f"training downloads {url}; without a connection copy it to {file.parent}, or set model.encoder=scratch"
    return Finding("VGG16-BN", "absent", "no pretrained weights in torch hub's cache", remedy)


# ---------------------------------------------------------------- paths


def _training() -> Finding:
    import torch

    from dist_colorize.distributed import DistributedConfig, own_device
    from dist_colorize.hardware import default_precision

    device = own_device(DistributedConfig(), local_rank=0)
    if device.type == "cpu":
        return Finding("training", "ok", f"on the CPU, gloo between ranks, {default_precision(device)}")
    count = torch.cuda.device_count()
    where = f"on {count} GPU{'s' if count > 1 else ''} with torchrun --nproc_per_node={count}"
    return Finding("training", "ok", f"{where}, nccl between ranks, {default_precision(device)}")


def _decoding() -> Finding:
    import torch
    from nvidia import dali

    from dist_colorize.data.config import DataConfig
    from dist_colorize.data.preflight import own_failure

    if not torch.cuda.is_available():
        return Finding("decoding", "ok", f"DALI {dali.__version__} on the CPU")
    found = own_failure(0, DataConfig.hw_decoder_load)
    if found is None:
        return Finding("decoding", "ok", f"DALI {dali.__version__} on the GPU (mixed), JPEG crops agree with the CPU")
    remedy = "training decodes on the CPU; data.device=cpu does so without a trial at the start"
    facts = f"DALI {dali.__version__} on the CPU: on the GPU a trial decode of JPEG crops {found}"
    return Finding("decoding", "broken", facts, remedy)


def _postprocess() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("postprocess", "ok", "on the CPU; --gpu needs a GPU")
    kernels = examine("NVRTC", _nvrtc)
    if kernels.state != "ok":
        return Finding("postprocess", "ok", f"on the CPU; --gpu would fail: {kernels.facts}", kernels.remedy)
    return Finding("postprocess", "ok", "on the CPU; with --gpu by CUDA kernels")


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


SECTIONS: dict[str, dict[str, Callable[[], Finding]]] = {
    "This machine": {
        "Python": _python,
        "processor": _processor,
        "memory": _memory,
        "shared memory": _shared_memory,
        "network": _network,
        "cache": _cache,
    },
    "GPU": {"driver": _driver, "GPU": _gpus, "collectives": _collectives, "NVRTC": _nvrtc},
    "Software": {
        "torch": _torch,
        "torchvision": _package("torchvision", "torchvision", "the encoder"),
        "DALI": _package("DALI", "nvidia.dali", "decoding and augmentation"),
        "CuPy": _package("CuPy", "cupy", "CUDA kernels of the post-processing"),
        "pyvips": _package("pyvips", "pyvips", "photographs in and out"),
        "scikit-image": _package("scikit-image", "skimage", "photographs of the quickstart, scores"),
        "TensorBoard": _package("TensorBoard", "tensorboard", "curves and pictures"),
        "submitit": _package("submitit", "submitit", "jobs on SLURM"),
        "SLURM": _slurm,
        "VGG16-BN": _weights,
    },
    "What will be used": {"training": _training, "decoding": _decoding, "postprocess": _postprocess},
}


if __name__ == "__main__":
    run_command(main)
