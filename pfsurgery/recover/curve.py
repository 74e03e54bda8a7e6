"""How accuracy came back, as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pfsurgery.recover.config import FinetuneResult

_CURVE, _LOSS, _INK, _FAINT = "#2a7f8e", "#c8552f", "#222222", "#6f6f6f"


def draw_curve(result: FinetuneResult, path: Path) -> None:
    """Write top-1 against steps with the teacher's as a line, and the loss below it, as PNG.

    Raises:
        OSError: `path` cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = [entry.step for entry in result.history]
    points = [(entry.step, entry.val.top1) for entry in result.history if entry.val is not None]
    figure = Figure(figsize=(8.4, 5.2 if points else 2.8), dpi=200)
    figure.set_layout_engine("constrained", w_pad=0.14, h_pad=0.08)
    shape = {"height_ratios": (2, 1)} if points else {}
    axes = figure.subplots(2 if points else 1, 1, sharex=True, squeeze=False, gridspec_kw=shape)
    below = axes[-1][0]
    below.plot(steps, [entry.loss for entry in result.history], "o-", color=_LOSS, markersize=3)
    below.set_ylabel("training loss (nats)", fontsize=9, color=_INK)
    below.set_xlabel("steps of the optimiser", fontsize=9, color=_INK)
    if points:
        above = axes[0][0]
        above.plot(*zip(*points, strict=True), "o-", color=_CURVE, markersize=4, label="converted")
        if result.teacher is not None:
            above.axhline(
                result.teacher.top1,
                color=_INK,
                linewidth=1,
                linestyle=(0, (4, 3)),
                label=f"original ({result.teacher.top1:.2f} %)",
            )
        above.set_ylabel("top-1 on validation images (%)", fontsize=9, color=_INK)
        above.legend(loc="lower right", fontsize=9, frameon=False)
    for row in axes:
        row[0].grid(color="#e4e4e4", linewidth=0.8)
        row[0].set_axisbelow(True)
        row[0].tick_params(labelsize=8, colors=_FAINT)
        row[0].spines[["top", "right"]].set_visible(False)
        row[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(_title(result), x=0.01, ha="left", fontsize=11, color=_INK)
    figure.savefig(path, format="png", facecolor="white")


def _title(result: FinetuneResult) -> str:
    took = f"{result.steps:,} steps, {result.seconds:,.0f} s"
    if result.last is None:
        return f"Fine-tuned in {took}"
    if result.teacher is None:
        return f"{result.last.top1:.2f} % after {took}"
    best = result.best.top1 if result.best is not None else result.last.top1
    at_best = f" ({best:.2f} % at best)" if best > result.last.top1 else ""
    points = best - result.teacher.top1
    where = "below" if points < 0 else "above"
    return (
        f"{result.last.top1:.2f} % after {took}{at_best}: "
        f"{abs(points):.2f} points {where} the original"
    )
