"""The page of an architecture search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pfsurgery.report.figures import Axis, Points, bars, chart
from pfsurgery.report.numbers import amount, percent
from pfsurgery.report.page import Chip, Content, Figure, Section, Table
from pfsurgery.report.palette import GREY, MODELS, colors, family
from pfsurgery.report.read import understood
from pfsurgery.report.settings import settings_section
from pfsurgery.run_folder import read_json
from pfsurgery.study.nas import RESULT


def content(folder: Path) -> Content:
    """What is told of an architecture search.

    Raises:
        SurgeryError: A file is missing or damaged.
    """
    values = read_json(folder / RESULT)
    with understood(folder / RESULT):
        return _content(values)


def _content(values: dict[str, Any]) -> Content:
    cells, found = values["cells"], values["found"]
    palette = colors([*values["candidates"], *(cell["chosen"] for cell in cells)])
    models = [{"name": "found", **found}, *values["baselines"]]
    often = max(palette, key=lambda op: sum(family(cell["chosen"]) == op for cell in cells))
    lede = (
        f"The search chose among {len(values['candidates'])} candidates for each of {len(cells)} "
        f"cells; {often} was chosen most often."
    )
    facts = (
        ("top-1", percent(found["top1"])),
        ("MACs", amount(found["macs"], "MACs")),
        ("parameters", amount(found["params"], "")),
        ("latency", amount(found["ms"], "ms")),
    )
    sections = (
        Section("The network", (_cells(values["candidates"], cells, palette),)),
        Section("Found and baselines", (_table(models), _trade_off(models))),
        *([Section("The search", (_history(values["history"]),))] if values["history"] else []),
        Section("The cells", (_chosen(cells, palette),)),
        settings_section(values["setting"], values["paper_setting"]),
    )
    return Content(lede, facts, sections)


def _cells(candidates: list[str], cells: list[dict[str, Any]], palette: dict[str, str]) -> Figure:
    places = [_place(cell) for cell in cells]
    groups = []
    for op in candidates:
        shares = [100 * cell["weights"].get(op, 0.0) for cell in cells]
        hover = [
            [
                f"{op} in {place}",
                f"weight {value:.1f} %",
                f"{cell['kind']} cell, depth {cell['depth']:.2f}",
                f"chosen: {cell['chosen']}",
            ]
            for cell, place, value in zip(cells, places, shares, strict=True)
        ]
        groups.append(Points(op, places, shares, hover, palette[family(op)]))
    figure = bars(groups, Axis("cell (R: reduction)"),
                  Axis("weight of each candidate (%)"), stacked=True)  # fmt: skip
    figure.update_yaxes(range=[0, 100])
    figure.update_xaxes(type="category")
    return Figure(
        "The cells from input (left) to output (right), and what share of each the search gave to "
        "each candidate in the end.",
        figure,
    )


def _place(cell: dict[str, Any]) -> str:
    return f"{cell['cell']} R" if cell["kind"] == "reduction" else str(cell["cell"])


def _history(history: list[dict[str, Any]]) -> Figure:
    curves = [
        Points(
            "",
            [entry["step"] for entry in history],
            [entry[key] for entry in history],
            [[f"step {entry['step']:,}", f"{name} {_text(entry[key])}{unit}"] for entry in history],
            color,
            size=5,
            line=2,
            row=row,
        )
        for row, (key, name, unit, color) in enumerate(
            (("top1", "top-1", " %", MODELS[0]), ("loss", "loss", " nats", MODELS[1]))
        )
    ]
    axes = Axis("top-1 (%)"), Axis("loss (nats)")
    return Figure(
        "Accuracy and loss of the network that holds all candidates, during the search.",
        chart(curves, Axis("steps of the search"), *axes, height=440),
    )


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _trade_off(models: list[dict[str, Any]]) -> Figure:
    groups = [
        Points(
            name,
            [model["macs"] for model in some],
            [model["top1"] for model in some],
            [
                [
                    model["name"],
                    f"top-1 {percent(model['top1'])}",
                    f"{amount(model['macs'], 'MACs')}, {amount(model['params'], '')} parameters",
                    amount(model["ms"], "ms"),
                ]
                for model in some
            ],
            color,
            symbol=symbol,
            size=13,
        )
        for name, some, color, symbol in (
            ("found", models[:1], MODELS[1], "star"),
            ("baselines", models[1:], GREY, "circle"),
        )
        if some
    ]
    plot = chart(groups, Axis("multiply-adds (MACs)", ticks="~s"), Axis("top-1 (%)"), height=360)
    return Figure("Accuracy against multiply-adds; upper left is best.", plot)


def _table(models: list[dict[str, Any]]) -> Table:
    return Table(
        "The network that was found, trained anew, and what it is compared with.",
        ("network", "top-1", "parameters", "MACs", "latency"),
        "lrrrr",
        tuple(
            (
                model["name"],
                percent(model["top1"]),
                amount(model["params"], ""),
                amount(model["macs"], "MACs"),
                amount(model["ms"], "ms"),
            )
            for model in models
        ),
        frozenset({0}),
    )


def _chosen(cells: list[dict[str, Any]], palette: dict[str, str]) -> Table:
    return Table(
        "What each cell became.",
        ("cell", "kind", "depth", "chosen", "its weight"),
        "rlrlr",
        tuple(
            (
                str(cell["cell"]),
                cell["kind"],
                f"{cell['depth']:.2f}",
                Chip(cell["chosen"], palette[family(cell["chosen"])]),
                f"{100 * cell['weights'].get(cell['chosen'], 0.0):.1f} %",
            )
            for cell in cells
        ),
    )
