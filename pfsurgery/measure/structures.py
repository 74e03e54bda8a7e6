"""Fitted sites as a figure: what stands in the place of each convolution, by depth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pfsurgery.errors import PolicyError
from pfsurgery.structure import Run, Structure

if TYPE_CHECKING:
    from pfsurgery.plan import Decision, Plan

COLORS = {
    "identity": "#b9c2c7",
    "shift": "#2a7f8e",
    "average": "#e0a63a",
    "maximum": "#8a4f9e",
    "dense convolution": "#c8552f",
}
_INK, _FAINT = "#222222", "#6f6f6f"
_REDUCE, _WAIST = "#2a7f8e", "#c8552f"


def draw_structures(plan: Plan, path: str | Path) -> None:
    """Write a figure of the sites that were fitted to images, as PNG: one row a site, by depth.

    Four panels: the share of each operation among the columns; columns for each channel that they
    are taken from; widths of reduction and waist as shares of the channels that the convolution
    reads and gives; and relative error, with the share of the convolution's multiply-adds left.

    Args:
        plan: What `record(model).plans` of a fitted model holds.
        path: The PNG file.

    Raises:
        PolicyError: No site of the plan was fitted.
        OSError: `path` cannot be written.
    """
    from matplotlib.figure import Figure

    fitted = [(d, d.structure) for d in plan if d.structure is not None]
    if not fitted:
        raise PolicyError(
            f"Nothing to draw: policy {plan.policy} fitted no site to images; "
            f"convert with pfsurgery.budget(...)."
        )
    figure = Figure(figsize=(10.5, 1.75 + 0.3 * len(fitted)), dpi=180)
    figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.05)
    shares, columns, widths, errors = figure.subplots(
        1, 4, sharey=True, gridspec_kw={"width_ratios": (3, 1.2, 1.6, 1.9)}
    )
    _draw_shares(shares, fitted)
    _draw_columns(columns, [_columns_per_channel(d, s) for d, s in fitted])
    _draw_widths(widths, fitted)
    _draw_errors(errors, fitted)
    names = [f"{d.site.name}  {structure.form}" for d, structure in fitted]
    shares.set_yticks(range(len(fitted)), names, fontsize=8.5)
    shares.set_ylim(len(fitted) - 0.5, -0.5)
    for axes in (shares, columns, widths, errors):
        axes.tick_params(axis="y", length=0, labelcolor=_INK)
        axes.tick_params(axis="x", labelsize=7.5, colors=_FAINT)
        axes.spines[:].set_visible(False)
        axes.set_axisbelow(True)
    for axes in (columns, widths, errors):
        axes.grid(axis="x", color="#e4e4e4", linewidth=0.8)
    title = f"{plan.policy}: {len(fitted)} of {len(plan)} sites fitted, from input to output"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=_INK)
    figure.savefig(path, format="png", facecolor="white")


def operation_shares(decision: Decision) -> dict[str, float]:
    """Share of each operation among a fitted site's columns; the shares sum to 1.

    The centre tap is the channel itself, `identity`; other taps are shifts. In the dense forms the
    middle is no parameter-free operation: `dense convolution` has all of it.

    Args:
        decision: What a fitted site became.
    """
    structure = decision.structure
    shares = dict.fromkeys(COLORS, 0.0)
    if structure is None or structure.dense:
        return {**shares, "dense convolution": 1.0}
    for run in structure.runs:
        name = _name(run, decision.site.geometry.kernel_size)
        shares[name] += len(run.channels) / structure.columns
    return shares


def _name(run: Run, kernel: tuple[int, ...]) -> str:
    if run.kind != "tap":
        return run.kind
    return "identity" if (2 * run.top + 1, 2 * run.left + 1) == kernel else "shift"


def _columns_per_channel(decision: Decision, structure: Structure) -> float:
    read = structure.reduce or decision.site.geometry.in_channels
    height, width = decision.site.geometry.kernel_size
    return float(height * width) if structure.dense else structure.columns / read


def _draw_shares(axes: Any, fitted: list[tuple[Decision, Structure]]) -> None:
    shares = [operation_shares(d) for d, _ in fitted]
    left = [0.0] * len(fitted)
    for name, color in COLORS.items():
        widths = [share[name] for share in shares]
        if not any(widths):
            continue
        axes.barh(range(len(fitted)), widths, 0.7, left, color=color, label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_xlim(0, 1)
    axes.set_xticks((0, 0.5, 1), ("0", "50", "100 %"))
    _legend(axes)
    axes.set_xlabel("operations (share of the columns)", fontsize=8.5, color=_INK)


def _draw_columns(axes: Any, columns: list[float]) -> None:
    axes.barh(range(len(columns)), columns, 0.7, color="#8c959c")
    for place, number in enumerate(columns):
        axes.text(number, place, f" {number:.2g}", va="center", fontsize=7.5, color=_INK)
    axes.set_xlim(0, 1.3 * max(columns))
    axes.set_xlabel("columns a channel", fontsize=8.5, color=_INK)


def _draw_widths(axes: Any, fitted: list[tuple[Decision, Structure]]) -> None:
    rows = [(place, d.site.geometry, s) for place, (d, s) in enumerate(fitted)]
    reduce = [(s.reduce / g.in_channels, place) for place, g, s in rows if s.reduce]
    waist = [(s.waist / g.out_channels, place) for place, g, s in rows if s.waist]
    if reduce:
        axes.scatter(
            *zip(*reduce, strict=True),
            s=52,
            facecolor="none",
            edgecolor=_REDUCE,
            linewidth=1.8,
            label="reduce",
            zorder=3,
        )
    if waist:
        axes.scatter(*zip(*waist, strict=True), s=20, color=_WAIST, label="waist", zorder=3)
    axes.set_xlim(0, max(1.0, axes.get_xlim()[1]))
    if reduce or waist:
        _legend(axes)
    axes.set_xlabel("width / channels", fontsize=8.5, color=_INK)


def _draw_errors(axes: Any, fitted: list[tuple[Decision, Structure]]) -> None:
    errors = [structure.error for _, structure in fitted]
    most = max(*errors, 1e-6)
    axes.barh(range(len(fitted)), errors, 0.7, color="#3b4a54")
    for place, (decision, structure) in enumerate(fitted):
        left = 1 - decision.macs_saved / max(decision.site.macs, 1)
        text = f" {structure.error:.3f} at {left:.0%}"
        axes.text(structure.error, place, text, va="center", fontsize=7.5, color=_INK)
    axes.set_xlim(0, 2.1 * most)
    axes.set_xlabel("relative error, at MACs left", fontsize=8.5, color=_INK)


def _legend(axes: Any) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(COLORS),
        fontsize=7.5,
        frameon=False,
        handlelength=1,
        columnspacing=1,
        borderaxespad=0.2,
        labelcolor=_INK,
    )
