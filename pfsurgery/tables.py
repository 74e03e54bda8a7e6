"""Rich tables of sites and plans."""

from __future__ import annotations

from collections.abc import Iterable
from io import StringIO
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.style import StyleType
from rich.table import Table
from rich.text import Text

from pfsurgery.sites import Site

if TYPE_CHECKING:
    from pfsurgery.job import Step
    from pfsurgery.plan import Plan
    from pfsurgery.recover import Refit

_ERROR = "error: share of the original output's variance that is lost; 0 is exact, 1 a constant"
_HIDDEN = "where a ReLU alone reads it, less what that hides"


def render(what: RenderableType, width: int = 140) -> str:
    """A Rich renderable as plain text, at most `width` columns wide."""
    text = StringIO()
    # Rich would rather draw into the notebook that it runs in than write to the file.
    Console(file=text, width=width, color_system=None, force_jupyter=False).print(what)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def amount(number: float) -> str:
    """A count in short form: 1,234 as `1.23 k`, 4089184256 as `4.09 G`."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.2f} {prefix}"
    return f"{number:g}"


class _PlainTable(Table):
    """Its cells are what they say: a name or a reason may hold what Rich takes for markup."""

    def add_row(
        self,
        *cells: RenderableType | None,
        style: StyleType | None = None,
        end_section: bool = False,
    ) -> None:
        plain = (Text(cell) if isinstance(cell, str) else cell for cell in cells)
        super().add_row(*plain, style=style, end_section=end_section)


def titled(title: str, note: str | None = None, *, totals: bool = False) -> Table:
    """An empty table with few lines, so that much fits on a narrow terminal.

    Args:
        title: What stands above it.
        note: What stands below it.
        totals: Whether its last row holds totals, the footers of the columns.
    """
    return _PlainTable(
        title=Text(title, style="bold"),
        title_justify="left",
        caption=note,
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        show_footer=totals,
    )


def add_whole(table: Table, header: str, total: str = "") -> None:
    """A column of names, which are never broken: a reader can copy them."""
    table.add_column(header, total, no_wrap=True, overflow="fold")


def add_numbers(table: Table, header: str, total: str = "") -> None:
    """A column of numbers with their units."""
    table.add_column(header, total, justify="right", no_wrap=True)


def site_table(sites: Iterable[Site]) -> Table:
    """One row a site: what it is and what stands around it."""
    table = titled("Sites")
    for column in ("site", "kind"):
        add_whole(table, column)
    table.add_column("geometry", overflow="fold", min_width=9)
    for column in ("input", "stage", "MACs"):
        add_numbers(table, column)
    table.add_column("notes", overflow="fold")
    for site in sites:
        after = site.neighbours.pointwise_after
        notes = [
            "stem" if site.stem else "",
            "output" if site.output else "",
            f"called {site.calls} times" if site.calls > 1 else "",
            site.blocked or "",
            "between pointwise" if site.bottleneck else "",
            f"before {_as_seen_from(site.name, after)}" if after and not site.bottleneck else "",
        ]
        table.add_row(
            site.name,
            site.kind,
            str(site.geometry),
            "x".join(map(str, site.input_shape[-3:])),
            str(site.stage),
            amount(site.macs),
            "; ".join(note for note in notes if note),
        )
    return table


def _as_seen_from(name: str, text: str) -> str:
    """`text` with the modules beside the one called `name` told by their own names alone."""
    parent = name.rpartition(".")[0]
    return text.replace(f"{parent}.", "") if parent else text


def plan_table(plan: Plan) -> Table:
    """One row a site: what it becomes, why, and what that saves."""
    table = titled(
        f"Plan of policy {plan.policy}: {len(plan.replaced)} of {len(plan)} sites change",
        totals=True,
    )
    parameters = sum(d.parameters_saved for d in plan)
    macs = sum(d.macs_saved for d in plan)
    add_whole(table, "site", "total")
    for column in ("kind", "geometry", "becomes"):
        table.add_column(column, overflow="fold")
    add_numbers(table, "params\nsaved", amount(parameters))
    add_numbers(table, "MACs\nsaved", amount(macs))
    table.add_column("reason", overflow="fold")
    for d in plan:
        dropped = " (tail dropped)" if d.tail == "drop" and d.replaced else ""
        table.add_row(
            d.site.name,
            d.site.kind,
            str(d.site.geometry),
            f"{d.label}{dropped}",
            amount(d.parameters_saved) if d.replaced else "-",
            amount(d.macs_saved) if d.replaced else "-",
            _as_seen_from(d.site.name, d.reason),
            style=None if d.replaced else "dim",
        )
    return table


def fit_table(plan: Plan) -> Table:
    """One row a site that was fitted to images: its bottleneck, what is left of it, its error."""
    fitted = [(d, d.structure) for d in plan if d.structure is not None]
    before = sum(d.site.macs for d, _ in fitted)
    after = before - sum(d.macs_saved for d, _ in fitted)
    note = f"{_ERROR}; {_HIDDEN}"
    table = titled(
        f"Policy {plan.policy}: {len(fitted)} of {len(plan)} sites fitted", note, totals=True
    )
    add_whole(table, "site", "total")
    table.add_column("channels")
    table.add_column("form")
    for column in ("reduce", "columns", "waist"):
        add_numbers(table, column)
    add_numbers(table, "MACs\nbefore", amount(before))
    add_numbers(table, "after", amount(after))
    add_numbers(table, "error")
    for d, structure in fitted:
        geometry = d.site.geometry
        table.add_row(
            d.site.name,
            f"{geometry.in_channels} to {geometry.out_channels}",
            structure.form,
            str(structure.reduce or "-"),
            "dense" if structure.dense else str(structure.columns),
            str(structure.waist or "-"),
            amount(d.site.macs),
            amount(d.site.macs - d.macs_saved),
            f"{structure.error:.4f}",
        )
    return table


def refit_table(refits: Iterable[Refit]) -> Table:
    """One row a site: the layer that was solved again, and its error before and after."""
    refits = tuple(refits)
    done = [refit for refit in refits if refit.layer is not None]
    note = f"{_ERROR}; after, {_HIDDEN}"
    table = titled(f"Refitted layers: {len(done)} of {len(refits)}", note, totals=True)
    add_whole(table, "site", "total")
    table.add_column("layer", overflow="fold")
    add_numbers(table, "error\nbefore")
    add_numbers(table, "after")
    add_numbers(table, "seconds", f"{sum(refit.seconds for refit in done):.1f}")
    for refit in refits:
        if refit.layer is None:
            table.add_row(refit.site, f"none: {refit.reason}", "-", "-", "-", style="dim")
            continue
        before, after = (f"{error:.4f}" for error in (refit.before, refit.after))
        table.add_row(refit.site, refit.layer, before, after, f"{refit.seconds:.1f}")
    return table


def step_table(steps: Iterable[Step]) -> Table:
    """One row a step of the main job: accuracy after it, and what it took."""
    table = titled("Accuracy after each step")
    table.add_column("step")
    for column in ("top-1", "of the original", "loss", "seconds"):
        add_numbers(table, column)
    steps = tuple(steps)
    for step in steps:
        difference = step.accuracy.top1 - steps[0].accuracy.top1
        table.add_row(
            step.name,
            f"{step.accuracy.top1:.2f} %",
            "" if step is steps[0] else f"{difference:+.2f} points",
            f"{step.accuracy.loss:.3f}",
            "" if step is steps[0] else f"{step.seconds:.1f}",
        )
    return table
