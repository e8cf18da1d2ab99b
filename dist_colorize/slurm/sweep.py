"""Which runs a sweep has: every combination of the values that `key=a,b,...` names."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from dist_colorize.errors import UserError


def combinations(axes: Sequence[str]) -> list[list[str]]:
    """The overrides of each run: ["a=1,2", "b=3,4"] gives a=1 b=3, a=1 b=4, a=2 b=3, a=2 b=4.

    A comma within brackets belongs to the value: data.scale=[0.1,1],[0.5,1] has two values.
    """
    choices = []
    for axis in axes:
        key, equals, values = axis.partition("=")
        parts = split_values(values)
        if not (key and equals and all(parts)):
            raise UserError(f"--sweep {axis}: write key=value,value,... such as train.lr=1e-3,3e-4")
        if len(set(parts)) < len(parts):
            raise UserError(f"--sweep {axis}: a value is given twice")
        choices.append([f"{key}={value}" for value in parts])
    keys = [axis.partition("=")[0] for axis in axes]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise UserError(f"--sweep: {sorted(twice)[0]} is given twice; put all its values behind one =")
    return [list(run) for run in itertools.product(*choices)]


def split_values(text: str) -> list[str]:
    """Split at the commas that stand outside of brackets and braces."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "[{(") - (sign in "]})")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def folder_name(index: int, overrides: Sequence[str]) -> str:
    """A name for one run of a sweep that tells it from the others: 003-lr=0.001-rebalance=0.5."""
    short = [f"{o.partition('=')[0].rpartition('.')[2]}={o.partition('=')[2]}" for o in overrides]
    return re.sub(r"[^\w=.+-]+", "_", f"{index:03d}-" + "-".join(short))[:120]
