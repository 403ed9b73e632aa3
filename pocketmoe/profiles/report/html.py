"""Markup that escapes whatever is not markup already, so that no name out of a bundle can add to a page."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

_STYLE = Path(__file__).with_name("page.css")


class Markup(str):
    """Text that is HTML or SVG already; only `el` and `join` make it."""

    __slots__ = ()


def el(tag: str, *children: object, **attributes: object) -> Markup:
    """An element. Children that are no markup are escaped, as are attributes; `class_` and `a_b` mean class and a-b."""
    names = ((name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items() if value is not None)
    inside = "".join(f' {name}="{html.escape(_text(value))}"' for name, value in names)
    return Markup(f"<{tag}{inside}>{join(children)}</{tag}>")


def join(children: Iterable[object]) -> Markup:
    """Children one after the other."""
    return Markup("".join(c if isinstance(c, Markup) else html.escape(_text(c)) for c in children))


def table(head: Sequence[object], rows: Iterable[Sequence[object]], faded: Sequence[bool] = ()) -> Markup:
    """A table whose first column names the row; wide ones scroll by themselves, by keyboard too.

    `faded`: by row, whether it is shown in grey.
    """
    return _scrolling(head, el("tbody", *map(_row, rows, faded or itertools.repeat(False))))


def grouped_table(head: Sequence[object], groups: Iterable[tuple[str, Iterable[Sequence[object]]]]) -> Markup:
    """A table whose rows stand in groups, each under its name."""
    return _scrolling(
        head,
        *(
            el("tbody", el("tr", el("th", el("span", name), scope="rowgroup", colspan=len(head))), *map(_row, rows))
            for name, rows in groups
        ),
    )


def _row(cells: Sequence[object], faded: bool = False) -> Markup:
    first = el("th", cells[0], scope="row")
    return el("tr", first, *(el("td", cell) for cell in cells[1:]), class_="loaded" if faded else None)


def _scrolling(head: Sequence[object], *bodies: Markup) -> Markup:
    top = el("tr", *(el("th", cell, scope="col") for cell in head))
    label = "Table: " + ", ".join(_text(cell) for cell in head[:4] if cell)
    inside = el("table", el("thead", top), *bodies)
    return el("div", inside, class_="scroll", tabindex="0", role="region", aria_label=label)


def figure(title: str, chart: Markup, words: str, numbers: Markup) -> Markup:
    """A section with a picture, what it shows, and its table."""
    shown = el("details", el("summary", "The numbers"), numbers)
    return el("section", el("h2", title), el("figure", chart, el("figcaption", words)), shown)


def page(title: str, body: Sequence[Markup]) -> str:
    """A whole document with the style inside and no reference to anything outside."""
    head = el(
        "head",
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        el("title", title),
        Markup(f"<style>{_style()}</style>"),
    )
    return f"<!doctype html>\n{el('html', head, el('body', el('main', *body)), lang='en')}\n"


@cache
def _style() -> str:
    return _STYLE.read_text(encoding="utf-8")


def _text(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)
