"""What was measured, as figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pfsurgery.study.sensitivity import Sensitivity

_INK, _FAINT = "#222222", "#6f6f6f"
_FORMS = ("bottleneck", "columns", "mixed", "thin", "waist")  # fitted ones, told by their widths
_COLORS = ("#2a7f8e", "#c8552f", "#e0a63a", "#8a4f9e", "#5b8c3e", "#3b5b92", "#8c959c", "#b05a7a")
_LEAST = 1e-6  # nats: smaller damages are drawn there


def draw_sensitivity(rows: Sequence[Sensitivity], path: Path) -> None:
    """Write damage against gain, and the least damage by depth, as PNG.

    Left: one point a site and option, the multiply-adds that it saves against its damage. Right: a
    bar a site, in the order of depth: the least damage of an option that saves half of the most
    that any saves there.

    Args:
        rows: What `sensitivity` found.
        path: The PNG file.

    Raises:
        OSError: `path` cannot be written.
    """
    from matplotlib.figure import Figure

    kinds = sorted({_family(row) for row in rows})
    colors = dict(zip(kinds, _COLORS * len(kinds), strict=False))
    sites = list(dict.fromkeys(row.site for row in sorted(rows, key=lambda row: row.depth)))
    figure = Figure(figsize=(10.5, 1.8 + max(2.6, 0.3 * len(sites))), dpi=180)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.06)
    points, bars = figure.subplots(1, 2, gridspec_kw={"width_ratios": (1.5, 1)})
    for kind in kinds:
        mine = [row for row in rows if _family(row) == kind]
        points.plot(
            [row.macs for row in mine],
            [max(row.damage, _LEAST) for row in mine],
            "o",
            markersize=5,
            alpha=0.8,
            color=colors[kind],
            label=kind,
        )
    points.set_yscale("log")
    points.set_xlabel("multiply-adds saved, of one image", fontsize=9, color=_INK)
    points.set_ylabel("damage to the output (nats)", fontsize=9, color=_INK)
    points.legend(fontsize=8, frameon=False)
    best = [_mildest([row for row in rows if row.site == site]) for site in sites]
    bars.barh(
        range(len(sites)),
        [max(row.damage, _LEAST) for row in best],
        color=[colors[_family(row)] for row in best],
        height=0.65,
    )
    bars.set_yticks(range(len(sites)), sites, fontsize=8)
    bars.set_ylim(len(sites) - 0.5, -0.5)
    bars.set_xscale("log")
    bars.set_xlabel("least damage for half of the possible saving (nats)", fontsize=9, color=_INK)
    for axes in (points, bars):
        _calm(axes)
    figure.suptitle("What each change does alone, after its repair", x=0.01, ha="left", fontsize=11)
    figure.savefig(path, format="png", facecolor="white")


def _family(row: Sensitivity) -> str:
    first = row.op.partition(" ")[0]
    return f"fitted: {first}" if first in _FORMS else first


def _mildest(rows: Sequence[Sensitivity]) -> Sensitivity:
    most = max(row.macs for row in rows)
    return min((row for row in rows if row.macs >= most / 2), key=lambda row: row.damage)


def _calm(axes: Any) -> None:
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=_FAINT)
    axes.spines[["top", "right"]].set_visible(False)
