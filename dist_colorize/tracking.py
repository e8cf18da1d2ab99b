"""What a run writes into its folder: metrics.jsonl, TensorBoard, status.json.

run = open_run(RunConfig(), world, recipe_yaml)     # rank 0 prints `run: runs/colorize-20260101-120000-1a2b3c`
with run:
    run.resume(step)                                # of the checkpoint, before the first log
    run.log(step, loss=loss, images_per_second=rate)
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

import numpy as np
import yaml

from dist_colorize.distributed import World
from dist_colorize.errors import Interrupted
from dist_colorize.files import write_atomically
from dist_colorize.run_folder import RunConfig, attempts_file, make_run_folder

State = Literal["running", "finished", "interrupted", "failed"]

LAYOUT = {
    "training": {"loss": ["Multiline", ["^loss$"]], "images/s": ["Multiline", ["^images_per_second$"]]},
    "validation": {"PSNR of each stage": ["Multiline", ["^psnr/"]], "MSE of each stage": ["Multiline", ["^mse/"]]},
}
"""TensorBoard's tab CUSTOM SCALARS: one chart for all stages."""

STATUS_SECONDS = 2.0
"""How often status.json is renewed, so that a run that was killed can be told from one that works."""


def open_run(config: RunConfig, world: World, recipe_yaml: str) -> Run:
    """Make the run folder on rank 0 and open it on all ranks. A collective.

    Raises UserError (on all ranks) when the folder cannot be made.
    """
    attempts = attempts_file(config)
    path = world.wait_for(lambda: make_run_folder(config, recipe_yaml, attempts))
    if world.recorder is not None:
        world.recorder.write_into(path / "flight_recorder")
    return Run(path, world.is_leader, attempts)


