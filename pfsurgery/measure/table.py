"""Numbers with units, and the Rich table that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Group

_WIDTH = 100


@dataclass(frozen=True, slots=True)
class Row:
    """One quantity: its key in the data, its label, and a cell with unit for each column."""

    key: str
    label: str
    cells: tuple[str, ...]


def quantity(value: float, unit: str) -> str:
    """`value` to four digits with its unit: `4.089 GMACs`, `25.56 M`, `12.35 ms`, `102.4 MB`."""
    if unit == "ms":
        return f"{_digits(value)} ms"
    if unit == "bytes":
        return f"{_digits(value / 1e6)} MB"
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{_digits(value / scale)} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def _digits(value: float) -> str:
    whole = len(str(int(value)))
    return f"{value:.{max(0, 4 - whole)}f}"


def rich_table(title: str, columns: Sequence[str], rows: Sequence[Row], notes: list[str]) -> Group:
    """A table with one line a quantity, and notes under it."""
    from rich.console import Group
    from rich.text import Text

    from pfsurgery.tables import add_numbers, titled

    table = titled(title)
    table.add_column("")
    for column in columns:
        add_numbers(table, column)
    for row in rows:
        table.add_row(row.label, *row.cells)
    return Group(table, "", *map(Text, notes))


def text(content: Group) -> str:
    """`content` as plain text, 100 columns wide."""
    from pfsurgery.tables import render

    return render(content, width=_WIDTH)
