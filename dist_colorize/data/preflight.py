"""Does this machine's GPU decode JPEG crops, and rightly? Tried in a process of its own, as a broken decoder may crash.

    python -m dist_colorize.data.preflight 0          # GPU 0; leaves with 0 where it agrees with the CPU, else with 1

nvImageCodec 0.9.0, which DALI 2.3 and 2.4 require, ends the process with SIGSEGV when it decodes a part of a JPEG on an
H100 or B200, and fails on an A100 (NVIDIA/nvImageCodec#55). No `except` catches a SIGSEGV.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from io import BytesIO
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dist_colorize.data.config import DataConfig
from dist_colorize.distributed import POLL_SECONDS, World
from dist_colorize.errors import FAILURE, OK, Interrupted, UserError
from dist_colorize.stopping import StopFlag

SECONDS = 120.0
"""A trial that takes longer hangs. Most of it is the import of DALI, slow on a busy file system, and CUDA's start."""
TOLERANCE = 8
"""Levels of 255. A GPU rounds the inverse cosine transform and the colors otherwise than a CPU: by 4 levels or so."""
SIDE = 320
"""Of the JPEG that is decoded, in pixels: 20 x 20 blocks of 16 x 16."""
CROPS = [(37, 53, 150, 201), (0, 0, 17, 320), (111, 1, 209, 33), (160, 160, 160, 160)]
"""y, x, height, width: within blocks and across them, at the edges, along the blocks."""

_answers: dict[tuple[int, float], str | None] = {}
"""What trials in this process found, by GPU and hw_decoder_load."""


def decoding_device(config: DataConfig, world: World, stop: StopFlag) -> DataConfig:
    """`config`, with data.device=cpu in place of auto where a GPU cannot decode: the first of each node is tried.

    One node decides for all, so that no rank sees other pixels than the others; rank 0 prints a line about it. A
    collective; on CPUs it costs nothing. Raises UserError on all ranks where data.device=gpu was asked for and fails,
    Interrupted on all ranks when any was asked to stop.
    """
    if world.device.type != "cuda" or config.device == "cpu":
        return config
    gpu = world.device.index or 0

    def trial() -> str:
        found = own_failure(gpu, config.hw_decoder_load, lambda: stop.requested)
        return f"on GPU {gpu} of {socket.gethostname()} a trial decode of JPEG crops {found}" if found else ""

    with ThreadPoolExecutor(1, thread_name_prefix="preflight") as thread:
        mine = [thread.submit(trial)] if world.local_rank == 0 else []
        try:
            # in steps: a trial may take longer than a rank waits in one collective
            while world.agree(any(not done.done() for done in mine)):
                if world.agree(stop.requested):
                    raise Interrupted("while the GPU's decoder was tried")
                wait(mine, timeout=POLL_SECONDS)
        except BaseException:  # also where a rank has gone: nobody waits for the trial any more
            stop.request()
            raise
    failures = [text for texts in world.gather_objects([done.result() for done in mine]) for text in texts if text]
    if not failures:
        return config
    more = f" (and on {len(failures) - 1} more nodes)" if len(failures) > 1 else ""
    if config.device == "gpu":
        raise UserError(f"data.device=gpu: {failures[0]}{more}; set data.device=cpu", shared=True)
    if world.is_leader:
        print(f"all ranks decode on the CPU: {failures[0]}{more}", flush=True)
    return dataclasses.replace(config, device="cpu")


def own_failure(gpu: int, hw_decoder_load: float, stopped: Callable[[], bool] = lambda: False) -> str | None:
    """`failure` of this module's command on a GPU of this process; a GPU is tried once in a process."""
    if (gpu, hw_decoder_load) not in _answers:
        command = [sys.executable, "-m", __name__, str(gpu), "--hw-decoder-load", str(hw_decoder_load)]
        found = failure(command, SECONDS, stopped)
        if stopped():
            return found
        _answers[gpu, hw_decoder_load] = found
    return _answers[gpu, hw_decoder_load]


