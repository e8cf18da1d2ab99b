"""Curves of several runs over their steps: as text for a terminal, as SVG for the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")
BARS = "▁▂▃▄▅▆▇█"
WIDTH, HEIGHT, LEFT, BOTTOM = 720, 300, 60, 30
"""Of the SVG, in its own units; LEFT and BOTTOM are the margins of the axes."""
SAMPLES = 8
"""Steps at which a terminal shows the curves side by side."""


@dataclass(frozen=True)
class Curve:
    title: str
    lines: list[tuple[str, list[int], list[float]]]
    """(run, steps, values), steps ascending; every run has at least one point."""

    def sampled_steps(self) -> list[int]:
        """Steps from the first to the last of any run at which to look at the curves."""
        steps = sorted({step for _, xs, _ in self.lines for step in xs})
        places = {round(i * (len(steps) - 1) / (SAMPLES - 1)) for i in range(SAMPLES)}
        return [steps[place] for place in sorted(places)]

    def sampled(self, text: Callable[[float | None], str]) -> Iterator[tuple[str, list[str]]]:
        """For each run its value at the sampled steps: the last one up to there, and none before or after its steps."""
        for name, xs, ys in self.lines:
            row: list[str] = []
            for step in self.sampled_steps():
                known = [y for x, y in zip(xs, ys, strict=True) if x <= step]
                row.append(text(known[-1] if known and step <= xs[-1] else None))
            yield name, row

    def svg(self) -> str:
        """The curves with axes and a legend; colours of text and axes follow the page."""
        xs = [x for _, steps, _ in self.lines for x in steps]
        ys = [y for _, _, values in self.lines for y in values]
        (x0, x1), (y0, y1) = _range(xs), _range(ys)

        def place(x: float, y: float) -> tuple[float, float]:
            return (
                LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - 10),
                10 + (y1 - y) / (y1 - y0) * (HEIGHT - BOTTOM - 10),
            )

        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT + 18 * len(self.lines)}" '
            f'role="img" aria-label="{escape(self.title)}" font-family="system-ui, sans-serif" font-size="12" '
            'fill="currentColor">'
        ]
        for i in range(5):
            x, y = x0 + i * (x1 - x0) / 4, y0 + i * (y1 - y0) / 4
            across, down = place(x, y)
            parts.append(
                f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{down:.1f}" y2="{down:.1f}" stroke="#8884"/>'
                f'<text x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{y:.4g}</text>'
                f'<text x="{across:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{x:.0f}</text>'
            )
        for number, (name, steps, values) in enumerate(self.lines):
            colour = COLOURS[number % len(COLOURS)]
            points = [place(x, y) for x, y in zip(steps, values, strict=True)]
            drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"/>')
            if len(points) == 1:
                parts.append(f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3" fill="{colour}"/>')
            down = HEIGHT + 18 * number + 8
            parts.append(f'<rect x="{LEFT}" y="{down - 8}" width="12" height="8" fill="{colour}"/>')
            parts.append(f'<text x="{LEFT + 18}" y="{down}">{escape(name)}</text>')
        return "".join([*parts, "</svg>"])


def curves(runs: Sequence[tuple[str, Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]]) -> list[Curve]:
    """Loss and validation PSNR of runs: (name, lines of metrics.jsonl, lines of validation.jsonl) each."""

    def loss(line: Mapping[str, Any]) -> float | None:
        return line.get("loss")

    def psnr(line: Mapping[str, Any]) -> float | None:
        found: float | None = line.get("scores", {}).get("final", {}).get("psnr")
        return found

    found = []
    for title, validated, value in (("loss", False, loss), ("validation PSNR (dB), final", True, psnr)):
        lines = []
        for name, steps, validations in runs:
            known = validations if validated else steps
            points = [(int(line["step"]), y) for line in known if (y := value(line)) is not None]
            if points:
                lines.append((name, [x for x, _ in points], [y for _, y in points]))
        if lines:
            found.append(Curve(title, lines))
    return found


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """A row of small bars, from the least to the greatest value."""
    low, high = _range(values)
    count = min(width, len(values))
    chosen = [values[round(i * (len(values) - 1) / max(count - 1, 1))] for i in range(count)]
    return "".join(BARS[min(len(BARS) - 1, int((value - low) / (high - low) * len(BARS)))] for value in chosen)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
