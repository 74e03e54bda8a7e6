"""Numbers as text, with their units."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

from pfsurgery.measure.table import quantity

NOTHING = "-"


def amount(value: float | None, unit: str) -> str:
    """`4.089 GMACs`, `25.56 M`, `12.35 ms`; `-` for None."""
    if value is None:
        return NOTHING
    return f"-{quantity(-value, unit)}" if value < 0 else quantity(value, unit)


def percent(value: float | None) -> str:
    """`76.13 %`; `-` for None."""
    return NOTHING if value is None else f"{value:.2f} %"


def nats(value: float) -> str:
    """`0.0123 nats`."""
    return f"{value:.3g} nats"


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds: `76.13 ± 0.21 %`."""
    if len(values) < 2:
        return percent(values[0])
    return f"{mean(values):.2f} ± {stdev(values):.2f} %"


def share(after: float, before: float) -> str:
    """A ratio as `54 %`; `-` where there was nothing."""
    return f"{after / before:.0%}".replace("%", " %") if before else NOTHING


def points(after: float | None, before: float | None) -> str:
    """A difference of two percentages: `-1.25 points`."""
    return NOTHING if after is None or before is None else f"{after - before:+.2f} points"