def failure(command: Sequence[str], seconds: float, stopped: Callable[[], bool] = lambda: False) -> str | None:
    """Runs a command; how it failed in a few words ("died of SIGSEGV"), None where it left with 0.

    It is killed after `seconds`, or soon after `stopped()` turns true.
    """
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C at the terminal is for the parent, which ends it
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    except OSError as error:
        return f"could not be started: {error.strerror}"
    with child:
        deadline = time.monotonic() + seconds
        while True:
            try:
                _, printed = child.communicate(timeout=POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                late = time.monotonic() > deadline
                if late or stopped():
                    child.kill()
                    return f"took more than {seconds:g} s" if late else "was stopped"
    if child.returncode < 0:
        return f"died of {_signal_name(-child.returncode)}"
    lines = printed.decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no reason given")
    return f"left with {child.returncode}: {last}" if child.returncode else None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gpu", nargs="?", type=int, default=0, help="its number (default: %(default)s)")
    parser.add_argument("--hw-decoder-load", type=float, default=DataConfig.hw_decoder_load, metavar="SHARE")
    arguments = parser.parse_args(argv)
    try:
        worst = greatest_difference(decode("gpu", arguments.gpu, arguments.hw_decoder_load), decode("cpu", None))
    except (RuntimeError, MemoryError) as error:
        from dist_colorize.data.failures import reason

        print(reason(error), file=sys.stderr)
        return FAILURE
    if worst > TOLERANCE:
        print(f"wrong pixels, off by {worst} of 255 levels (allowed: {TOLERANCE})", file=sys.stderr)
        return FAILURE
    print(f"off by {worst} of 255 levels at most (allowed: {TOLERANCE})")
    return OK


def decode(device: Literal["cpu", "gpu"], gpu: int | None, hw_decoder_load: float = 0.0) -> list[NDArray[np.uint8]]:
    """CROPS of one JPEG, uint8 [h, w, 3] each, by the pipeline that training builds."""
    from dist_colorize.data import pipeline

    encoded = [np.frombuffer(jpeg(), dtype=np.uint8)] * len(CROPS)
    anchor, shape = (np.array([crop[part] for crop in CROPS], dtype=np.int32) for part in (slice(2), slice(2, 4)))
    batch = encoded, anchor, shape, np.zeros(len(CROPS), dtype=np.int32)
    dali = pipeline.build(lambda: batch, len(CROPS), SIDE, 2, device, gpu, False, hw_decoder_load)
    images, _flips = dali.run()
    return [np.array(image) for image in images.as_cpu()]


def greatest_difference(crops: Sequence[NDArray[np.uint8]], others: Sequence[NDArray[np.uint8]]) -> int:
    """Levels between two lists of crops; 255 where they differ in shape."""
    if [crop.shape for crop in crops] != [other.shape for other in others]:
        return 255
    return max(int(np.abs(crop.astype(int) - other).max()) for crop, other in zip(crops, others, strict=True))


def jpeg() -> bytes:
    """A baseline JPEG of SIDE x SIDE pixels with chroma at half resolution, as most photographs have it.

    Its gray changes from pixel to pixel, so that a crop one pixel aside differs; its colors change slowly, as decoders
    interpolate chroma in their own ways.
    """
    y, x = np.mgrid[:SIDE, :SIDE]
    gray = np.random.default_rng(0).integers(60, 196, (SIDE, SIDE))
    tint = np.stack([x, SIDE - y, y], axis=-1) * (60 / SIDE) - 30
    file = BytesIO()
    pixels = (gray[..., None] + tint).round().astype(np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=95, subsampling="4:2:0")
    return file.getvalue()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


if __name__ == "__main__":
    # a crash is among what is expected: no core file of some gigabytes
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    signal.alarm(round(2 * SECONDS))  # who started it may be gone by the time it hangs
    sys.exit(main())
