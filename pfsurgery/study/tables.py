"""Rich tables of what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from pfsurgery.study.bench import Found
from pfsurgery.study.sensitivity import Sensitivity
from pfsurgery.tables import amount


def sensitivity_table(rows: Sequence[Sensitivity]) -> Table:
    """One row a site and option, in the order given."""
    table = Table(title="Each site changed alone, and repaired", title_justify="left")
    table.add_column("site", overflow="fold")
    table.add_column("becomes", overflow="fold")
    for column in ("damage (nats)", "top-1", "MACs saved", "params saved", "ms saved"):
        table.add_column(column, justify="right")
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
    table = Table(title=f"Search: {found.plan.policy}", title_justify="left")
    table.add_column("network")
    for column in ("damage (nats)", "top-1", "MACs", "params", "ms"):
        table.add_column(column, justify="right")
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
