"""Figures of the recovery benchmark, and a table of its best rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, Any]
STYLES = {
    "budget": ("#2a7f8e", "o", "-"),
    "budget, thin=False": ("#2a7f8e", "s", "--"),
    "budget, pointwise=True": ("#174a54", "P", "-"),
    "data-aware Tucker-2": ("#e0a63a", "D", "-"),
    "data-aware low rank": ("#b9822a", "v", "--"),
    "Torch-Pruning, our refit": ("#8a4f9e", "^", "-"),
    "Torch-Pruning, norms re-estimated": ("#8a4f9e", "<", "--"),
    "budget's plan, not fitted": ("#8c959c", "x", ":"),
    "max-pool, merely converted": ("#c8552f", "X", ":"),
    "max-pool, reconstructed": ("#c8552f", "*", "-"),
    "bare": ("#222222", "h", "-"),
}
_NUMBER = 2000
_LOST = 22  # points; what has lost more lies below the panels that compare close methods


def draw(content: dict[str, Any], stem: Path) -> None:
    """Write the figures that the rows allow, as PNG beside the JSON, and print the accuracies.

    Args:
        content: What the benchmark wrote.
        stem: Path of the figures up to their endings.
    """
    rows = content["rows"]
    steps = sorted({0} | {row["steps"] for row in rows if row["stage"] == "distil"})
    table = {
        (method, budget, count): found
        for method in STYLES
        for budget in {row["budget_mmacs"] for row in rows if "budget_mmacs" in row}
        for count in steps
        if (found := best(rows, method, budget, count)) is not None
    }
    for (method, budget, count), row in sorted(table.items(), key=lambda item: str(item[0])):
        print(f"{method:36s} {budget} after {count:4d}: {row['top1']:.2f} % {row['mmacs']:.2f}")
    rivals = {n: {name for name, _, count in table if count == n} for n in steps}
    compared = [n for n in steps if n == 0 or {"budget", "data-aware Tucker-2"} <= rivals[n]]
    _macs_figure(content, table, compared, stem.with_suffix(".png"))
    for dtype in ("float32", "bfloat16"):
        timed = [r for r in rows if r["stage"] == "latency" and r["dtype"] == dtype]
        if timed:
            word = "latency" if dtype == "float32" else f"latency_{dtype}"
            _latency_figure(content, table, timed, stem.with_name(f"{stem.name}_{word}.png"))
    for row in (row for row in rows if row["stage"] == "asked"):
        print(
            f"batch {row['batch']}: {row['share']} % of the time asked, {row['ratio']:.1%} "
            f"measured, {row['top1']:.2f} % at {row['mmacs']:.1f} MMACs"
        )
    swept = [r for r in rows if r["stage"] == "fit" and r["images"] != _NUMBER]
    if swept:
        _images_figure(content, swept, stem.with_name(f"{stem.name}_images.png"))
    if len(steps) > 1:
        _steps_figure(content, table, steps, stem.with_name(f"{stem.name}_steps.png"))


def best(rows: Sequence[Row], method: str, budget: float | None, steps: int) -> Row | None:
    """The row of a method after so many steps, at its own best rate."""
    if steps == 0:
        mine = [r for r in rows if r["stage"] == "fit" and r["images"] == _NUMBER]
    else:
        mine = [r for r in rows if r["stage"] == "distil" and r["steps"] == steps]
    mine = [r for r in mine if (r["method"], r["budget_mmacs"]) == (method, budget)]
    return max(mine, key=lambda row: row["top1"], default=None)


def _macs_figure(
    content: dict[str, Any], table: dict[Any, Row], steps: Sequence[int], path: Path
) -> None:
    figure = Figure(figsize=(max(6.4, 5.2 * len(steps)), 4.8), layout="constrained")
    panels = figure.subplots(1, len(steps), sharex=True, sharey=True, squeeze=False)[0]
    for axes, number in zip(panels, steps, strict=True):
        for method in STYLES:
            points = [
                (row["mmacs"], row["top1"])
                for (name, _, count), row in table.items()
                if (name, count) == (method, number)
            ]
            _line(axes, method, points + (_stripped(content, method) if number == 0 else []))
        title = "no gradient step" if number == 0 else f"after {number} steps, best of the rates"
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("multiply-adds of one image (MMACs)")
        _original(axes, content)
    if len(steps) > 1:
        _close(panels[0], content)
    panels[0].set_ylabel("CIFAR-10 top-1 (%)")
    panels[0].legend(frameon=False, fontsize=8)
    size = 12 if len(steps) > 1 else 9
    figure.suptitle(_title(content), x=0.01, ha="left", fontsize=size)
    figure.savefig(path, dpi=160)


def _stripped(content: dict[str, Any], method: str) -> list[tuple[float, float]]:
    """Cost and accuracy of a method at some of the sites, from the stage `bare`."""
    found = {
        "bare": "top1",
        "max-pool, reconstructed": "top1_max_pool_refitted",
        "max-pool, merely converted": "top1_after_surgery",
    }
    rows = [row for row in content["rows"] if row["stage"] == "bare" and method in found]
    return [(row["mmacs"], row[found[method]]) for row in rows]


def _latency_figure(
    content: dict[str, Any], table: dict[Any, Row], timed: Sequence[Row], path: Path
) -> None:
    batches = sorted({row["batch"] for row in timed})
    figure = Figure(figsize=(5.6 * len(batches), 4.8), layout="constrained")
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for axes, batch in zip(panels, batches, strict=True):
        for method in STYLES:
            points = [
                (row["ratio"], table[method, row["budget_mmacs"], 0]["top1"])
                for row in timed
                if (row["method"], row["batch"]) == (method, batch)
                and (method, row["budget_mmacs"], 0) in table
            ]
            _line(axes, method, points)
        asked = [
            (row["ratio"], row["top1"])
            for row in content["rows"]
            if (row["stage"], row.get("batch")) == ("asked", batch)
            and timed[0]["dtype"] == "float32"
        ]
        if asked:
            ratios, top1 = zip(*sorted(asked), strict=True)
            label = "budget(latency=...)"
            axes.plot(ratios, top1, color="#d1495b", marker="*", markersize=9, label=label)
        axes.axvline(1, color="gray", linestyle=":", linewidth=1)
        axes.set_title(
            f"batch {batch}, {timed[0]['dtype']}, no gradient step", loc="left", fontsize=10
        )
        axes.set_xlabel("latency / the original's")
        _original(axes, content)
    _close(panels[0], content)
    panels[0].set_ylabel("CIFAR-10 top-1 (%)")
    panels[-1].legend(frameon=False, fontsize=8)
    figure.suptitle(_title(content), x=0.01, ha="left")
    figure.savefig(path, dpi=160)


def _images_figure(content: dict[str, Any], swept: Sequence[Row], path: Path) -> None:
    figure = Figure(figsize=(6, 4.4), layout="constrained")
    axes = figure.subplots()
    budget = swept[0]["budget_mmacs"]
    for method in STYLES:
        points = [
            (row["images"], row["top1"])
            for row in content["rows"]
            if row["stage"] == "fit" and (row["method"], row["budget_mmacs"]) == (method, budget)
        ]
        if len(points) > 1:
            _line(axes, method, points)
    axes.set_xscale("log")
    ticks = sorted({row["images"] for row in content["rows"] if row["stage"] == "fit"})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("unlabelled images")
    axes.set_ylabel("CIFAR-10 top-1 (%)")
    original = f"original {content['base_top1']:.2f} % at {content['base_mmacs']:.1f} MMACs"
    axes.set_title(f"{content['net']}: {original}, budget {budget} MMACs", loc="left", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=160)


def _steps_figure(
    content: dict[str, Any], table: dict[Any, Row], steps: Sequence[int], path: Path
) -> None:
    budgets = sorted({budget for _, budget, _ in table if budget is not None}, reverse=True)
    figure = Figure(figsize=(4.6 * len(budgets), 4.6), layout="constrained")
    panels = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
    for axes, budget in zip(panels, budgets, strict=True):
        for method in STYLES:
            found = [(place, table.get((method, budget, n))) for place, n in enumerate(steps)]
            found = [pair for pair in found if pair[1] is not None]
            found = found or [
                (place, table[method, None, n])
                for place, n in enumerate(steps)
                if budget == _nearest(budgets, table, method) and (method, None, n) in table
            ]
            _line(axes, method, [(place, row["top1"]) for place, row in found])
        axes.set_xticks(range(len(steps)), [f"{n:,}" for n in steps])
        axes.set_title(f"{budget:g} MMACs", loc="left", fontsize=10)
        axes.set_xlabel("steps of distillation")
        _original(axes, content)
    _close(panels[0], content)
    panels[0].set_ylabel("CIFAR-10 top-1 (%)")
    found = [panel.get_legend_handles_labels() for panel in panels]
    named = {name: line for lines, names in found for name, line in zip(names, lines, strict=True)}
    panels[-1].legend(named.values(), named.keys(), frameon=False, fontsize=8)
    figure.suptitle(_title(content), x=0.01, ha="left")
    figure.savefig(path, dpi=160)


def _nearest(budgets: Sequence[float], table: dict[Any, Row], method: str) -> float | None:
    """The budget whose panel shows a method that has none of its own: the closest in cost."""
    own = table.get((method, None, 0))
    return None if own is None else min(budgets, key=lambda budget: abs(budget - own["mmacs"]))


def _line(axes: Axes, method: str, points: Sequence[tuple[float, float]]) -> None:
    if points:
        color, marker, style = STYLES[method]
        across, up = zip(*sorted(points), strict=True)
        axes.plot(across, up, color=color, marker=marker, linestyle=style, label=method)


def _close(axes: Axes, content: dict[str, Any]) -> None:
    axes.set_ylim(content["base_top1"] - _LOST, content["base_top1"] + 1)


def _original(axes: Axes, content: dict[str, Any]) -> None:
    axes.axhline(content["base_top1"], color="gray", linestyle="--", linewidth=1)
    axes.grid(alpha=0.3)


def _title(content: dict[str, Any]) -> str:
    return (
        f"{content['net']}: original {content['base_top1']:.2f} % at "
        f"{content['base_mmacs']:.1f} MMACs (dashed), {_NUMBER:,} unlabelled images"
    )
