"""Trains for a while under torchrun while faults of all kinds are injected, and reports what they cost.

    python benchmarks/soak.py --minutes 60                  # the quickstart's network on copies of its photographs
    python benchmarks/soak.py --minutes 5 --folder /tmp/soak --seed 3

Every life of the run gets some faults that training has to survive as it goes (a photograph vanishes, turns to rubbish
or is cut off, a batch of NaN, a disk that takes no more bytes while a checkpoint is written, a stale temporary file)
and then one that ends it (signals to the launcher or to one rank; kill -9 of a rank, of the launcher, of everything;
the last one sometimes together with a damaged newest checkpoint). The supervisor starts the run again and notes from
which step it goes on. The report is printed and written to FOLDER/report.json; exit code 1 if the run was lost or more
steps were done again than checkpoints allow.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVERY = 10
"""Steps between checkpoints."""
SETTLED = 30.0
"""Seconds after a process's first step from which its memory and files are compared."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the training")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        raise SystemExit(f"error: {arguments.folder} is there already; give another --folder")
    soak = Soak(arguments.folder.resolve(), arguments.ranks, arguments.seed, arguments.overrides)
    report = soak.run(arguments.minutes * 60)
    text = json.dumps(report, indent=1)
    (arguments.folder / "report.json").write_text(text + "\n")
    print(text)
    return 1 if report["problems"] else 0


