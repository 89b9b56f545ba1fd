"""The page's plots, as inline SVG, and the figures of merit that they show.

Written by hand, for each point has its tooltip and the page's style sheet gives the colours, light or dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

from heterostep.compare.summary import EVALUATIONS, RUNTIME


@dataclass(frozen=True)
class Metric:
    """A figure of merit: its key in the results, how it is written, and dense's own where that is given."""

    key: str
    name: str
    unit: str
    digits: int
    higher_is_better: bool
    dense: float | None
    bounds: tuple[float, float] = (-math.inf, math.inf)

    @property
    def heading(self) -> str:
        return f"{self.name}, {self.unit}" if self.unit else self.name

    @property
    def direction(self) -> str:
        side = "higher" if self.higher_is_better else "lower"
        return f"{side} is better" if self.dense is None else f"{side} is nearer to dense"

    def text(self, value: float | None) -> str:
        if value is None:
            return "–"
        return "identical" if math.isinf(value) else f"{value:.{self.digits}f}"


PSNR = Metric("psnr", "PSNR", "dB", 1, True, math.inf)
SSIM = Metric("ssim", "SSIM", "", 3, True, 1.0, (0, 1))
VMAF = Metric("vmaf", "VMAF", "", 1, True, None, (0, 100))
LPIPS = Metric("lpips", "LPIPS", "", 3, False, 0.0, (0, math.inf))
CAPTION = Metric("caption", "Caption score", "", 2, True, None, (0, 1))
MOTION = Metric("motion", "Motion distance", "", 2, False, 0.0, (0, math.inf))
VBENCH = Metric("vbench", "VBench", "", 3, True, None, (0, 1))
METRICS = (PSNR, SSIM, VMAF, LPIPS, CAPTION, MOTION, VBENCH)
AXES = {RUNTIME: "runtime, dense = 1", EVALUATIONS: "token evaluations, dense = 1"}


@dataclass(frozen=True)
class Value:
    """A mean and its spread; the spread is None where nobody knows it."""

    mean: float
    spread: float | None = None


_MARKERS = (
    "M{0} {1}m-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",  # circle
    "M{0} {1}m-4.2 -4.2h8.4v8.4h-8.4z",  # square
    "M{0} {1}m0 -5.4l5.2 9.4h-10.4z",  # triangle
    "M{0} {1}m0 -6l5 6l-5 6l-5 -6z",  # diamond
    "M{0} {1}m0 5.4l5.2 -9.4h-10.4z",  # triangle on its tip
    "M{0} {1}m-1.7 -5.2h3.4v3.5h3.5v3.4h-3.5v3.5h-3.4v-3.5h-3.5v-3.4h3.5z",  # plus
    "M{0} {1}m0 -5.8l1.6 4h4.2l-3.2 2.8l1.2 4.2l-3.8 -2.5l-3.8 2.5l1.2 -4.2l-3.2 -2.8h4.2z",  # star
    "M{0} {1}m-5.4 -3.2h10.8v6.4h-10.8z",  # bar
)


