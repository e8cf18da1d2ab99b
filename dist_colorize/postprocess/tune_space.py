"""What can be tuned in a preset, as a vector of numbers for an optimiser, and a preset as the text of its file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from dist_colorize.postprocess.stages import STAGES, Preset, Stage

TEMPERATURES: tuple[float, ...] = tuple(np.round(np.geomspace(0.1, 1.6, 25), 4).tolist())
"""A grid, so that what each temperature makes of the photographs can be kept: 12 % from one to the next."""
BOUNDS: dict[str, dict[str, tuple[float, float]]] = {
    "blend": {"sigma": (0.5, 6.0), "low": (0.0, 0.9), "high": (0.0, 0.9)},
    "scale_chroma": {"min_chroma": (5.0, 70.0), "max_confidence": (0.0, 0.9), "factor": (0.0, 1.0)},
    "repair": {
        "min_chroma": (0.0, 60.0),
        "max_confidence": (0.0, 0.9),
        "radius": (1, 4),
        "min_neighbours": (1, 8),
        "sigma": (0.5, 6.0),
    },
}
"""Stage -> field -> least and greatest value; the other fields stay as the preset has them."""
WHOLE = {"radius", "min_neighbours"}
"""Fields that take whole numbers."""


@dataclass(frozen=True)
class Space:
    """The presets with the stages of `start`, as vectors: place in TEMPERATURES, then the fields stage by stage."""

    start: Preset

    def fields(self) -> list[tuple[int, str]]:
        """(number of the stage, field) of each number after the temperature."""
        return [(i, name) for i, stage in enumerate(self.start.stages) for name in BOUNDS[name_of(stage)]]

    def bounds(self) -> list[tuple[float, float]]:
        rest = [BOUNDS[name_of(self.start.stages[i])][name] for i, name in self.fields()]
        return [(0, len(TEMPERATURES) - 1), *rest]

    def whole(self) -> list[bool]:
        return [True, *(name in WHOLE for _, name in self.fields())]

    def vector(self) -> list[float]:
        """`start`, pulled to the nearest point of the space."""
        place = int(np.abs(np.log(np.array(TEMPERATURES) / self.start.temperature)).argmin())
        values = [place, *(getattr(self.start.stages[i], name) for i, name in self.fields())]
        return [min(max(v, low), high) for v, (low, high) in zip(values, self.bounds(), strict=True)]

    def preset(self, vector: Sequence[float]) -> Preset:
        """The preset of a vector; where low exceeds high in a blend the two change places."""
        changes: list[dict[str, Any]] = [{} for _ in self.start.stages]
        for (i, name), value in zip(self.fields(), vector[1:], strict=True):
            changes[i][name] = round(value) if name in WHOLE else round(float(value), 4)
        for change in changes:
            if change.get("low", 0) > change.get("high", 1):
                change["low"], change["high"] = change["high"], change["low"]
        stages = tuple(
            dataclasses.replace(stage, **change) for stage, change in zip(self.start.stages, changes, strict=True)
        )
        return Preset(temperature=TEMPERATURES[round(vector[0])], stages=stages)


def name_of(stage: Stage) -> str:
    """What preset files call a stage."""
    return next(name for name, kind in STAGES.items() if type(stage) is kind)


def as_yaml(preset: Preset, comment: str) -> str:
    """The file that `stages.load_preset` reads as this preset; `comment` stands above it."""
    stages = [{name_of(stage): dataclasses.asdict(stage)} for stage in preset.stages]
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    return head + yaml.safe_dump({"temperature": preset.temperature, "stages": stages}, sort_keys=False)