class Soak:
    """One run, its faults, and what was seen of them."""

    def __init__(self, folder: Path, ranks: int, seed: int, overrides: list[str]) -> None:
        self.folder, self.ranks, self.overrides = folder, ranks, overrides
        self.random = random.Random(seed)
        self.photographs, self.checkpoints = folder / "photographs", folder / "run" / "checkpoints"
        self.faults: collections.Counter[str] = collections.Counter()
        self.exits: collections.Counter[str] = collections.Counter()
        self.lost: dict[str, list[int]] = {}
        self.problems: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None
        self.spoilt: Path | None = None

    def run(self, seconds: float) -> dict[str, Any]:
        self.prepare()
        began = time.monotonic()
        ended_by, done = "start", 0
        while True:
            step = self.start(ended_by, done)
            if step is None or time.monotonic() - began > seconds:
                break
            for _ in range(self.random.randint(1, 4)):
                self.train_for(self.random.uniform(4, 15))
                self.inject(self.random.choice(self.survivable()))
            self.train_for(self.random.uniform(3, 30))
            ended_by = self.inject(self.random.choice(self.deadly()))
            self.wait_for_the_end()
            done = self.steps_done()
        self.train_for(seconds / 4)
        self.stop()
        return self.report(time.monotonic() - began)

    def prepare(self) -> None:
        from PIL import Image

        from dist_colorize.data.photos import sample_photographs

        self.photographs.mkdir(parents=True)
        for path in sorted(Path(sample_photographs()).iterdir()):
            image = Image.open(path).convert("RGB")
            image.thumbnail((512, 512))
            for turn in range(4):
                image.rotate(90 * turn, expand=True).save(self.photographs / f"{path.stem}-{turn}.jpg", quality=90)

    def start(self, ended_by: str, done: int) -> int | None:
        """Starts torchrun and waits for the first step; returns the step it went on from."""
        log = open(self.folder / "output.txt", "ab")  # noqa: SIM115 - the child's for its whole life
        seen = log.tell()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}"]
        command += ["--max-restarts=20", str(Path(__file__).resolve()), "--as-rank", str(self.folder)]
        command += [f"data.root={self.photographs}", "data.val_root=null", "data.val_fraction=0.2", "data.max_bad=1"]
        command += [f"run.dir={self.folder / 'run'}", "train.steps=1000000", f"checkpoint.every={EVERY}"]
        command += ["train.log_every=5", "train.validate_every=150", "distributed.timeout=120", *self.overrides]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        before = self.steps_done()
        self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        log.close()
        deadline = time.monotonic() + 400
        while self.steps_done() == before and time.monotonic() < deadline and self.process.poll() is None:
            time.sleep(0.1)
        with open(self.folder / "output.txt", "rb") as output:
            output.seek(seen)
            text = output.read().decode(errors="replace")
        if self.process.poll() is not None or self.steps_done() == before:
            self.problems.append(f"did not start again after {ended_by} (exit {self.process.poll()}): {text[-2000:]}")
            return None
        found = re.findall(r"resuming from .*, step (\d+)", text)
        step = int(found[-1]) if found else 0
        if ended_by != "start":
            lost = done - step
            self.lost.setdefault(ended_by, []).append(lost)
            # One checkpoint may still be in the writer's hands, and one may be damaged on purpose.
            allowed = 0 if ended_by.startswith("signal") else 3 * EVERY
            if not 0 <= lost <= allowed:
                self.problems.append(f"{lost} steps lost after {ended_by}: done {done}, went on from {step}")
        say(f"step {step}: went on, after {ended_by} at step {done}")
        return step

    def train_for(self, seconds: float) -> None:
        assert self.process is not None
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            time.sleep(0.2)

    def wait_for_the_end(self) -> None:
        """Until the launcher and all ranks are gone."""
        assert self.process is not None
        began = time.monotonic()
        while time.monotonic() - began < 180:
            if self.process.poll() is not None and not self.pids():
                self.exits[str(self.process.returncode)] += 1
                return
            time.sleep(0.2)
        self.problems.append(f"still running 180 s after a fault: {self.pids()}")
        self.stop()

    def stop(self) -> None:
        for pid in [*self.pids(), *([self.process.pid] if self.process and self.process.poll() is None else [])]:
            send(pid, signal.SIGKILL)
        if self.process:
            self.process.wait()

    # ------------------------------------------------------------ faults

    def inject(self, fault: Callable[[], None]) -> str:
        name = fault.__name__.replace("_", " ")
        assert self.process is not None
        if self.process.poll() is None:
            self.faults[name] += 1
            say(f"step {self.steps_done()}: {name}")
            with contextlib.suppress(ProcessLookupError, KeyError):  # the rank in question has just died of itself
                fault()
        return name

    def survivable(self) -> list[Callable[[], None]]:
        return [
            self.photograph_vanishes,
            self.photograph_is_cut_off,
            self.photograph_turns_to_rubbish,
            self.batch_of_nan,
            self.disk_full_while_saving,
            self.stale_temporary_file,
            self.latest_points_nowhere,
            self.rank_killed_and_healed_by_torchrun,
        ]

    def deadly(self) -> list[Callable[[], None]]:
        return [
            self.signal_to_launcher,
            self.signal_to_one_rank,
            self.kill_launcher,
            self.kill_everything,
            self.kill_everything_and_damage_the_newest_checkpoint,
        ]

    def photograph_vanishes(self) -> None:
        self.spoil(lambda path: path.unlink())

    def photograph_is_cut_off(self) -> None:
        self.spoil(lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]))

    def photograph_turns_to_rubbish(self) -> None:
        self.spoil(lambda path: path.write_bytes(self.random.randbytes(path.stat().st_size)))

    def spoil(self, damage: Callable[[Path], Any]) -> None:
        """Until the next one is spoilt, also while the run is dead and starts again."""
        self.mend()
        self.spoilt = self.random.choice(sorted(self.photographs.glob("*.jpg")))
        shutil.copy2(self.spoilt, self.folder / "original")
        damage(self.spoilt)

    def mend(self) -> None:
        if self.spoilt:
            (self.folder / "original").replace(self.spoilt)

    def batch_of_nan(self) -> None:
        (self.folder / "poison").touch()

    def disk_full_while_saving(self) -> None:
        pid = self.rank_pids()[0]
        limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (self.random.randrange(200_000), limits[1]))
        self.train_for(12)
        if alive(pid):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)

    def stale_temporary_file(self) -> None:
        (self.checkpoints / ".0123.tmp").write_bytes(b"half a checkpoint")

    def latest_points_nowhere(self) -> None:
        (self.checkpoints / "latest").unlink(missing_ok=True)
        (self.checkpoints / "latest").symlink_to("step-99999999.pt")

    def rank_killed_and_healed_by_torchrun(self) -> None:
        before = self.rank_pids()
        send(self.random.choice(list(before.values())), signal.SIGKILL)
        end = time.monotonic() + 200
        while time.monotonic() < end and self.process is not None and self.process.poll() is None:
            now = self.rank_pids()
            if len(now) == self.ranks and not set(now.values()) & set(before.values()):
                return
            time.sleep(0.2)
        self.problems.append("torchrun did not heal the run after a rank was killed")

    def signal_to_launcher(self) -> None:
        assert self.process is not None
        send(self.process.pid, self.random.choice([signal.SIGTERM, signal.SIGINT]))

    def signal_to_one_rank(self) -> None:
        # torchrun would start the ranks again: end it first in the way that a cluster does, with the rank in the lead
        send(self.random.choice(list(self.rank_pids().values())), signal.SIGUSR2)
        assert self.process is not None
        send(self.process.pid, signal.SIGTERM)

    def kill_launcher(self) -> None:
        assert self.process is not None
        send(self.process.pid, signal.SIGKILL)

    def kill_everything(self) -> None:
        assert self.process is not None
        for pid in [self.process.pid, *self.rank_pids().values()]:
            send(pid, signal.SIGKILL)

    def kill_everything_and_damage_the_newest_checkpoint(self) -> None:
        self.kill_everything()
        whole = sorted(self.checkpoints.glob("step-*.pt"))
        if len(whole) > 1:
            with open(whole[-1], "r+b") as file:
                file.seek(self.random.randrange(whole[-1].stat().st_size))
                file.write(b"\xff\x00\xff")

    # ------------------------------------------------------------ what is seen

    def steps_done(self) -> int:
        try:
            return int((self.folder / "steps").read_text())
        except (OSError, ValueError):
            return 0

    def usage(self) -> list[dict[str, Any]]:
        lines = []
        for path in self.folder.glob("usage-*.jsonl"):
            lines += [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        return lines

    def rank_pids(self) -> dict[int, int]:
        """Rank -> process, of the ranks that live."""
        newest = {line["rank"]: line["pid"] for line in sorted(self.usage(), key=lambda line: line["time"])}
        return {rank: pid for rank, pid in sorted(newest.items()) if alive(pid)}

    def pids(self) -> list[int]:
        return list(self.rank_pids().values())

    def report(self, seconds: float) -> dict[str, Any]:
        lives: dict[int, list[dict[str, Any]]] = {}
        for line in self.usage():
            lives.setdefault(line["pid"], []).append(line)
        growth, files = [], []
        for lines in lives.values():
            lines.sort(key=lambda line: line["time"])
            settled = [line for line in lines if line["time"] - lines[0]["time"] > SETTLED]
            if len(settled) > 1:
                growth.append(settled[-1]["rss_mib"] - settled[0]["rss_mib"])
                files.append(settled[-1]["files"] - settled[0]["files"])
        last = max((lines for lines in lives.values() if lines[0]["rank"] == 0), key=lambda lines: lines[-1]["time"])
        quarters = [last[i * (len(last) - 1) // 4] for i in range(5)]
        stalls = [
            line["save_stall"]
            for line in map(json.loads, (self.folder / "run" / "metrics.jsonl").read_text().splitlines())
            if line["save_stall"]
        ]
        lost = [n for ns in self.lost.values() for n in ns]
        text = (self.folder / "output.txt").read_text(errors="replace")
        return {
            "minutes": round(seconds / 60, 1),
            "ranks": self.ranks,
            "steps": self.steps_done(),
            "steps_done_again": sum(lost),
            "most_steps_lost": self.lost and {name: max(ns) for name, ns in self.lost.items()},
            "faults": dict(self.faults),
            "resumes": text.count("resuming from"),
            "launcher_exit_codes": dict(self.exits),
            "checkpoints_skipped_as_damaged": text.count("skipped: "),
            "failed_saves": text.count("WARNING: cannot save"),
            "photographs_replaced": text.count("another photograph takes its place"),
            "aborts": text.count("SIGABRT"),
            "processes": len(lives),
            "last_life": {
                "minutes": round((last[-1]["time"] - last[0]["time"]) / 60, 1),
                "steps": last[-1]["step"] - last[0]["step"],
                "memory_mib_at_each_quarter": [line["rss_mib"] for line in quarters],
                "open_files_at_each_quarter": [line["files"] for line in quarters],
            },
            "memory_growth_mib_per_life": {"median": median(growth), "most": max(growth, default=None)},
            "open_files_growth_per_life": {"median": median(files), "most": max(files, default=None)},
            "save_stall_seconds": {"median": median(stalls), "most": max(stalls, default=None), "saves": len(stalls)},
            "problems": self.problems,
        }


def median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def as_rank(folder: Path, arguments: list[str]) -> None:
    """One rank of the training, with its steps and its use of the machine written down, and NaN where asked for."""
    from dist_colorize import train
    from dist_colorize.errors import run_command
    from dist_colorize.optimisation import Optimisation

    rank = int(os.environ["RANK"])
    genuine = Optimisation.step
    told = 0.0
    steps = open(folder / "steps", "r+" if (folder / "steps").exists() else "w") if rank == 0 else None  # noqa: SIM115 - for the whole life of the process

    def step(self: Optimisation, number: int, lightness: Any, ab: Any) -> Any:
        nonlocal told
        if rank == 0 and (folder / "poison").exists():
            (folder / "poison").unlink()
            lightness = lightness * float("nan")
        loss = genuine(self, number, lightness, ab)
        if steps is not None:
            steps.write(f"{number + 1:<12}")
            steps.seek(0)
        if time.time() - told > 5:
            told = time.time()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            files = len(list(Path("/proc/self/fd").iterdir()))
            line = {"rank": rank, "pid": os.getpid(), "time": told, "step": number + 1, "files": files}
            # while the disk is said to be full, this file cannot grow either
            with contextlib.suppress(OSError), open(folder / f"usage-{rank}.jsonl", "a") as file:
                file.write(json.dumps(line | {"rss_mib": pages * resource.getpagesize() // 2**20}) + "\n")
        return loss

    Optimisation.step = step  # type: ignore[method-assign]
    run_command(lambda: train.main(arguments))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-rank"]:
        as_rank(Path(sys.argv[2]), sys.argv[3:])
    sys.exit(main())
