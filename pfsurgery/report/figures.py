"""The figures that the pages share, as Plotly figures without colours of a theme.

Text goes into Plotly as its own kind of HTML: whatever comes from a run passes through `plain`.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pfsurgery.report.page import library
from pfsurgery.report.palette import family

_WIDE_RANGE = 20


@dataclass(frozen=True, slots=True)
class Points:
    """Points or a line with one entry in the legend.

    Attributes:
        name: In the legend.
        x: Places along the x axis.
        y: Places along the y axis; None leaves a gap.
        hover: Lines of text of each point, its name first; empty for no text.
        color: As CSS; for bars also one each.
        symbol: Plotly's name of the marker.
        size: Of the marker in pixels; 0 for a line alone.
        line: Width of the line in pixels; 0 for points alone.
        dash: Plotly's name of the line's dashes.
        step: Whether the line runs in steps, as a Pareto front does.
        row: Which panel it stands in, counted from 0 at the top.
    """

    name: str
    x: Sequence[float | str]
    y: Sequence[float | None]
    hover: Sequence[Sequence[str]] = ()
    color: str | Sequence[str] = ""
    symbol: str = "circle"
    size: float = 9
    line: float = 0
    dash: str = "solid"
    step: bool = False
    row: int = 0


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis.

    Attributes:
        title: With the unit.
        log: Whether it is logarithmic.
        ticks: Format of its numbers in d3's language: `~s` for 1.2G.
        zero: Whether it begins at 0.
        share: Part of the figure's height that it has, relative to the other panels.
    """

    title: str
    log: bool = False
    ticks: str = ""
    zero: bool = False
    share: float = 1


@dataclass(frozen=True, slots=True)
class Measure:
    """A number of each site, for `strip`.

    Attributes:
        axis: Its axis.
        values: One a site; None where there is none.
        shown: The same, as text with the unit.
    """

    axis: Axis
    values: Sequence[float | None]
    shown: Sequence[str]


def plain(text: str) -> str:
    """Text that Plotly shows as it is."""
    return html.escape(text, quote=False)


def spread_axis(title: str, values: Sequence[float], ticks: str = "") -> Axis:
    """An axis that is logarithmic where the values differ by large factors and none is 0."""
    log = bool(values) and min(values) > 0 and max(values) / min(values) > _WIDE_RANGE
    return Axis(title, log=log, ticks=ticks, zero=not log and bool(values) and min(values) >= 0)


def chart(points: Sequence[Points], x: Axis, *y: Axis, height: int = 400) -> Any:
    """Points and lines in one panel, or in several that share their x axis."""
    go = library("plotly.graph_objects")
    figure = go.Figure()
    for group in points:
        mode = "+".join(["lines"] * bool(group.line) + ["markers"] * bool(group.size))
        figure.add_trace(
            go.Scatter(
                name=plain(group.name),
                legendgroup=plain(group.name),
                showlegend=bool(group.name),
                x=[plain(v) if isinstance(v, str) else v for v in group.x],
                y=list(group.y),
                mode=mode,
                marker={"color": group.color, "symbol": group.symbol, "size": group.size or 6},
                line={
                    "color": group.color,
                    "width": group.line or 1,
                    "dash": group.dash,
                    "shape": "hv" if group.step else "linear",
                },
                **_hover(group.hover),
                **_panel(group.row),
            )
        )
    _lay_out(figure, x, y, height)
    return figure


def bars(
    groups: Sequence[Points], x: Axis, y: Axis, *, height: int = 400, stacked: bool = False
) -> Any:
    """Upright bars: for each category (text) on the x axis, one of each group."""
    go = library("plotly.graph_objects")
    figure = go.Figure([_bar(go, group) for group in groups])
    _lay_out(figure, x, (y,), height)
    figure.update_layout(barmode="stack" if stacked else "group")
    return figure


