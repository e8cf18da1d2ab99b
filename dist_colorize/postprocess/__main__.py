"""Colorizes photographs with a trained network: files, folders with all that is in them, and patterns.

    python -m dist_colorize.postprocess                          # the newest run, on its own validation photographs
    python -m dist_colorize.postprocess --checkpoint runs/RUN scan.tif archive/ --output colorized
    python -m dist_colorize.postprocess 'archive/**/*.jpg' --output colorized --panel --confidence
    python -m dist_colorize.postprocess archive/ --output colorized --preset blend --size 384
    python -m dist_colorize.postprocess tune --checkpoint runs/RUN --data /photos/val     # makes a preset; see --help

A result has the name, the place within its folder, the size and the bit depth of its photograph. JPEG, PNG, TIFF and
WebP stay what they are; what cannot be written (GIF, BMP, AVIF, HEIC) becomes NAME.png. Colour photographs are read as
gray: their lightness stays, their colours are predicted anew.

What is finished is left alone when the same command runs again (--overwrite makes it anew): after an interruption, a
full disk or a power cut just repeat the command. A photograph that cannot be read is reported, and the rest goes on.

Several processes share the photographs; on a machine with 8 GPUs

    torchrun --nproc_per_node=8 --max-restarts=3 -m dist_colorize.postprocess archive/ --output colorized --gpu

torchrun ends all of them when one dies; with --max-restarts they start again and go on where they were.

exit codes: 0 all done, 1 some failed, 2 wrong usage, 75 interrupted (Ctrl-C finishes what has begun).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dist_colorize.errors import FAILURE, INTERRUPTED, OK, UserError, run_command
from dist_colorize.files import remove_stale
from dist_colorize.hardware import usable_cores
from dist_colorize.postprocess.colorizer import MULTIPLE, Colorizer, Prediction
from dist_colorize.postprocess.cpu import TorchBackend
from dist_colorize.postprocess.encode import DiskError, write_picture
from dist_colorize.postprocess.flow import Flow
from dist_colorize.postprocess.images import Photograph, read, working_set
from dist_colorize.postprocess.inputs import Job, place, plan
from dist_colorize.postprocess.memory import require_memory
from dist_colorize.postprocess.panel import panel
from dist_colorize.postprocess.ranks import Ranks
from dist_colorize.postprocess.stages import Backend, load_preset, preset_names
from dist_colorize.postprocess.streams import Streams
from dist_colorize.postprocess.trained import Trained, find_trained, newest_run, photographs_of
from dist_colorize.stopping import StopFlag

RUNS = Path("runs")
BYTES_AT_ONCE = 2**30
"""Photographs and results in memory at a time; a larger one goes through alone."""
FINISHED_FOLDER = "colorized"
"""Output folder inside the run when none is given."""

PAINTERS = 2
"""Photographs composed at a time: one is computed while the other one's pixels are copied."""

Pictures = dict[Path, np.ndarray]


class Predicted(NamedTuple):
    """A photograph whose colours are on their way."""

    photograph: Photograph
    prediction: Prediction
    ready: torch.cuda.Event | None
    """On a GPU: when the prediction will be there."""


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["tune"]:
        from dist_colorize.postprocess import tune

        tune.main(words[1:])
        return OK
    arguments = _parser().parse_args(words)
    with StopFlag() as stop:
        return colorize(arguments, stop)


