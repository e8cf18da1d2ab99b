"""The data: which photographs there are, which one comes when, and how it becomes L and ab on the device."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_colorize.data.columns import Photographs
    from dist_colorize.data.config import DataConfig
    from dist_colorize.data.loader import Batch, Loader, evaluation_batches
    from dist_colorize.data.order import Order
    from dist_colorize.data.photos import open_photographs, sample_photographs

__all__ = [
    "Batch",
    "DataConfig",
    "Loader",
    "Order",
    "Photographs",
    "evaluation_batches",
    "open_photographs",
    "sample_photographs",
]

_HOMES = {
    "Batch": "loader",
    "DataConfig": "config",
    "Loader": "loader",
    "Order": "order",
    "Photographs": "columns",
    "evaluation_batches": "loader",
    "open_photographs": "photos",
    "sample_photographs": "photos",
}


def __getattr__(name: str) -> Any:
    # On demand: `python -m dist_colorize.index --help` should not wait for torch and DALI.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