def marker(index: int, x: float, y: float) -> str:
    """Colours repeat after eight methods; the marker is another one then."""
    shape = _MARKERS[(index + index // len(_MARKERS)) % len(_MARKERS)]
    return f'<path class="point" d="{shape.format(f"{x:.1f}", f"{y:.1f}")}"/>'


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers within a range, about as many as asked."""
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if (high - low) / (step * m) <= count)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Line:
    name: str
    label: str
    index: int
    diagnostic: bool
    points: list[tuple[Value, Value]]


class Chart:
    """One plot as inline SVG; colours, fonts and dashes are the style sheet's."""

    width, height = 460, 320
    left, right, top, bottom = 66, 450, 16, 270
    # A diagnostic method may cost many times dense; it must not squeeze the others together.
    most = 1.2

    def __init__(self, x_key: str, metric: Metric) -> None:
        self.x_key, self.metric = x_key, metric
        self.lines: list[Line] = []
        self.asked: list[float] = []
        self.dense: float | None = None
        self.chance: float | None = None

    def add(
        self, name: str, label: str, index: int, diagnostic: bool, points: list[tuple[Value | None, Value | None]]
    ) -> None:
        """A method's points (x, y); those that were not measured are left out."""
        known = [(x, y) for x, y in points if x is not None and y is not None]
        self.lines.append(Line(name, label, index, diagnostic, known))

    def svg(self) -> tuple[str, list[str]]:
        """The picture, and what has to be said beneath it."""
        notes = []
        x_high = max(
            [1.0, *(x.mean + (x.spread or 0) for line in self.lines if not line.diagnostic for x, _ in line.points)]
        )
        extra = [x.mean for line in self.lines if line.diagnostic for x, _ in line.points]
        x_high = max([x_high, *(x for x in extra if x <= self.most)]) * 1.04
        hidden = sum(x > x_high for x in extra)
        if hidden:
            notes.append(
                f"{hidden} diagnostic point{'s' if hidden > 1 else ''} lie{'' if hidden > 1 else 's'} further right."
            )
        low, high = self._y_range(x_high)
        if self.chance is not None and not low <= self.chance <= high:
            notes.append(f"Dense of another seed, at {self.metric.text(self.chance)}, lies outside.")

        def at_x(x: float) -> float:
            return self.left + (self.right - self.left) * x / x_high

        # Above the scale of a PSNR lies a band for what has none: videos identical to dense.
        roof = self.top + (24 if self.metric is PSNR else 0)

        def at_y(y: float) -> float:
            return self.top + 6 if math.isinf(y) else self.bottom - (self.bottom - roof) * (y - low) / (high - low)

        parts = []
        for tick in ticks(low, high):
            y = at_y(tick)
            parts.append(f'<path class="grid" d="M{self.left} {y:.1f}H{self.right}"/>')
            parts.append(f'<text x="{self.left - 7}" y="{y + 4.5:.1f}" text-anchor="end">{tick:g}</text>')
        for runtime in self.asked:
            if runtime <= x_high:
                parts.append(f'<path class="asked" d="M{at_x(runtime):.1f} {self.top}V{self.bottom}"/>')
        for tick in ticks(0, x_high):
            parts.append(f'<text x="{at_x(tick):.1f}" y="{self.bottom + 18}" text-anchor="middle">{tick:g}</text>')
        parts.append(f'<path class="axis" d="M{self.left} {self.top}V{self.bottom}H{self.right}"/>')
        middle = (self.left + self.right) / 2
        parts.append(f'<text x="{middle:g}" y="{self.bottom + 40}" text-anchor="middle">{AXES[self.x_key]}</text>')
        turned = f'transform="translate(13 {(self.top + self.bottom) / 2:g}) rotate(-90)"'
        parts.append(f'<text {turned} text-anchor="middle">{self.metric.heading}</text>')
        for value, kind, text in ((self.chance, "chance", "dense, another seed"), (self.dense, "dense", "dense")):
            if value is not None and (math.isinf(value) or low <= value <= high):
                y = at_y(value)
                parts.append(f'<path class="{kind}" d="M{self.left} {y:.1f}H{self.right}"/>')
                below = y - self.top < 18 or (kind == "dense" and y < self.bottom - 40)
                text = "dense (identical)" if math.isinf(value) else text
                parts.append(
                    f'<text class="name" x="{self.left + 6}" y="{y + (14 if below else -5):.1f}">{text}</text>'
                )
        # The last ones first, that is beneath the others: diagnostic methods are last of all.
        for line in sorted(self.lines, key=lambda line: -line.index):
            parts.append(self._line(line, at_x, at_y, x_high, low, high))
        label = f"{self.metric.name} against {AXES[self.x_key].split(',')[0]}, {self.metric.direction}. {self._words()}"
        frame = f'viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(label)}"'
        return f'<svg class="chart" {frame}>{"".join(parts)}</svg>', notes

    def _y_range(self, x_high: float) -> tuple[float, float]:
        values = [self.dense] if self.dense is not None and math.isfinite(self.dense) else []
        for line in self.lines:
            for x, y in line.points:
                if math.isfinite(y.mean) and x.mean <= x_high:
                    values += [y.mean - (y.spread or 0), y.mean + (y.spread or 0)]
        floor, ceiling = self.metric.bounds
        values = [min(max(v, floor), ceiling) for v in values] or [0.0, 1.0]
        low, high = min(values), max(values)
        if self.chance is not None:
            # Chance may be so far off that the methods would lie on one another.
            wider = min(low, self.chance), max(high, self.chance)
            if wider[1] - wider[0] <= 1.6 * (high - low):
                low, high = wider
        room = 0.07 * (high - low) or 0.05 * abs(high) or 0.5
        return low - room, high + room

    def _line(
        self,
        line: Line,
        at_x: Callable[[float], float],
        at_y: Callable[[float], float],
        x_high: float,
        low: float,
        high: float,
    ) -> str:
        floor, ceiling = max(low, self.metric.bounds[0]), min(high, self.metric.bounds[1])
        inside = [(x, y) for x, y in line.points if x.mean <= x_high]
        places = [(at_x(x.mean), at_y(y.mean)) for x, y in inside]
        parts = []
        if len(places) > 1:
            parts.append(f'<path class="line" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in places)}"/>')
        for (x, y), (px, py) in zip(inside, places):
            if x.spread:
                x0, x1 = at_x(max(x.mean - x.spread, 0)), at_x(min(x.mean + x.spread, x_high))
                parts.append(f'<path class="whisker" d="M{x0:.1f} {py:.1f}H{x1:.1f}"/>')
            if y.spread and math.isfinite(y.mean):
                y0, y1 = at_y(max(y.mean - y.spread, floor)), at_y(min(y.mean + y.spread, ceiling))
                parts.append(f'<path class="whisker" d="M{px:.1f} {y0:.1f}V{y1:.1f}"/>')
        for (x, y), (px, py) in zip(inside, places):
            title = f"{line.label}: {self.metric.text(y.mean)} at {x.mean:.2f}"
            parts.append(f"<g><title>{escape(title)}</title>{marker(line.index, px, py)}</g>")
        return (
            f'<g class="m{line.index} s{line.index % 8}{" diagnostic" if line.diagnostic else ""}">{"".join(parts)}</g>'
        )

    def _words(self) -> str:
        said = []
        for line in self.lines:
            points = [f"{self.metric.text(y.mean)} at {x.mean:.2f}" for x, y in line.points]
            if points:
                said.append(f"{line.label}: {', '.join(points)}.")
        return " ".join(said)
