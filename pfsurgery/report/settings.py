"""What a study was done with, beside what the paper did."""

from __future__ import annotations

from typing import Any

from pfsurgery.report.numbers import NOTHING
from pfsurgery.report.page import Section, Table


def settings_section(setting: dict[str, Any], paper: dict[str, Any] | None = None) -> Section:
    """One row a setting; with `paper`, its own next to ours."""
    names = dict.fromkeys([*setting, *(paper or {})])
    if paper is None:
        rows = tuple((name, str(setting[name])) for name in names)
        table = Table("What was done.", ("setting", "here"), "lt", rows)
    else:
        table = Table(
            "What was done here, and what the paper did; the numbers are to be read with that.",
            ("setting", "here", "paper"),
            "ltt",
            tuple(
                (name, str(setting.get(name, NOTHING)), str(paper.get(name, NOTHING)))
                for name in names
            ),
        )
    return Section("Setting", (table,))
