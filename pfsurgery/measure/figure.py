"""The comparison as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

from pfsurgery.measure.table import Row

_LESS, _MORE, _SAME, _INK, _FAINT = "#2a7f8e", "#c8552f", "#8c959c", "#222222", "#6f6f6f"


def draw(
    rows: Sequence[Row], ratios: Mapping[str, float], verdict: str, setting: str, path: Path
) -> None:
    """Write horizontal bars of after / before, with the values on them, as PNG.

    Args:
        rows: One bar each, from top to bottom; cells are before, after and their ratio.
        ratios: After / before by the rows' keys; rows without one are left out.
        verdict: What to write above.
        setting: What to write below.
        path: The PNG file.

    Raises:
        OSError: `path` cannot be written.
    """
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.key in ratios]
    values = [ratios[row.key] for row in shown]
    places = list(range(len(shown)))
    limit = max(1.0, *values) * 1.02
    figure = Figure(figsize=(8.4, 1.9 + 0.46 * len(shown)), dpi=200)
    figure.set_layout_engine("constrained", w_pad=0.14, h_pad=0.08)
    axes = figure.add_subplot()
    colors = [ratio_color(value) for value in values]
    axes.barh(places, values, height=0.62, color=colors, zorder=2)
    axes.axvline(1, color=_INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for place, row, value in zip(places, shown, values, strict=True):
        before, after = (cell.partition(" (")[0] for cell in row.cells[:2])
        axes.text(limit * 1.03, place, f"{before} → {after}", va="center", fontsize=9, color=_INK)
        inside = value > 0.12 * limit
        axes.text(
            value - 0.012 * limit if inside else value + 0.012 * limit,
            place,
            f"{value:.2f}",
            va="center",
            ha="right" if inside else "left",
            fontsize=9,
            fontweight="bold",
            color="white" if inside else _INK,
            zorder=4,
        )
    axes.text(limit * 1.03, -0.72, "before → after", va="center", fontsize=9, color=_FAINT)
    axes.set_yticks(places, [row.label for row in shown], fontsize=10, color=_INK)
    axes.set_ylim(len(shown) - 0.5, -0.95)
    axes.set_xlim(0, limit)
    axes.set_xlabel("after / before (1 = unchanged)", fontsize=9, color=_INK)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8, colors=_FAINT)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.8)
    axes.spines[:].set_visible(False)
    figure.suptitle(fill(verdict, 78), x=0.01, ha="left", fontsize=11, color=_INK)
    figure.supxlabel(fill(setting, 110), x=0.01, ha="left", fontsize=7.5, color=_FAINT)
    figure.savefig(path, format="png", facecolor="white")


def ratio_color(ratio: float) -> str:
    """Of a bar that shows after / before: less, more, or the same."""
    if abs(ratio - 1) < 0.005:
        return _SAME
    return _LESS if ratio < 1 else _MORE
