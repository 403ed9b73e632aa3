"""A line plot as an SVG file, written by hand: no library is needed, and a diff of two plots can be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log2, log10
from pathlib import Path

_WIDTH, _HEIGHT = 680, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 40, 84
_COLOURS = ("#1f5fa8", "#c2571a", "#2b7a3d", "#7a3d8f")


@dataclass(frozen=True)
class Line:
    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Plot:
    """`doubling`: each step along x is twice the one before. `markers`: for lines of few points."""

    title: str
    x_name: str
    y_name: str
    lines: Sequence[Line]
    doubling: bool = False
    markers: bool = False


def write_svg(path: Path, plot: Plot) -> None:
    """Write the plot; the y axis starts at 0."""
    xs = [x for line in plot.lines for x in line.x]
    y_ticks = _ticks(max(y for line in plot.lines for y in line.y))
    x_ticks = sorted(set(xs)) if plot.doubling else _ticks(max(xs))
    along = log2 if plot.doubling else float
    x_low, x_high = along(min(x_ticks)), along(max(x_ticks))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (along(x) - x_low) / ((x_high - x_low) or 1)
        up = y / y_ticks[-1]
        return (
            round(_LEFT + across * (_WIDTH - _LEFT - _RIGHT), 1),
            round(_HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM), 1),
        )

    parts = [_text(_WIDTH / 2, 22, plot.title, "middle", 15)]
    for tick in y_ticks:
        x, y = place(min(x_ticks), tick)
        parts.append(f'<path d="M{x} {y}H{_WIDTH - _RIGHT}" stroke="#ddd"/>')
        parts.append(_text(x - 8, y + 4, f"{tick:g}", "end"))
    for tick in x_ticks:
        x, y = place(tick, 0)
        parts.append(f'<path d="M{x} {y}v5" stroke="#555"/>')
        parts.append(_text(x, y + 19, f"{tick:g}", "middle"))
    parts.append(_text(_WIDTH / 2, _HEIGHT - 46, plot.x_name, "middle"))
    parts.append(f'<g transform="rotate(-90 16 {_HEIGHT / 2})">{_text(16, _HEIGHT / 2, plot.y_name, "middle")}</g>')
    for number, line in enumerate(plot.lines):
        parts += _drawn(line, [place(x, y) for x, y in zip(line.x, line.y, strict=True)], number, plot.markers)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif">'
    background = f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>'
    path.write_text("\n".join([head, background, *parts, "</svg>"]) + "\n", encoding="utf-8")


def _drawn(line: Line, points: Sequence[tuple[float, float]], number: int, markers: bool) -> list[str]:
    colour = _COLOURS[number % len(_COLOURS)]
    path = "M" + "L".join(f"{x} {y}" for x, y in points)
    parts = [f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
    if markers:
        parts += [f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>' for x, y in points]
    left = _LEFT + number * 200
    parts.append(f'<path d="M{left} {_HEIGHT - 20}h24" stroke="{colour}" stroke-width="3"/>')
    return [*parts, _text(left + 32, _HEIGHT - 16, line.name, "start")]


def _text(x: float, y: float, text: str, anchor: str, size: int = 12) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _ticks(highest: float) -> list[float]:
    """0 to at least the highest, in 3 to 6 round steps."""
    size = 10 ** floor(log10(highest))
    step = next(size * part for part in (0.2, 0.5, 1, 2) if highest / (size * part) <= 6)
    return [step * number for number in range(ceil(highest / step) + 1)]