class Run:
    """The folder of one run, open on every rank; only rank 0 writes. As a context it closes with what happened."""

    def __init__(self, path: Path, writes: bool, attempts: Path | None = None) -> None:
        """`attempts`: a file to be removed when the run has ended well."""
        self._attempts = attempts
        self.path = path
        self.writes = writes
        self._metrics: IO[str] | None = None
        self._board: Any = None
        self._resumed_at: int | None = None
        self._step: int | None = None
        self._validated: set[int] = set()
        self._scores: Mapping[str, Mapping[str, float]] = {}
        self._status_at = -math.inf
        self._complained = False
        self._last_sign = _last_sign_of_life(path) if writes else 0.0
        self._still_since: float | None = None
        self._guard(self._status, "running")

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def panels(self) -> Path:
        """Folder of the pictures."""
        return self.path / "panels"

    def resume(self, step: int) -> None:
        """Forget what was logged after `step` steps, where the run goes on. Call it before the first log."""
        if self._metrics is not None:
            raise RuntimeError("resume comes before the first log")
        self._resumed_at = step
        self._still_since = self._last_sign if step and self.writes else None
        self._guard(_drop_after, self.path / "metrics.jsonl", step)
        self._guard(_drop_after, self.path / "validation.jsonl", step)
        self._guard(self._remember_validations)

    def alive(self, step: int) -> None:
        """A step is done: renew status.json now and then; after a resume, say how long the run stood still."""
        if self._still_since is not None:
            seconds = time.time() - self._still_since
            print(f"back at work: step {step} done {seconds:.1f} s after the last sign of life", flush=True)
            self._still_since = None
        self._step = step
        if self.writes and time.monotonic() - self._status_at >= STATUS_SECONDS:
            self._guard(self._status, "running")

    def log(self, step: int, **values: float) -> None:
        """Append one line to metrics.jsonl and one point per value to TensorBoard.

        Values are numbers or one-element tensors; what is not finite becomes null in metrics.jsonl.
        """
        if self.writes:
            self._guard(self._log, step, values)

    def validation(self, step: int, scores: Mapping[str, Mapping[str, float]], panel: np.ndarray | None) -> None:
        """Keep scores, stage -> metric -> value, in validation.jsonl; show them and a picture in TensorBoard.

        picture: uint8 [H, W, 3]. A run resumed where it had validated does it again: that step keeps its one point.
        """
        if self.writes:
            self._scores = scores
            self._guard(self._validation, step, scores, panel)

    def replaced(self, step: int, lines: list[dict[str, str]]) -> None:
        """Append photographs that could not be used, as {"root": .., "name": .., "reason": ..}, to replaced.jsonl."""
        if self.writes:
            text = "".join(json.dumps({"step": step} | line) + "\n" for line in lines)
            self._guard(_append, self.path / "replaced.jsonl", text)

    def replaced_before(self) -> set[tuple[str, str]]:
        """Root and name of each photograph in replaced.jsonl."""
        listed = set()
        with contextlib.suppress(FileNotFoundError):
            for line in (self.path / "replaced.jsonl").read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, TypeError, KeyError):  # a line that a kill cut off
                    entry = json.loads(line)
                    listed.add((str(entry["root"]), str(entry["name"])))
        return listed

    def close(self, state: State = "finished") -> None:
        """Write everything out and say in status.json how the run ended."""
        if state == "finished" and self._scores:
            self._guard(self._summary)
        self._guard(self._close)
        self._guard(self._status, state)
        if self._attempts and state == "finished":
            self._guard(self._attempts.unlink, True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close("finished")
        else:
            self.close("interrupted" if issubclass(kind, (Interrupted, KeyboardInterrupt)) else "failed")

    def _guard(self, write: Callable[..., Any], *args: Any) -> None:
        """Rank 0 writes; a full disk costs a line of the log and one warning, not the training."""
        if not self.writes:
            return
        try:
            write(*args)
        except OSError as error:
            if not self._complained:
                self._complained = True
                print(f"warning: cannot write to {self.path}: {error.strerror or error}; going on", file=sys.stderr)

    def _open(self) -> Any:
        """TensorBoard's writer, opened late: its import takes a second, and `resume` may come first."""
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            # Points from purge_step on that an earlier process wrote are hidden: they will be written again.
            self._board = SummaryWriter(
                str(self.path / "tensorboard"),
                purge_step=None if self._resumed_at is None else self._resumed_at + 1,
                flush_secs=10,
            )
            self._board.add_custom_scalars(LAYOUT)
        return self._board

    def _log(self, step: int, values: dict[str, float]) -> None:
        numbers = {name: float(value) for name, value in values.items()}
        self._step = step
        if self._metrics is None:
            self._metrics = open(self.path / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        line = {"step": step} | {name: n if math.isfinite(n) else None for name, n in numbers.items()}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        for name, number in numbers.items():
            self._open().add_scalar(name, number, step)
        if time.monotonic() - self._status_at >= STATUS_SECONDS:
            self._status("running")

    def _remember_validations(self) -> None:
        path = self.path / "validation.jsonl"
        if path.exists():
            self._validated = {json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()}

    def _validation(self, step: int, scores: Mapping[str, Mapping[str, float]], panel: np.ndarray | None) -> None:
        if step in self._validated:
            return
        self._validated.add(step)
        with open(self.path / "validation.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "scores": scores}) + "\n")
        for stage, row in scores.items():
            for metric, value in row.items():
                # metric first: TensorBoard groups by what stands before the slash
                self._open().add_scalar(f"{metric}/{stage}", value, step)
        if panel is not None:
            self._open().add_image("panel", panel, step, dataformats="HWC")

    def _summary(self) -> None:
        """Settings and final scores for TensorBoard's table of runs (its tab HPARAMS)."""
        from torch.utils.tensorboard.summary import hparams

        recipe = flatten(yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8")) or {})
        settings = {name: v if isinstance(v, (bool, int, float)) else str(v) for name, v in recipe.items()}
        scores = {f"{metric}/{stage}": value for stage, row in self._scores.items() for metric, value in row.items()}
        # not SummaryWriter.add_hparams: that makes a second folder, which shows up as another run
        for part in hparams(settings, scores):
            self._open()._get_file_writer().add_summary(part)

    def _close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
        if self._board is not None:
            self._board.close()

    def _status(self, state: State) -> None:
        self._status_at = time.monotonic()
        facts = {
            "state": state,
            "step": self._step,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        # A status is renewed so often that it need not survive a power loss, and must not wait for the disk.
        write_atomically(self.path / "status.json", json.dumps(facts, indent=1).encode() + b"\n", durable=False)


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key: {"train": {"lr": 1}} -> {"train.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _last_sign_of_life(path: Path) -> float:
    """When the run in this folder last wrote, in seconds since the epoch; 0 for a new one."""
    files = [path / "status.json", path / "metrics.jsonl", path / "checkpoints" / "latest"]
    return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)


def _drop_after(path: Path, step: int) -> None:
    """Keep the lines of metrics.jsonl up to `step`; a line that a kill cut off goes as well."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    write_atomically(path, "".join(kept).encode())


def _append(path: Path, text: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)
