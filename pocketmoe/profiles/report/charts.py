"""Pictures as inline SVG: numbers in, markup out. Colours are the page's variables, so that both themes work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pocketmoe.profiles.report.html import Markup, el

WIDTH, HEIGHT = 400, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 20, 12, 40
_TICKS = 5
_LEVELS = 9  # of a heat map


@dataclass(frozen=True)
class Line:
    """A series; `colour` is a class of the page. Dashed: predicted. `band`: x, low and high of a range around it."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    dashed: bool = False
    dots: bool = False
    joined: bool = True
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Mark:
    """A place on a line that is worth a ring and a few words."""

    x: float
    y: float
    words: str


@dataclass(frozen=True)
class Axis:
    """What an axis says, and the least that its end must reach.

    `log`: a step for each power of ten. `end`: where it ends, the last tick being the last that fits.
    """

    title: str
    reach: float = 0.0
    start: float | None = 0.0  # None: a little below the smallest value
    percent: bool = False
    log: bool = False
    end: float | None = None


def line_chart(lines: Sequence[Line], x: Axis, y: Axis, label: str, marks: Sequence[Mark] = ()) -> Markup:
    """Lines over one pair of axes, with a legend. `label` says to a screen reader what it shows."""
    points = [point for line in lines for point in line.points]
    points += [(a, high) for line in lines for a, _, high in line.band]
    across = _Scale([p[0] for p in points], x, _LEFT, WIDTH - _RIGHT)
    up = _Scale([p[1] for p in points], y, HEIGHT - _BOTTOM, _TOP)
    drawn = [_grid(across, up, x, y)]
    for line in (line for line in lines if line.band):
        edge = [(a, high) for a, _, high in line.band] + [(a, low) for a, low, _ in reversed(line.band)]
        outline = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in edge)
        drawn.append(el("polygon", points=outline, class_=f"band {line.colour}"))
    for line in lines:
        at = [(across(a), up(b)) for a, b in line.points]
        if line.joined and len(at) > 1:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in at)
            dash = "5 4" if line.dashed else None
            drawn.append(el("polyline", points=path, class_=f"line {line.colour}", stroke_dasharray=dash))
        if line.dots:
            for (a, b), (value_x, value_y) in zip(at, line.points, strict=True):
                name = f"{line.name}: {_short(value_x, x.percent)}, {_short(value_y, y.percent)}"
                drawn.append(el("circle", el("title", name), cx=f"{a:.1f}", cy=f"{b:.1f}", r=4, class_=line.colour))
    drawn += [_marked(mark, across(mark.x), up(mark.y)) for mark in marks]
    return el("div", _svg(drawn, HEIGHT, label), _legend([(ln.name, ln.colour, ln.dashed) for ln in lines]))


def _marked(mark: Mark, x: float, y: float) -> Markup:
    """A ring, and its words on the side and at the height where there is room for them."""
    left = x > (_LEFT + WIDTH) / 2
    low = y > HEIGHT - _BOTTOM - 30
    at = {"x": f"{x - 8 if left else x + 8:.1f}", "y": f"{y - 8 if low else y + 16:.1f}"}
    ring = el("circle", el("title", mark.words), cx=f"{x:.1f}", cy=f"{y:.1f}", r=6, class_="ring")
    return el("g", ring, el("text", mark.words, **at, class_="end mark" if left else "mark"))


def bar_chart(
    rows: Sequence[tuple[str, Sequence[float]]],
    parts: Sequence[tuple[str, str]],
    axis: Axis,
    label: str,
) -> Markup:
    """Lying bars, each of some parts; `parts`: name and colour of each."""
    pitch = max(30.0, min(44.0, (HEIGHT - _TOP - _BOTTOM) / len(rows)))  # few bars fill a card as a chart does
    height = _TOP + pitch * len(rows) + _BOTTOM
    left = min(165.0, max([_LEFT, *(14 + 6.8 * len(name) for name, _ in rows)]))
    sums = [sum(values) for _, values in rows]
    right = WIDTH - _RIGHT
    across = _LogScale(sums, left, right) if axis.log else _Scale(sums, axis, left, right)
    drawn: list[Markup] = []
    for tick in across.ticks:
        x = f"{across(tick):.1f}"
        drawn.append(el("line", x1=x, x2=x, y1=_TOP, y2=height - _BOTTOM, class_="grid"))
        drawn.append(el("text", _short(tick, axis.percent), x=x, y=height - _BOTTOM + 15, class_="middle"))
    for place, (name, values) in enumerate(rows):
        y, start = _TOP + pitch * place + (pitch - 22) / 2, across.ticks[0]
        drawn.append(
            el("text", name if len(name) < 23 else f"{name[:21]}…", x=left - 6, y=f"{y + 15:.1f}", class_="end")
        )
        for (part, colour), value in zip(parts, values, strict=True):
            wide = across(value if axis.log else start + value) - across(start) if value > 0 else 0.0
            title = el("title", f"{name}, {part}: {_short(value, axis.percent)}")
            if wide > 0:
                drawn.append(
                    el(
                        "rect",
                        title,
                        x=f"{across(start):.1f}",
                        y=f"{y:.1f}",
                        width=f"{wide:.1f}",
                        height=22,
                        class_=colour,
                    )
                )
            start += 0.0 if axis.log else value
    drawn.append(el("text", axis.title, x=(left + WIDTH) / 2, y=height - 6, class_="middle"))
    legend = _legend([(name, colour, False) for name, colour in parts]) if len(parts) > 1 else ""
    return el("div", _svg(drawn, height, label), legend)


