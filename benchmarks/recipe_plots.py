"""Small plots of curves for docs/recipes/: one SVG per job, a panel per curve, the same bytes for the same numbers.

A panel shows means of neighbouring steps as a line and the spread between them as a band; a curve of few points keeps
its points. The colours are readable on light and dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 360, 150
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 26, 24
"""Space around the curve in a panel, in pixels."""
COLUMNS = 2
MAX_POINTS = 100
"""Longest line; longer curves are averaged over as many groups of neighbouring steps."""
COLOURS = {"student": "#3b82f6", "critic": "#f97316", "discriminator": "#a855f7"}
OTHER = "#10b981"

Curve = tuple[Sequence[int], Sequence[float | None]]


def svg(curves: Mapping[str, Curve]) -> str:
    """An SVG with a panel for each curve that has a finite value."""
    drawable = {name: _finite(curve) for name, curve in curves.items()}
    panels = [_panel(name, curve) for name, curve in drawable.items() if curve[0]]
    rows = -(-len(panels) // COLUMNS)
    width, height = WIDTH * min(COLUMNS, len(panels)), HEIGHT * rows
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11" fill="#808080">'
    )
    placed = [
        f'<g transform="translate({index % COLUMNS * WIDTH} {index // COLUMNS * HEIGHT})">{panel}</g>'
        for index, panel in enumerate(panels)
    ]
    return "\n".join([head, *placed, "</svg>", ""])


def _panel(name: str, curve: tuple[list[int], list[float]]) -> str:
    groups = list(_groups(*curve))
    first, last = curve[0][0], curve[0][-1]
    low, high = min(group[1] for group in groups), max(group[3] for group in groups)
    if low == high:
        low, high = low - 0.5, high + 0.5

    def at(step: float, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / max(1, last - first)
        y = TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)
        return f"{x:.1f},{y:.1f}"

    colour = next((colour for role, colour in COLOURS.items() if role in name), OTHER)
    line = " ".join(at(step, mean) for step, _, mean, _ in groups)
    band = [at(step, top) for step, _, _, top in groups] + [at(step, bottom) for step, bottom, _, _ in groups[::-1]]
    dots = [f'<circle cx="{x}" cy="{y}" r="2.5"/>' for x, y in (point.split(",") for point in line.split())]
    box = f'x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"'
    parts = [
        f'<text x="{LEFT}" y="16" font-weight="bold">{escape(name)}</text>',
        f'<rect {box} fill="none" stroke="#808080" stroke-opacity="0.4"/>',
        f'<text x="{LEFT - 6}" y="{TOP + 10}" text-anchor="end">{high:.3g}</text>',
        f'<text x="{LEFT - 6}" y="{HEIGHT - BOTTOM}" text-anchor="end">{low:.3g}</text>',
        f'<text x="{LEFT}" y="{HEIGHT - 8}">step {first}</text>',
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{last}</text>',
        f'<polygon points="{" ".join(band)}" fill="{colour}" fill-opacity="0.2"/>',
        f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>',
        *([f'<g fill="{colour}">{"".join(dots)}</g>'] if len(groups) <= COLUMNS * 10 else []),
    ]
    return "".join(parts)


def _groups(steps: Sequence[int], values: Sequence[float]) -> Iterator[tuple[float, float, float, float]]:
    """Middle step, smallest value, mean and largest value of each group of neighbouring steps."""
    size = -(-len(steps) // MAX_POINTS)
    for start in range(0, len(steps), size):
        of_group = values[start : start + size]
        middle = steps[start : start + size]
        yield sum(middle) / len(middle), min(of_group), sum(of_group) / len(of_group), max(of_group)


def _finite(curve: Curve) -> tuple[list[int], list[float]]:
    points = [(step, value) for step, value in zip(*curve, strict=True) if value is not None and math.isfinite(value)]
    return [step for step, _ in points], [value for _, value in points]
