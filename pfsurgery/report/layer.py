"""The page of a layer-level study."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pfsurgery.report.figures import Axis, Points, bars, chart
from pfsurgery.report.numbers import amount, percent, spread
from pfsurgery.report.page import Chip, Content, Figure, Section, Table
from pfsurgery.report.palette import colors, family
from pfsurgery.report.read import understood
from pfsurgery.report.settings import settings_section
from pfsurgery.run_folder import read_json
from pfsurgery.study.layer import RESULT

Row = dict[str, Any]


def content(folder: Path) -> Content:
    """What is told of a layer-level study.

    Raises:
        SurgeryError: A file is missing or damaged.
    """
    values = read_json(folder / RESULT)
    with understood(folder / RESULT):
        return _content(values)


def _content(values: dict[str, Any]) -> Content:
    rows: list[Row] = values["rows"]
    setting = settings_section(values["setting"], values["paper_setting"])
    if not rows:
        return Content("The study has not trained anything yet.", (), (setting,))
    palette = colors(row["op"] for row in rows)
    best = max(rows, key=lambda row: mean(row["top1"]))
    seeds = max(len(row["top1"]) for row in rows)
    places = list(dict.fromkeys(row["place"] for row in rows))
    lede = (
        f"One network was trained with each op at each place. The highest accuracy is that of "
        f"{best['op']} at {best['place']}."
    )
    facts = (
        ("places", str(len(places))),
        ("ops", str(len(palette))),
        ("seeds", str(seeds)),
        ("highest top-1", spread(best["top1"])),
    )
    trade_offs = tuple(
        Figure(f"Accuracy against {said}; upper left is best.", _against(rows, palette, key, axis))
        for key, axis, said in (
            ("macs", Axis("multiply-adds (MACs)", ticks="~s"), "multiply-adds"),
            ("ms", Axis("latency (ms)"), "measured time"),
        )
    )
    sections = (
        Section("Accuracy", (_accuracy(rows, palette, seeds),)),
        Section("Accuracy and cost", trade_offs),
        Section("All networks", (_table(rows, palette),)),
        setting,
    )
    return Content(lede, facts, sections)


def _accuracy(rows: list[Row], palette: dict[str, str], seeds: int) -> Figure:
    groups, deviations = [], []
    for op, color in palette.items():
        own = [row for row in rows if family(row["op"]) == op]
        top1 = [mean(row["top1"]) for row in own]
        groups.append(
            Points(op, [row["place"] for row in own], top1, list(map(_hover, own)), color)
        )
        deviations.append([stdev(row["top1"]) if len(row["top1"]) > 1 else 0.0 for row in own])
    figure = bars(groups, Axis("place in the network"), Axis("top-1 (%)"), height=420)
    said = "Mean top-1 of each op at each place."
    if seeds > 1:
        for trace, deviation in zip(figure.data, deviations, strict=True):
            trace.update(error_y={"array": deviation, "thickness": 1.4, "width": 3})
        said += " Whiskers are one standard deviation over the seeds."
    low = min(mean(row["top1"]) for row in rows)
    high = max(max(row["top1"]) for row in rows)
    figure.update_yaxes(range=[max(0.0, low - 0.6 * (high - low) - 1), high + 1])
    return Figure(f"{said} The axis does not begin at 0.", figure)


def _against(rows: list[Row], palette: dict[str, str], key: str, axis: Axis) -> Any:
    groups = []
    for op, color in palette.items():
        own = [row for row in rows if family(row["op"]) == op]
        top1 = [mean(row["top1"]) for row in own]
        groups.append(Points(op, [row[key] for row in own], top1, list(map(_hover, own)), color))
    return chart(groups, axis, Axis("mean top-1 (%)"))


def _hover(row: Row) -> list[str]:
    return [
        f"{row['op']} at {row['place']}",
        f"top-1 {spread(row['top1'])}",
        f"{amount(row['macs'], 'MACs')}, {amount(row['params'], '')} parameters",
        amount(row["ms"], "ms"),
    ]


def _table(rows: list[Row], palette: dict[str, str]) -> Table:
    return Table(
        "Top-1 is mean and standard deviation over the seeds.",
        ("place", "op", "top-1", "each seed", "parameters", "MACs", "latency"),
        "llrrrrr",
        tuple(
            (
                row["place"],
                Chip(row["op"], palette[family(row["op"])]),
                spread(row["top1"]),
                ", ".join(percent(top1).removesuffix(" %") for top1 in row["top1"]),
                amount(row["params"], ""),
                amount(row["macs"], "MACs"),
                amount(row["ms"], "ms"),
            )
            for row in rows
        ),
    )