def heat_map(
    rows: Sequence[Sequence[float]], x_title: str, y_title: str, label: str, key: Sequence[tuple[float, str]] = ()
) -> Markup:
    """A cell for each value between 0 and 1, a row for each sequence; one path for each shade keeps it small.

    `key`: what some of the values mean, below it.
    """
    columns = max(map(len, rows))
    cell = min(30.0, max(2.0, 198 / len(rows)))
    height = _TOP + cell * len(rows) + _BOTTOM
    wide = (WIDTH - _LEFT - _RIGHT) / columns
    shades: list[list[str]] = [[] for _ in range(_LEVELS)]
    for r, row in enumerate(rows):
        for c, value in enumerate(row):
            level = min(_LEVELS - 1, int(value * _LEVELS))
            shades[level].append(f"M{_LEFT + c * wide:.2f} {_TOP + r * cell:.2f}h{wide:.2f}v{cell:.2f}h-{wide:.2f}z")
    drawn = [
        el("path", d="".join(paths), class_="heat", fill_opacity=_opacity(level))
        for level, paths in enumerate(shades)
        if paths
    ]
    bottom = height - _BOTTOM
    drawn += [
        el("text", "0", x=_LEFT, y=bottom + 14, class_="middle"),
        el("text", columns - 1, x=WIDTH - _RIGHT, y=bottom + 14, class_="end"),
        el("text", x_title, x=(_LEFT + WIDTH) / 2, y=height - 6, class_="middle"),
        el("text", "0", x=_LEFT - 6, y=_TOP + 10, class_="end"),
        el("text", len(rows) - 1, x=_LEFT - 6, y=bottom, class_="end"),
        _upright(y_title, (_TOP + bottom) / 2),
    ]
    for place, (value, name) in enumerate(key):
        level = min(_LEVELS - 1, int(value * _LEVELS))
        y = height + 18 * place + 4
        drawn.append(el("rect", x=_LEFT, y=y, width=12, height=12, class_="heat", fill_opacity=_opacity(level)))
        drawn.append(el("text", name, x=_LEFT + 18, y=y + 10))
    return el("div", _svg(drawn, height + 18 * len(key), label))


def _opacity(level: int) -> str:
    return f"{0.04 + 0.96 * level / (_LEVELS - 1):.2f}"


class _Scale:
    """From values to places, and where to put ticks."""

    def __init__(self, values: Sequence[float], axis: Axis, start: float, end: float) -> None:
        low = min(values) if axis.start is None else axis.start
        high = max([axis.reach, *values])
        step = _nice((high - low) / (_TICKS - 1) or 1.0)
        first = math.floor(low / step) if axis.start is None else round(low / step)
        last = max(first + 1, math.ceil(high / step - 1e-9))  # two at least, where all values are the same
        self.ticks = [step * n for n in range(first, last + 1)]
        self._low, self._high = self.ticks[0], self.ticks[-1]
        if axis.end is not None:
            self.ticks, self._high = [tick for tick in self.ticks if tick <= axis.end], axis.end
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        return self._start + (self._end - self._start) * (value - self._low) / (self._high - self._low)


class _LogScale:
    """A step for each power of ten, from below the least value that is there; for bars of one part each."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        known = [value for value in values if value > 0] or [1.0]
        first, last = math.floor(math.log10(min(known)) - 0.1), math.ceil(math.log10(max(known)))
        last = max(first + 1, last)
        step = -(-(last - first) // 6)
        self.ticks = [10.0**n for n in range(first, last + step, step)]
        self._low, self._high = math.log10(self.ticks[0]), math.log10(self.ticks[-1])
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        return self._start + (self._end - self._start) * (math.log10(value) - self._low) / (self._high - self._low)


def far_apart(values: Sequence[float]) -> bool:
    """Whether the largest is a hundred times the smallest or more: a straight axis would hide the small ones."""
    known = [value for value in values if value > 0]
    return bool(known) and max(known) >= 100 * min(known)


def _nice(step: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    power = 10 ** math.floor(math.log10(step))
    return next(n * power for n in (1, 2, 2.5, 5, 10) if n * power >= step * 0.999)


def _grid(across: _Scale, up: _Scale, x: Axis, y: Axis) -> Markup:
    drawn: list[Markup] = []
    for tick in up.ticks:
        place = f"{up(tick):.1f}"
        drawn.append(el("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=place, y2=place, class_="grid"))
        drawn.append(el("text", _short(tick, y.percent), x=_LEFT - 6, y=f"{up(tick) + 4:.1f}", class_="end"))
    bottom = HEIGHT - _BOTTOM + 16
    drawn += [
        el("text", _short(tick, x.percent), x=f"{across(tick):.1f}", y=bottom, class_="middle") for tick in across.ticks
    ]
    drawn.append(el("text", x.title, x=(_LEFT + WIDTH) / 2, y=HEIGHT - 6, class_="middle"))
    drawn.append(_upright(y.title, (_TOP + HEIGHT - _BOTTOM) / 2))
    return el("g", *drawn)


def _upright(text: str, y: float) -> Markup:
    return el("text", text, transform=f"translate(11 {y:.0f}) rotate(-90)", class_="middle")


def _svg(drawn: Sequence[Markup], height: float, label: str) -> Markup:
    return el("svg", *drawn, viewBox=f"0 0 {WIDTH} {height:.0f}", role="img", aria_label=label)


def _legend(entries: Sequence[tuple[str, str, bool]]) -> Markup:
    """Names beside their colours, once each."""
    keys = [
        el("li", el("span", "", class_=f"key {colour}{' dashed' if dashed else ''}"), name)
        for name, colour, dashed in dict.fromkeys(entries)
    ]
    return el("ul", *keys, class_="legend")


def _short(value: float, percent: bool = False) -> str:
    if percent:
        return f"{100 * value:.0f}%"
    return f"{value:.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.3g}"
