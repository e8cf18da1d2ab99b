"""Runs the benchmarks, each in a process of its own, and prints their tables.

    pip install -e '.[benchmarks]'          # the peers
    python -m benchmarks                    # all that are quick enough: under 15 minutes on 2 cores
    python -m benchmarks input_path step    # some
    python -m benchmarks.step --help        # one, with its own options

compare_methods.py, save_stall.py and soak.py measure other things than speed, for longer; run them by name. gpu_step.py
measures the step on a GPU; the other gpu_*.py are steps of .ci/gpu.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

BENCHMARKS = ("input_path", "step", "decode", "colorize", "ddp", "start")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all")
    names = parser.parse_args().names or BENCHMARKS
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    began, failed = time.monotonic(), []
    for name in names:
        start = time.monotonic()
        print(f"\n## {name}", flush=True)
        # an interpreter of its own: memory, threads and allocator settings of one say nothing about the next
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode:
            failed.append(name)
        print(f"({time.monotonic() - start:.0f} s)", flush=True)
    print(f"\n{time.monotonic() - began:.0f} s in all" + (f"; FAILED: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
