"""Draw the README's figure from benchmarks/results/recovery_basic.json.

Run it as `python docs/summary_figure.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results" / "recovery_basic.json"
METHODS = (
    ("budget", "pfsurgery, budget", "#2a7f8e", "o-"),
    ("Torch-Pruning, our refit", "Torch-Pruning with our refit", "#8a4f9e", "s--"),
    ("Torch-Pruning, norms re-estimated", "Torch-Pruning, norms re-estimated", "#b9c2c7", "^--"),
)
BATCH = 8
IMAGES = 2000


def main() -> None:
    """Write docs/images/summary.png."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    figure = Figure(figsize=(8, 3.1), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for method, label, color, style in METHODS:
        fits = _rows(found, "fit", method)
        macs = [100 * fits[b]["mmacs"] / found["base_mmacs"] for b in sorted(fits)]
        top1 = {b: fits[b]["top1"] for b in sorted(fits)}
        left.plot(macs, list(top1.values()), style, color=color, label=label, markersize=4)
        timed = _rows(found, "latency", method)
        shared = [b for b in sorted(timed) if b in top1]
        times = [100 * timed[b]["ratio"] for b in shared]
        right.plot(times, [top1[b] for b in shared], style, color=color, markersize=4)
    for axes, what in ((left, "multiply-adds"), (right, f"measured time, batch of {BATCH}")):
        _finish(axes, what, found["base_top1"])
    left.set_ylabel("top-1 on CIFAR-10, %", fontsize=9)
    left.legend(frameon=False, fontsize=7.5, loc="lower right")
    figure.suptitle(f"{IMAGES:,} unlabelled images, no gradient step", fontsize=10)
    figure.savefig(DOCS / "images" / "summary.png", metadata={"Software": None})


def _rows(found: dict[str, Any], stage: str, method: str) -> dict[float, dict[str, Any]]:
    return {
        row["budget_mmacs"]: row
        for row in found["rows"]
        if (row["stage"], row.get("method")) == (stage, method)
        and row.get("batch", BATCH) == BATCH
        and row.get("images", IMAGES) == IMAGES
        and row.get("dtype", "float32") == "float32"
    }


def _finish(axes: Axes, what: str, original: float) -> None:
    axes.axhline(original, color="#222222", linewidth=0.8, linestyle=":")
    axes.text(1, original + 0.8, f"original {original:.1f} %", fontsize=7.5)
    axes.set_xlabel(f"{what}, % of the original", fontsize=9)
    axes.set_xlim(0, None)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
