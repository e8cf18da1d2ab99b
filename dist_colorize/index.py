"""Scans a data set once: which photographs can be used, how large they are, and what is wrong with the others.

    python -m dist_colorize.index /photos                      # a folder tree, tar shards, or both
    python -m dist_colorize.index /photos --list-rejected      # and what was left out, with the reason
    python -m dist_colorize.index /photos --rebuild            # after files were changed in place

Training does this by itself when the index is missing, or when files came or went. Nothing is written below ROOT: the
index lies in the user's cache folder, or below --output (in a recipe: data.index_dir). Usable are colour photographs
in JPEG, PNG, WebP, TIFF and BMP. Left out and reported are files that cannot be decoded, that are grayscale or too
small, and what else is called like an image but is none.

Exit codes: 0 done, 2 nothing usable or a wrong argument, 75 interrupted.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dist_colorize.data.catalog import build_index, by_reason, index_folder, is_fresh, rejections
from dist_colorize.data.columns import Photographs, describe, open_index
from dist_colorize.data.config import DataConfig
from dist_colorize.data.inspect import FORMATS
from dist_colorize.errors import run_command
from dist_colorize.text import printable


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    root = Path(arguments.root)
    folder = index_folder(root, arguments.min_side, arguments.output)
    if arguments.rebuild or not is_fresh(folder):
        started = time.monotonic()
        build_index(root, arguments.min_side, arguments.output, progress=True)
        print(f"scanned in {time.monotonic() - started:.1f} s")
    else:
        print("the index is up to date (--rebuild builds it anyway)")
    photographs, about = open_index(folder), describe(folder)
    if arguments.list_rejected:
        for name, reason in rejections(folder):
            print(f"{printable(name)}: {reason}")
    print(
        f"usable: {len(photographs):,} photographs ({_by_format(photographs)})\n"
        f"left out: {sum(about['rejected'].values()):,}{by_reason(about['rejected'])}\n"
        f"other files: {about['ignored']:,}\n"
        f"fingerprint: {photographs.fingerprint[:16]}\n"
        f"index: {folder}"
    )


def _by_format(photographs: Photographs) -> str:
    counts = Counter(photographs.format.tolist())
    return ", ".join(f"{FORMATS[place]} {count:,}" for place, count in counts.most_common())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dist_colorize.index", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", metavar="ROOT", help="folder with photographs, with tar shards, or with both")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="keep indexes below this folder (default: the user's cache folder); give it to training as data.index_dir",
    )
    parser.add_argument(
        "--min-side",
        type=int,
        default=DataConfig.min_side,
        metavar="N",
        help="leave out images with a side shorter than this many pixels (default: %(default)s, as data.min_side)",
    )
    parser.add_argument("--rebuild", action="store_true", help="scan again although the index is up to date")
    parser.add_argument("--list-rejected", action="store_true", help="print every file that was left out, and why")
    return parser


if __name__ == "__main__":
    run_command(main)
