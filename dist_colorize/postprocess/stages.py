"""What post-processing means, said once for the CPU and the GPU: the stages, the presets, the primitives behind them.

The network leaves 64 features per cell of a grid at half its working size. `decode` turns them into colour (`ab`) and a
confidence; then the stages of a preset change `ab` where the network was unsure; at last `compose` merges `ab` with the
photograph's own lightness. A `Backend` (cpu.TorchBackend, cuda.CudaBackend) supplies these five primitives and nothing
else: order, parameters and presets live here.

A preset is a YAML file, in configs/postprocess/ or your own:

    temperature: 0.38
    stages:
      - blend: {sigma: 2.0, low: 0.1, high: 0.4}
      - repair: {min_chroma: 20, max_confidence: 0.15}
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import yaml
from torch import Tensor

from dist_colorize import config
from dist_colorize.color.lab import AB_SCALE
from dist_colorize.errors import UserError
from dist_colorize.resources import resource

LOGIT_LIMIT = 1e30
"""Logits are clamped to +-LOGIT_LIMIT, NaN to -LOGIT_LIMIT, before the temperature divides them: outputs are finite."""

AB_LIMIT = 128.0
"""A network that predicts ab itself is held within +-AB_LIMIT, where all colours lie; a NaN becomes neutral."""

TRUNCATE = 3.0
"""The Gaussian ends at this many sigmas."""


class Backend(Protocol):
    """The primitives. `ab` [B, 2, h, w] and `confidence` [B, h, w] are float32, contiguous and finite, on `device`.

    Every primitive returns new tensors and leaves its arguments alone. Cells outside its mask keep their bits.
    """

    device: torch.device

    def decode(self, features: Tensor, weight: Tensor, bias: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Features [B, C, h, w] (fp32, bf16 or fp16), head weight [313, C] and bias [313] -> (ab, confidence).

        ab is the expectation of the 313 bin centres under softmax(logits / temperature), confidence its largest value.
        The logits are accumulated in fp32, clamped as LOGIT_LIMIT says, and never exist for the whole image at once.
        """
        ...

    def blend(self, ab: Tensor, confidence: Tensor, sigma: float, low: float, high: float) -> Tensor:
        """w*ab + (1-w)*gaussian(ab, sigma) with w = clamp((confidence-low) / (high-low), 0, 1); untouched where w = 1.

        For low = high: w = 1 where confidence >= low, else 0. The Gaussian is `gaussian_taps`, sigma in cells, along
        both axes with scipy's mode "reflect" (d c b a | a b c d | d c b a); the image may be smaller than the radius.
        """
        ...

    def scale_chroma(
        self,
        ab: Tensor,
        confidence: Tensor,
        min_chroma: float,
        max_confidence: float,
        hue: float,
        hue_width: float,
        factor: float,
    ) -> Tensor:
        """Chroma c becomes min_chroma + (c - min_chroma)*factor, the hue stays, in the masked cells.

        Masked: c > min_chroma, confidence < max_confidence, and the hue angle lies within hue_width/2 degrees of `hue`:
        a*cos(hue) + b*sin(hue) >= c*cos(hue_width/2); every hue for hue_width = 360.
        """
        ...

    def repair(
        self,
        ab: Tensor,
        confidence: Tensor,
        min_chroma: float,
        max_confidence: float,
        radius: int,
        min_neighbours: int,
        sweeps: int,
        sigma: float,
    ) -> Tensor:
        """Suspect cells take the mean ab of their trusted neighbours, or a blur where those are too few.

        Suspect: chroma >= min_chroma and confidence < max_confidence; trusted at first: confidence >= max_confidence.
        In each sweep every suspect cell with at least `min_neighbours` trusted cells in its (2*radius+1)^2 window (cut
        off at the image's border) takes their mean and is trusted in the next sweep (Jacobi: a sweep reads only what
        the sweep before left). Ends early when a sweep repairs none. What is suspect after the last sweep takes
        gaussian(ab as it came in, sigma).
        """
        ...

    def compose(self, lightness: Tensor, ab: Tensor, size: tuple[int, int], row0: int, bits: int) -> Tensor:
        """Rows row0 .. row0+n of the full-size picture: sRGB [n, W, 3], uint8 for bits = 8, uint16 for bits = 16.

        lightness [n, W] float32 (L* 0..100) holds these rows; ab [2, h, w] is the whole grid; size = (H, W) of the
        whole picture. ab is interpolated bilinearly at the pixels' centres (`bilinear_taps`), scaled towards neutral
        where the colour is outside sRGB (color.lab.clamp_to_gamut), then Lab -> sRGB, rounded to the nearest level.
        The bits of a row do not depend on how the picture is cut into strips.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blend:
    """Mixes the colour with its Gaussian blur: the less confident a cell, the more blur."""

    label: ClassVar[str] = "blended"

    sigma: float = 2.0
    """Standard deviation of the blur, in cells of the ab grid (a cell is 2 working pixels wide)."""
    low: float = 0.1
    """Confidence (0..1) up to which only the blur counts."""
    high: float = 0.4
    """Confidence from which the colour is left alone; low = high makes a hard step, low = high = 2 blurs everything."""

    def __post_init__(self) -> None:
        _require(0 < self.sigma <= 100, f"sigma must be above 0 and at most 100 cells, got {self.sigma}")
        _require(0 <= self.low <= self.high, f"low and high need 0 <= low <= high, got {self.low} and {self.high}")

    def apply(self, backend: Backend, ab: Tensor, confidence: Tensor) -> Tensor:
        return backend.blend(ab, confidence, self.sigma, self.low, self.high)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleChroma:
    """Tones down strong colours that the network was unsure of, in all hues or around one."""

    label: ClassVar[str] = "suppressed"

    min_chroma: float = 30.0
    """Chroma sqrt(a^2 + b^2) above which a colour is toned down, in CIE Lab units."""
    max_confidence: float = 0.3
    """Only cells below this confidence (0..1) change; 2 means all."""
    hue: float = 0.0
    """Centre of the range of hues, in degrees: 0 is +a (magenta red), 40 red, 90 +b (yellow), 180 green, 270 blue."""
    hue_width: float = 360.0
    """Width of the range of hues, in degrees; 360 means all."""
    factor: float = 0.3
    """What remains of the chroma above min_chroma: 0 cuts it off, 1 changes nothing."""

    def __post_init__(self) -> None:
        _require(self.min_chroma >= 0, f"min_chroma must not be negative, got {self.min_chroma}")
        _require(self.max_confidence >= 0, f"max_confidence must not be negative, got {self.max_confidence}")
        _require(0 < self.hue_width <= 360, f"hue_width must be above 0 and at most 360 degrees, got {self.hue_width}")
        _require(math.isfinite(self.hue), f"hue must be an angle in degrees, got {self.hue}")
        _require(0 <= self.factor <= 1, f"factor must lie in 0..1, got {self.factor}")

    def apply(self, backend: Backend, ab: Tensor, confidence: Tensor) -> Tensor:
        return backend.scale_chroma(
            ab, confidence, self.min_chroma, self.max_confidence, self.hue, self.hue_width, self.factor
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repair:
    """Replaces splotches (strong colour, low confidence) by the mean of confident neighbours, or by a blur."""

    label: ClassVar[str] = "repaired"

    min_chroma: float = 20.0
    """Chroma from which an unsure cell is a suspect, in CIE Lab units; 0 suspects every unsure cell."""
    max_confidence: float = 0.15
    """Confidence (0..1) below which a cell is unsure; from it on, a cell is trusted."""
    radius: int = 2
    """Neighbours are sought in a window of 2*radius+1 cells."""
    min_neighbours: int = 3
    """As many trusted cells the window must hold."""
    sweeps: int = 8
    """At most this many rounds; a repaired cell helps its neighbours in the next one."""
    sigma: float = 3.0
    """Standard deviation of the fallback blur, in cells."""

    def __post_init__(self) -> None:
        _require(self.min_chroma >= 0, f"min_chroma must not be negative, got {self.min_chroma}")
        _require(self.max_confidence >= 0, f"max_confidence must not be negative, got {self.max_confidence}")
        _require(1 <= self.radius <= 16, f"radius must lie in 1..16 cells, got {self.radius}")
        most = (2 * self.radius + 1) ** 2 - 1
        _require(
            1 <= self.min_neighbours <= most,
            f"min_neighbours must lie in 1..{most} for radius {self.radius}, got {self.min_neighbours}",
        )
        _require(self.sweeps >= 0, f"sweeps must not be negative, got {self.sweeps}")
        _require(0 < self.sigma <= 100, f"sigma must be above 0 and at most 100 cells, got {self.sigma}")

    def apply(self, backend: Backend, ab: Tensor, confidence: Tensor) -> Tensor:
        return backend.repair(
            ab,
            confidence,
            self.min_chroma,
            self.max_confidence,
            self.radius,
            self.min_neighbours,
            self.sweeps,
            self.sigma,
        )


Stage = Blend | ScaleChroma | Repair
STAGES: dict[str, type[Stage]] = {"blend": Blend, "scale_chroma": ScaleChroma, "repair": Repair}
"""The names by which a preset file calls the stages."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """How logits become colour: a temperature and a list of stages."""

    temperature: float = 0.38
    """Divides the logits before the softmax: near 0 the likeliest bin wins, 1 averages all (washed-out colours)."""
    stages: tuple[Stage, ...] = ()
    """Applied in this order."""

    def __post_init__(self) -> None:
        _require(0.001 <= self.temperature <= 1000, f"temperature must lie in 0.001..1000, got {self.temperature}")


def decode_and_run(
    preset: Preset, backend: Backend, features: Tensor, weight: Tensor, bias: Tensor
) -> tuple[list[tuple[str, Tensor]], Tensor]:
    """Features [B, C, h, w], head weight [313, C] and bias [313] -> (results of `run`, confidence [B, h, w]).

    A head of 2 rows predicts ab / AB_SCALE itself: its confidence is 1 everywhere: no stage finds fault with it.
    """
    if len(weight) == 2:
        ab, confidence = decode_regression(features, weight, bias)
    else:
        ab, confidence = backend.decode(features, weight, bias, preset.temperature)
    return run(preset, backend, ab, confidence), confidence


def decode_regression(features: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Features [B, C, h, w], weight [2, C], bias [2] -> ab [B, 2, h, w], finite and within +-128, and confidence 1."""
    # [B, C, h, w] -> [B, h, w, C] @ [C, 2]; fp32 whatever the features are
    ab = (features.movedim(1, -1).float() @ weight.float().T + bias.float()) * AB_SCALE
    ab = ab.nan_to_num_(nan=0.0).clamp_(-AB_LIMIT, AB_LIMIT)
    return ab.movedim(-1, 1).contiguous(), torch.ones_like(ab[..., 0])