def lying_bars(
    names: Sequence[str], groups: Sequence[Points], x: Axis, y: Axis, *, row_height: int = 30
) -> Any:
    """Bars that lie, one row for each name, from top to bottom; `x` of a group are its values."""
    go = library("plotly.graph_objects")
    figure = go.Figure(
        [
            go.Bar(
                name=plain(group.name),
                showlegend=bool(group.name),
                orientation="h",
                x=list(group.x),
                y=[plain(name) for name in names],
                marker={"color": group.color},
                **_hover(group.hover),
            )
            for group in groups
        ]
    )
    _lay_out(figure, x, (y,), 130 + row_height * len(names) * max(1, len(groups)))
    figure.update_layout(barmode="group", yaxis={"autorange": "reversed", "type": "category"})
    return figure


def strip(
    names: Sequence[str],
    labels: Sequence[str],
    colors: dict[str, str],
    measures: Sequence[Measure],
) -> Any:
    """The network from input to output: a tile a site in its op's colour, and bars below.

    Args:
        names: Names of the sites, in order of execution.
        labels: What each site became.
        colors: Colours of the labels' families.
        measures: What the bars show, one row each.
    """
    go = library("plotly.graph_objects")
    tiles = Measure(Axis("", share=0.28), [1.0] * len(names), [""] * len(names))
    hover = [
        [f"{i + 1}. {name}", labels[i], *(m.shown[i] for m in measures if m.shown[i])]
        for i, name in enumerate(names)
    ]
    figure = go.Figure()
    for row, measure in enumerate((tiles, *measures)):
        for op in dict.fromkeys(map(family, labels)):
            own = [i for i, label in enumerate(labels) if family(label) == op]
            group = Points(
                op,
                [i + 1 for i in own],
                [measure.values[i] for i in own],
                [hover[i] for i in own],
                colors[op],
                row=row,
            )
            # Plotly would widen the bars of an op whose sites stand far apart.
            figure.add_trace(_bar(go, group, legend=row == 0).update(width=0.88))
    axes = (tiles.axis, *(measure.axis for measure in measures))
    _lay_out(figure, Axis("site, in order of execution (number)"), axes, 150 + 150 * len(measures))
    figure.update_layout(
        barmode="overlay",
        xaxis={"range": [0.4, len(names) + 0.6], "tickformat": "d", "showgrid": False},
        yaxis={"showticklabels": False, "showgrid": False, "fixedrange": True},
    )
    return figure


def _bar(go: Any, group: Points, *, legend: bool = True) -> Any:
    return go.Bar(
        name=plain(group.name),
        legendgroup=plain(group.name),
        showlegend=legend and bool(group.name),
        x=[plain(v) if isinstance(v, str) else v for v in group.x],
        y=list(group.y),
        marker={"color": group.color},
        **_hover(group.hover),
        **_panel(group.row),
    )


def _hover(lines: Sequence[Sequence[str]]) -> dict[str, Any]:
    if not lines:
        return {"hoverinfo": "skip"}
    texts = [
        "<br>".join([f"<b>{plain(first)}</b>", *(plain(line) for line in rest if line)])
        for first, *rest in lines
    ]
    return {"hovertext": texts, "hoverinfo": "text"}


def _panel(row: int) -> dict[str, str]:
    return {"xaxis": "x", "yaxis": "y" if row == 0 else f"y{row + 1}"}


def _lay_out(figure: Any, x: Axis, y: Sequence[Axis], height: int) -> None:
    gap = 0.06 if len(y) > 1 else 0
    whole = (1 - gap * (len(y) - 1)) / sum(axis.share for axis in y)
    axes: dict[str, Any] = {}
    top = 1.0
    for row, axis in enumerate(y):
        bottom = max(0.0, top - axis.share * whole)
        axes["yaxis" if row == 0 else f"yaxis{row + 1}"] = {
            **_axis(axis),
            "domain": [bottom, top],
            "anchor": "x",
        }
        top = bottom - gap
    last = "y" if len(y) == 1 else f"y{len(y)}"
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 8, "r": 12, "t": 12, "b": 8},
        hovermode="closest",
        hoverlabel={"align": "left"},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        xaxis={**_axis(x), "anchor": last},
        **axes,
    )


def _axis(axis: Axis) -> dict[str, Any]:
    return {
        "title": {"text": axis.title, "standoff": 8},
        "type": "log" if axis.log else "-",
        "tickformat": axis.ticks,
        "rangemode": "tozero" if axis.zero else "normal",
        "automargin": True,
        "zeroline": False,
        **({"dtick": 1} if axis.log else {}),
    }
