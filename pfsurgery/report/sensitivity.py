"""The page of a sensitivity study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pfsurgery.recover.logs import read_lines
from pfsurgery.report.figures import Axis, Measure, Points, chart, spread_axis, strip
from pfsurgery.report.numbers import amount, nats, percent
from pfsurgery.report.page import Chip, Content, Figure, Section, Table
from pfsurgery.report.palette import colors, family
from pfsurgery.report.read import understood
from pfsurgery.study.sensitivity import LINES

Record = dict[str, Any]


def content(folder: Path) -> Content:
    """What is told of a sensitivity study.

    Raises:
        SurgeryError: A file is missing or damaged.
    """
    records = read_lines(folder / LINES)
    with understood(folder / LINES):
        return _content(sorted(records, key=lambda r: r["depth"]))


def _content(records: list[Record]) -> Content:
    if not records:
        return Content("The study has not tried anything yet.", (), ())
    palette = colors(r["op"] for r in records)
    sites = list(dict.fromkeys(r["site"] for r in records))
    least, most = (f(records, key=lambda r: r["damage"]) for f in (min, max))
    calls = {(r["site"], r["seconds"]) for r in records}  # rows of one call share its time
    lede = (
        f"Each op was put at each site alone, and repaired; the damage is how far the outputs are "
        f"from the original's. Most: {most['op']} at {most['site']}. Least: {least['op']} at "
        f"{least['site']}."
    )
    facts = (
        ("sites", str(len(sites))),
        ("ops and forms", str(len({r["op"] for r in records}))),
        ("least damage", nats(least["damage"])),
        ("most damage", nats(most["damage"])),
        ("time taken", f"{sum(seconds for _, seconds in calls):,.0f} s"),
    )
    damage = spread_axis("damage (KL divergence, nats)", [r["damage"] for r in records], "~g")
    groups = {op: [r for r in records if family(r["op"]) == op] for op in palette}
    by_depth = chart(
        [_points(op, found, "depth", palette[op]) for op, found in groups.items()],
        Axis("depth (0: input, 1: output)"),
        damage,
    )
    by_gain = [
        Figure(
            f"What each replacement costs and gains{said}. Best is the lower right corner.",
            chart(
                [_points(op, found, key, palette[op]) for op, found in groups.items()],
                Axis(title, ticks="~s" if key == "macs" else ""),
                damage,
            ),
        )
        for key, title, said in (
            ("macs", "multiply-adds saved (MACs)", " in multiply-adds"),
            ("ms", "latency saved (ms)", " in measured time"),
        )
    ]
    return Content(
        lede,
        facts,
        (
            Section("The network", (_network(records, sites, palette),)),
            Section(
                "Damage by depth",
                (Figure("One point a site and op, coloured by op.", by_depth),),
            ),
            Section("Cost and gain", tuple(by_gain)),
            Section("All replacements", (_table(records, palette),)),
        ),
    )


def _network(records: list[Record], sites: list[str], palette: dict[str, str]) -> Figure:
    """The op of each site that does least damage."""
    best = [min((r for r in records if r["site"] == s), key=lambda r: r["damage"]) for s in sites]
    measures = [
        Measure(
            spread_axis("damage (nats)", [r["damage"] for r in best], "~g"),
            [r["damage"] for r in best],
            [f"damage {nats(r['damage'])}" for r in best],
        ),
        Measure(
            Axis("MACs saved", ticks="~s"),
            [r["macs"] for r in best],
            [f"saves {amount(r['macs'], 'MACs')}" for r in best],
        ),
        Measure(
            Axis("time saved (ms)"),
            [r["ms"] for r in best],
            [f"saves {amount(r['ms'], 'ms')}" for r in best],
        ),
    ]
    return Figure(
        "The sites from input (left) to output (right), coloured by the op that does least damage "
        "there. Below, its damage, and the multiply-adds and the time that it saves.",
        strip(sites, [r["op"] for r in best], palette, measures),
    )


def _points(op: str, records: list[Record], key: str, color: str) -> Points:
    return Points(
        op,
        [r[key] for r in records],
        [r["damage"] for r in records],
        [
            [
                r["site"],
                r["op"],
                f"damage {nats(r['damage'])}",
                "" if r["top1"] is None else f"top-1 {percent(r['top1'])}",
                f"saves {amount(r['macs'], 'MACs')}, {amount(r['ms'], 'ms')}",
            ]
            for r in records
        ],
        color,
    )


def _table(records: list[Record], palette: dict[str, str]) -> Table:
    return Table(
        "Sites from input to output; what is saved is that of the whole model.",
        (
            *("site", "was", "op", "damage", "top-1", "MACs saved", "parameters saved"),
            *("time saved", "seconds"),
        ),
        "cllrrrrrr",
        tuple(
            (
                r["site"],
                r["kind"],
                Chip(r["op"], palette[family(r["op"])]),
                nats(r["damage"]),
                percent(r["top1"]),
                amount(r["macs"], "MACs"),
                amount(r["params"], ""),
                amount(r["ms"], "ms"),
                f"{r['seconds']:.1f} s",
            )
            for r in records
        ),
    )
