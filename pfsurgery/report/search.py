"""The page of a search under a budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pfsurgery.plan import Plan
from pfsurgery.report.figures import Axis, Points, chart, spread_axis
from pfsurgery.report.numbers import NOTHING, amount, nats, percent, points, share
from pfsurgery.report.page import Content, Figure, Item, Note, Section, Table
from pfsurgery.report.palette import GREY
from pfsurgery.report.plan import plan_sections
from pfsurgery.report.read import understood
from pfsurgery.run_folder import read_json
from pfsurgery.study.bench import RESULT

Point = dict[str, Any]
# What can be spent, by the unit of the budget: key of a point, unit of its text, title, ticks.
_COSTS = {
    "macs": ("macs", "MACs", "multiply-adds (MACs)", "~s"),
    "params": ("params", "", "parameters", "~s"),
    "latency": ("ms", "ms", "latency (ms)", ""),
}
_ORIGINS = {
    "budget": ("#2a7f8e", "circle"),
    "sensitivity": ("#3f9b6c", "diamond"),
    "repair": ("#3b5b92", "pentagon"),
    "optuna": ("#c8552f", "square"),
    "random": ("#b07a1e", "x"),
    "policy": ("#8a4f9e", "triangle-up"),
}
_TRUSTED = 0.15


def content(folder: Path) -> Content:
    """What is told of a search.

    Raises:
        SurgeryError: A file is missing or damaged.
    """
    values = read_json(folder / RESULT)
    with understood(folder / RESULT):
        return _content(values)


def _content(values: dict[str, Any]) -> Content:
    unit, original, found = values["unit"], values["original"], values["points"]
    key = _COSTS[unit][0]
    found = sorted(found, key=lambda p: p[key])
    chosen = next((p for p in found if p["chosen"]), None)
    plan = Plan.from_dict(values["plan"])
    sections = [
        Section("Cost and damage", _trade_offs(unit, original, found)),
        *([Section("Before and after", _comparison(original, chosen, values))] if chosen else []),
        *plan_sections(plan),
        Section("All configurations", (_table(original, found),)),
    ]
    lede = f"{len(found)} configurations were compared by {_COSTS[unit][2]} and damage."
    if chosen is None:
        return Content(f"{lede} None was chosen.", (), tuple(sections))
    lede += f" Chosen: {chosen['name']}."
    facts = (
        *([("top-1", percent(chosen["top1"]))] if chosen["top1"] is not None else []),
        ("damage", nats(chosen["damage"])),
        ("MACs left", share(chosen["macs"], original["macs"])),
        ("parameters left", share(chosen["params"], original["params"])),
        ("time left", share(chosen["ms"], original["ms"])),
    )
    return Content(lede, facts, tuple(sections))


def front(found: list[Point], key: str, better: Callable[[Point], float]) -> list[Point]:
    """The points that no other one beats in both cost and `better` (the lower), by cost."""
    kept: list[Point] = []
    for point in sorted(found, key=lambda p: (p[key], better(p))):
        if not kept or better(point) < better(kept[-1]):
            kept.append(point)
    return kept


def _trade_offs(unit: str, original: Point, found: list[Point]) -> tuple[Item, ...]:
    key, _, title, ticks = _COSTS[unit]
    damage = spread_axis("damage (KL divergence, nats)", [p["damage"] for p in found], "~g")
    cost = Axis(title, ticks=ticks)
    limit = [
        min((p["damage"] for p in found), default=0),
        max((p["damage"] for p in found), default=1),
    ]
    figures = [
        Figure(
            "Each configuration by cost and damage; the line is the Pareto front, the ring the one "
            "that was chosen. Lower left is best.",
            chart(
                [
                    _original([original[key]] * 2, limit, original),
                    *_groups(found, key, "damage", lambda p: p["damage"]),
                ],
                cost,
                damage,
                height=460,
            ),
        )
    ]
    known = [p for p in found if p["top1"] is not None]
    if known:
        figures.append(
            Figure(
                "The same by cost and accuracy. Upper left is best.",
                chart(
                    [
                        *_groups(known, key, "top1", lambda p: -p["top1"]),
                        *(
                            [_original([original[key]], [original["top1"]], original)]
                            if original["top1"] is not None
                            else []
                        ),
                    ],
                    cost,
                    Axis("top-1 (%)"),
                    height=420,
                ),
            )
        )
    return tuple(figures)


def _groups(
    found: list[Point], key: str, value: str, better: Callable[[Point], float]
) -> list[Points]:
    def points_of(name: str, some: list[Point], color: str, **looks: Any) -> Points:
        hover = [_hover(p) for p in some]
        return Points(name, [p[key] for p in some], [p[value] for p in some], hover, color, **looks)

    best = front(found, key, better)
    groups = [points_of("Pareto front", best, GREY, size=0, line=2, step=True)]
    for origin in dict.fromkeys(p["origin"] for p in found):
        color, symbol = _ORIGINS.get(origin, (GREY, "circle"))
        some = [p for p in found if p["origin"] == origin]
        groups.append(points_of(origin, some, color, symbol=symbol))
    chosen = [p for p in found if p["chosen"]]
    if chosen:
        groups.append(points_of("chosen", chosen, "#c0567f", symbol="circle-open", size=18))
    return groups


def _original(x: list[float], y: list[float], original: Point) -> Points:
    hover = [["original", *_costs(original)]] * len(x)
    if len(x) == 1:
        return Points("original", x, y, hover, GREY, symbol="star", size=13)
    return Points("original", x, y, hover, GREY, size=0, line=2, dash="dash")


def _hover(point: Point) -> list[str]:
    accuracy = "" if point["top1"] is None else f"top-1 {percent(point['top1'])}"
    return [point["name"], f"damage {nats(point['damage'])}", accuracy, *_costs(point)]


def _costs(point: Point) -> list[str]:
    return [
        f"{amount(point['macs'], 'MACs')}, {amount(point['params'], '')} parameters",
        amount(point["ms"], "ms"),
    ]


def _comparison(original: Point, chosen: Point, values: dict[str, Any]) -> tuple[Item, ...]:
    rows = [
        (
            label,
            amount(original[key], unit),
            amount(chosen[key], unit),
            share(chosen[key], original[key]),
        )
        for label, key, unit in (
            ("Multiply-adds", "macs", "MACs"),
            ("Parameters", "params", ""),
            ("Latency", "ms", "ms"),
        )
    ]
    rows.append(("Damage", nats(0), nats(chosen["damage"]), NOTHING))
    change = points(chosen["top1"], original["top1"])
    rows.append(("Top-1", percent(original["top1"]), percent(chosen["top1"]), change))
    table = Table(
        f"The original and {chosen['name']}.",
        ("", "original", "chosen", "left"),
        "lrrr",
        tuple(rows),
    )
    return table, *_prediction(values["predicted_gain_ms"], values["measured_gain_ms"])


def _prediction(predicted: float | None, measured: float | None) -> list[Note]:
    if predicted is None or measured is None:
        return []
    said = (
        f"The sites were measured one by one to gain {amount(predicted, 'ms')} together; the whole "
        f"model gained {amount(measured, 'ms')}"
    )
    if abs(predicted - measured) <= _TRUSTED * abs(measured):
        return [Note(f"{said}: the sum is within 15 % of what was measured.")]
    return [
        Note(
            f"{said}. The sum is not within 15 % of what was measured: trust the whole model's "
            f"time, not the sum over sites.",
            warning=True,
        )
    ]


def _table(original: Point, found: list[Point]) -> Table:
    rows = [
        (
            p["name"],
            p["origin"],
            amount(p["macs"], "MACs"),
            amount(p["params"], ""),
            amount(p["ms"], "ms"),
            nats(p["damage"]),
            percent(p["top1"]),
        )
        for p in [{**original, "name": "original", "origin": "", "damage": 0.0}, *found]
    ]
    return Table(
        "In the order of their cost; the one that was chosen is set off.",
        ("configuration", "origin", "MACs", "parameters", "latency", "damage", "top-1"),
        "llrrrrr",
        tuple(rows),
        frozenset(number for number, p in enumerate(found, 1) if p["chosen"]),
    )