def colorize(arguments: argparse.Namespace, stop: StopFlag) -> int:
    """The command; returns its exit code."""
    ranks = Ranks.from_environment()
    backend = _backend(arguments.gpu, ranks.local_rank)
    try:
        preset = load_preset(arguments.preset)
        trained = find_trained(arguments.checkpoint or newest_run(RUNS))
        output = arguments.output or _output_of(trained)
        all_jobs, complaints = _jobs(arguments.inputs, trained, output, stop)
        _require_writable(output)
    except UserError as mistake:
        mistake.shared = True  # every rank finds the same: one of them says so
        raise
    if ranks.local_size > 1:
        torch.set_num_threads(_own_cores())
    if ranks.is_leader:
        for folder in {output, *(job.target.parent for job in all_jobs)}:
            remove_stale(folder)
        for line in trained.skipped:
            print(f"skipped: {line}", file=sys.stderr)
        print(f"network: {trained.file}\noutput: {output}", flush=True)

    jobs, complaints = ranks.own(all_jobs), complaints if ranks.is_leader else []
    work = Worker(Colorizer(trained.network, preset, backend, arguments.size or trained.size), arguments)
    todo = jobs if arguments.overwrite else [job for job in jobs if not all(p.exists() for p in work.targets(job))]
    flow = Flow(
        work.measure,
        work.load,
        work.alike,
        work.compute,
        work.store,
        threads=arguments.jobs,
        bytes_at_once=BYTES_AT_ONCE,
        stop=lambda: stop.requested,
    )
    for line in complaints:
        print(f"failed: {line}", file=sys.stderr)
    failed, written, fatal = len(complaints), 0, None
    # Where nobody watches (a log), a line now and then is enough.
    silent, pace = not (todo and ranks.is_leader), 0.1 if sys.stderr.isatty() else 10
    with tqdm(total=len(todo), disable=silent, unit="photo", mininterval=pace) as bar:
        for job, error in flow.run(todo):
            bar.update()
            if isinstance(error, DiskError):
                fatal = error
                break
            if error is not None:
                failed += 1
                tqdm.write(f"failed: {job.name}: {error}", file=sys.stderr)
            else:
                written += 1
    left = len(todo) - written - (failed - len(complaints))
    counts = {"colorized": written, "already there": len(jobs) - len(todo), "failed": failed, "not done": left}
    words = ", ".join(f"{count} {what}" for what, count in counts.items() if count or what == "colorized")
    print(f"{ranks.name}{words}", flush=True)
    if fatal is not None:
        print(f"{ranks.name}error: {fatal}", file=sys.stderr)
        return FAILURE
    if left:
        return INTERRUPTED
    return ranks.leave(FAILURE if failed else OK, stop)


class Worker:
    """What is done with one photograph, cut into the parts that run side by side; see flow.Flow."""

    def __init__(self, colorizer: Colorizer, arguments: argparse.Namespace) -> None:
        self.colorizer, self.arguments = colorizer, arguments
        self._painters = threading.BoundedSemaphore(PAINTERS)
        self.streams = Streams(colorizer.backend.device)

    def targets(self, job: Job) -> list[Path]:
        """All files that the job writes, the result last."""
        extras = [
            (self.arguments.confidence, job.beside("confidence", ".png")),
            (self.arguments.raw, job.beside("raw", job.target.suffix)),
            (self.arguments.panel, job.beside("panel", ".png")),
        ]
        return [path for wanted, path in extras if wanted] + [job.target]

    def measure(self, job: Job) -> int:
        needed = working_set(job.source, results=2 if self.arguments.raw else 1)
        require_memory(needed)
        return needed

    def load(self, job: Job) -> tuple[Photograph, Tensor]:
        photograph = read(job.source)
        return photograph, self.colorizer.look(photograph)

    def alike(self, loaded: tuple[Photograph, Tensor]) -> tuple[tuple[int, ...], int]:
        """What goes through the network together has one working size."""
        _, look = loaded
        return tuple(look.shape), self.colorizer.together(look)

    def compute(self, loaded: list[tuple[Photograph, Tensor]]) -> list[Predicted]:
        """Queues the network and the stages, and does not wait for them."""
        with self.streams.own():
            predictions = self.colorizer.predict_together([look for _, look in loaded])
            ready = self.streams.mark()
        pairs = zip(loaded, predictions, strict=True)
        return [Predicted(photograph, prediction, ready) for (photograph, _), prediction in pairs]

    def store(self, job: Job, done: Predicted) -> None:
        photograph, prediction, ready = done
        with self._painters, self.streams.own(after=ready):
            pictures = self.paint(job, photograph, prediction)
        like = {job.target, job.beside("raw", job.target.suffix)}
        for path, pixels in pictures.items():
            write_picture(path, pixels, photograph if path in like else None)

    def paint(self, job: Job, photograph: Photograph, prediction: Prediction) -> Pictures:
        """All pictures that the job asks for, the result last."""
        pictures: Pictures = {}
        if self.arguments.confidence:
            grid = prediction.confidence.mul(255).round().byte().cpu().numpy()
            pictures[job.beside("confidence", ".png")] = Photograph(grid[..., None], None).shrunk(*photograph.size)
        if self.arguments.raw:
            raw = self.colorizer.paint(photograph, prediction.raw)
            pictures[job.beside("raw", job.target.suffix)] = raw
        if self.arguments.panel:
            pictures[job.beside("panel", ".png")] = panel(self.colorizer, photograph, prediction)
        # Last, so that a result that is there means that all is there.
        pictures[job.target] = self.colorizer.paint(photograph, prediction.final)
        return pictures


