"""The columns of a report, told once: a terminal shows the brief ones, a page all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from pocketmoe.profiles.report.html import Markup, grouped_table, table

Row = TypeVar("Row")


@dataclass(frozen=True)
class Column(Generic[Row]):
    """What a column is called, what of a row stands in it, and whether a narrow table has it too."""

    title: str
    cell: Callable[[Row], str]
    brief: bool = True


def as_text(columns: Sequence[Column[Row]], rows: Iterable[Row]) -> list[str]:
    """Lines with the brief columns, aligned to the right."""
    shown = [column for column in columns if column.brief]
    return aligned([[column.title for column in shown], *([column.cell(row) for column in shown] for row in rows)])


def as_markup(
    columns: Sequence[Column[Row]], rows: Iterable[Row], faded: Callable[[Row], bool] = lambda _: False
) -> Markup:
    """A table with all columns, the first of which names the row; rows that are `faded` are shown in grey."""
    rows = [*rows]
    shown = [[column.cell(row) for column in columns] for row in rows]
    return table([column.title for column in columns], shown, faded=[faded(row) for row in rows])


def varying(
    columns: Sequence[Column[Row]], rows: Sequence[Row], kept: int = 2
) -> tuple[list[Column[Row]], list[tuple[str, str]]]:
    """The first columns and those that tell rows apart; and of the others the title and what stands in all rows."""
    told: list[Column[Row]] = []
    same: list[tuple[str, str]] = []
    for place, column in enumerate(columns):
        cells = {column.cell(row) for row in rows}
        if place < kept or len(rows) < 2 or len(cells) > 1:
            told.append(column)
        else:
            same.append((column.title, cells.pop()))
    return told, same


def as_grouped_markup(columns: Sequence[Column[Row]], groups: Iterable[tuple[str, Iterable[Row]]]) -> Markup:
    """A table with all columns whose rows stand in named groups."""
    return grouped_table(
        [column.title for column in columns],
        ((name, [[column.cell(row) for column in columns] for row in rows]) for name, rows in groups),
    )


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equally many cells as lines, each column as wide as its widest cell."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