def run(preset: Preset, backend: Backend, ab: Tensor, confidence: Tensor) -> list[tuple[str, Tensor]]:
    """The stages on ab [B, 2, h, w] with confidence [B, h, w]: [("raw", ab), (label, ab) after each stage]."""
    results = [("raw", ab)]
    for stage in preset.stages:
        results.append((stage.label, stage.apply(backend, results[-1][1], confidence)))
    return results


def preset_names() -> list[str]:
    """The presets that come with the package."""
    return sorted(path.stem for path in resource("configs", "postprocess").glob("*.yaml"))


def load_preset(name_or_file: str | Path) -> Preset:
    """The preset of that name in configs/postprocess, or of that YAML file. UserError names what is wrong and where."""
    text = str(name_or_file)
    path = Path(text) if text.endswith((".yaml", ".yml")) else resource("configs", "postprocess") / f"{text}.yaml"
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no preset {text!r}: give one of {', '.join(preset_names())}, or a .yaml file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"preset {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"preset {path} is no valid YAML: {error}") from None
    return build_preset(mapping, str(path))


def build_preset(mapping: Any, source: str) -> Preset:
    """The preset that a parsed YAML mapping describes; `source` is the name used in errors."""
    if not isinstance(mapping, dict):
        raise UserError(f"preset {source} must hold `temperature:` and `stages:`")
    entries = mapping.get("stages") or []
    if not isinstance(entries, list):
        raise UserError(f"preset {source}: stages must be a list, got {type(entries).__name__}")
    stages: list[Stage] = []
    for number, entry in enumerate(entries, start=1):
        entry = {entry: {}} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or len(entry) != 1 or next(iter(entry)) not in STAGES:
            raise UserError(f"preset {source}: stage {number} must be one of {', '.join(STAGES)}, got {entry!r}")
        ((name, settings),) = entry.items()
        stages.append(config.build(STAGES[name], settings or {}, f"{source}, stage {number} ({name})"))
    flat = config.build(_PresetHead, {key: value for key, value in mapping.items() if key != "stages"}, source)
    return Preset(temperature=flat.temperature, stages=tuple(stages))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PresetHead:
    """The part of a preset file beside its list of stages."""

    temperature: float = Preset.temperature
    """See Preset."""

    def __post_init__(self) -> None:
        Preset(temperature=self.temperature)


def gaussian_taps(sigma: float) -> np.ndarray:
    """float64 [2*radius+1] weights of scipy.ndimage.gaussian_filter, truncate=3: radius = int(3*sigma + 0.5), sum 1."""
    radius = int(TRUNCATE * sigma + 0.5)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return taps / taps.sum()


def bilinear_taps(small: int, large: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For pixels start .. start+count of an axis of `large` pixels: (left int64, right int64, share of right float32).

    The axis is interpolated from `small` cells over the same extent: cell coordinate = (pixel + 0.5)*small/large - 0.5,
    clamped to the outer cells' centres (torch's interpolate with align_corners=False). Each pixel by itself, in float64
    until the last step: a strip gets the same numbers as the whole.
    """
    centre = (np.arange(start, start + count, dtype=np.float64) + 0.5) * (small / large) - 0.5
    centre = np.clip(centre, 0.0, small - 1.0)
    left = np.floor(centre).astype(np.int64)
    return left, np.minimum(left + 1, small - 1), (centre - left).astype(np.float32)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
