"""The report: one HTML file that any browser shows without network. Tables, pictures, sliders, curves.

Everything is inside the file: data as JSON, pictures as data addresses. A Content-Security-Policy forbids the rest.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dist_colorize.evaluation import Evaluation
from dist_colorize.files import write_atomically
from dist_colorize.metrics import METRICS
from dist_colorize.scoring import Picture

TEMPLATE = Path(__file__).with_name("template.html")
QUALITY = 90
"""Of the pictures, WebP; the scores beside them are those of the exact pictures."""
TINT = (255, 0, 160)
"""Laid over what the network was unsure of: a colour that photographs rarely have."""


@dataclass(frozen=True)
class Page:
    """One run in a report."""

    name: str
    evaluation: Evaluation
    protocol: Mapping[str, Any]
    names: Sequence[str]
    """Of the photographs, in the order of `evaluation.photographs`."""


@dataclass(frozen=True)
class Comparison:
    """What `runs compare` adds."""

    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    """Settings that differ: the key, and its value in each run."""
    curves: Sequence[Mapping[str, str]] = field(default_factory=list)
    """{"title", "svg"} each."""


def write_report(path: Path, pages: Sequence[Page], title: str = "Colorization report") -> None:
    """Writes the report of evaluated runs."""
    write_page(path, title, [_run(page) for page in pages], Comparison())


def write_page(path: Path, title: str, runs: Sequence[Mapping[str, Any]], comparison: Comparison) -> None:
    """Writes a page from runs in the template's own form, see `_run`."""
    data = {
        "title": title,
        "metrics": {name: asdict(metric) for name, metric in METRICS.items()},
        "runs": list(runs),
        "settings": {"columns": list(comparison.columns), "rows": [list(row) for row in comparison.rows]},
        "curves": list(comparison.curves),
    }
    # so that no text inside can end the script element
    text = json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")
    write_atomically(path, TEMPLATE.read_text(encoding="utf-8").replace("@DATA@", text).encode())


def _run(page: Page) -> dict[str, Any]:
    photographs = []
    classifies = bool(page.evaluation.classifier)
    for name, one in zip(page.names, page.evaluation.photographs, strict=True):
        if one.pictures:
            unsure = _tint(one.confidence) if classifies and one.confidence is not None else None
            photographs.append(
                {
                    "name": name,
                    "scores": one.scores,
                    "classifier": dict(one.classifier),
                    "images": {stage: _address(Image.fromarray(p), "WEBP") for stage, p in one.pictures.items()},
                    "confidence": unsure,
                }
            )
    return {
        "name": page.name,
        "scores": page.evaluation.scores,
        "intervals": page.evaluation.intervals,
        "classifier": page.evaluation.classifier,
        "protocol": dict(page.protocol),
        "photographs": photographs,
    }


def _tint(confidence: Picture) -> str:
    """An overlay that hides what is unsure: uint8 [h, w], 255 is sure, -> RGBA PNG."""
    overlay = np.empty((*confidence.shape, 4), dtype=np.uint8)
    overlay[..., :3] = TINT
    overlay[..., 3] = (255 - confidence.astype(np.uint16)) * 7 // 8
    return _address(Image.fromarray(overlay), "PNG")


def _address(image: Image.Image, form: str) -> str:
    encoded = BytesIO()
    image.save(encoded, format=form, quality=QUALITY)
    return f"data:image/{form.lower()};base64,{base64.b64encode(encoded.getvalue()).decode()}"