def _jobs(inputs: Sequence[str], trained: Trained, output: Path, stop: StopFlag) -> tuple[list[Job], list[str]]:
    if inputs:
        return plan(inputs, output)
    if trained.run is None:
        raise UserError(
            f"{trained.file} lies in no run folder with validation photographs: name photographs to colorize"
        )
    found = photographs_of(trained.run, stop)
    return place([(stored, stored.name) for stored in found], output), []


def _output_of(trained: Trained) -> Path:
    if trained.run is None:
        raise UserError(f"{trained.file} lies in no run folder: say with --output FOLDER where the results go")
    return trained.run / FINISHED_FOLDER


def _require_writable(output: Path) -> None:
    """Notices a read-only, forbidden or full output folder before the first photograph."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output) as probe:
            probe.write(b"\0")
    except OSError as error:
        raise UserError(f"cannot write into --output {output}: {error.strerror}") from None


def _own_cores() -> int:
    """Cores for this process, where several share a machine."""
    return max(1, usable_cores() // Ranks.from_environment().local_size)


def _backend(gpu: bool, local_rank: int) -> Backend:
    if not gpu:
        return TorchBackend()
    from dist_colorize.postprocess.cuda import CudaBackend
    from dist_colorize.postprocess.kernels import open_device

    return CudaBackend(open_device(local_rank))


def _multiple(text: str) -> int:
    if not text.isdigit() or int(text) < MULTIPLE or int(text) % MULTIPLE:
        raise argparse.ArgumentTypeError(f"must be a multiple of {MULTIPLE}, got {text}")
    return int(text)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    what, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m dist_colorize.postprocess",
        description=what,
        epilog=f"examples:\n\n{more}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("inputs", nargs="*", metavar="IN", help="file, folder or pattern (default: the run's validation photographs)")
    add(
        "--checkpoint",
        type=Path,
        metavar="RUN",
        help="run folder, checkpoints folder or .pt file (default: newest in ./runs)",
    )
    add("--output", type=Path, metavar="OUT", help=f"folder for the results (default: RUN/{FINISHED_FOLDER})")
    add(
        "--preset",
        default="final",
        metavar="NAME|FILE",
        help=f"post-processing: {', '.join(preset_names())}, or a .yaml file",
    )
    add(
        "--size",
        type=_multiple,
        metavar="PIXELS",
        help="short side of what the network sees (default: as it was trained)",
    )
    add("--overwrite", action="store_true", help="colorize again what is there already")
    add("--confidence", action="store_true", help="also write NAME.confidence.png: white where the network was sure")
    add("--raw", action="store_true", help="also write NAME.raw.*: the network's colours without post-processing")
    add(
        "--panel",
        action="store_true",
        help="also write NAME.panel.png: grayscale, each stage, ground truth side by side",
    )
    add("--gpu", action="store_true", help="run network and post-processing on the GPU")
    add(
        "--jobs",
        type=_count,
        default=min(8, _own_cores()),
        metavar="N",
        help="files read and written at a time (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    run_command(main)
