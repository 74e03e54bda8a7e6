"""Rich tables of what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from pfsurgery.study.bench import Found
from pfsurgery.study.sensitivity import Sensitivity
from pfsurgery.tables import add_numbers, add_whole, amount, titled


def sensitivity_table(rows: Sequence[Sensitivity]) -> Table:
    """One row a site and option, in the order given."""
    table = titled("Each site changed alone, and repaired")
    add_whole(table, "site")
    table.add_column("becomes", overflow="fold")
    for column in ("damage\n(nats)", "top-1", "MACs\nsaved", "params\nsaved", "ms\nsaved"):
        add_numbers(table, column)
    for row in rows:
        table.add_row(
            row.site,
            row.op,
            f"{row.damage:.5f}",
            "" if row.top1 is None else f"{row.top1:.2f} %",
            amount(row.macs),
            amount(row.params),
            f"{row.ms:+.3f}",
        )
    return table


def found_table(found: Found) -> Table:
    """One row a network of the search, the original first."""
    table = titled(f"Search: {found.plan.policy}")
    table.add_column("network")
    for column in ("damage (nats)", "top-1", "MACs", "params", "ms"):
        add_numbers(table, column)
    for point in (found.original, *found.points):
        table.add_row(
            f"{point.name} (chosen)" if point.chosen else point.name,
            f"{point.damage:.4f}",
            "" if point.top1 is None else f"{point.top1:.2f} %",
            amount(point.macs),
            amount(point.params),
            f"{point.ms:.3g}",
            style="bold" if point.chosen else None,
        )
    return table
