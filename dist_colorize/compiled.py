"""Loops over numbers as machine code, by numba: for what neither DALI nor torch does in one pass over a CPU's memory.

Compiled when first called on a machine, in some seconds; the result is kept beside the source or in the user's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Machine code instead of Python; other threads run meanwhile."""
    # "contract": a product and a sum may become one fused operation. Nothing is reordered.
    return _compile(function, {"contract"})


def compiled_sums(function: Function) -> Function:
    """`compiled`, but sums over a loop may be taken in another order, several terms at a time."""
    return _compile(function, {"contract", "reassoc", "nsz"})


def _compile(function: Function, allowed: set[str]) -> Function:
    compile_it = partial(numba.njit, nogil=True, fastmath=allowed, error_model="numpy")
    try:
        return cast(Function, compile_it(cache=True)(function))
    except RuntimeError:  # no folder to keep it in: neither here nor in the user's cache may be written
        return cast(Function, compile_it()(function))
