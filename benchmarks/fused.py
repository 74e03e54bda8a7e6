"""Bottlenecks in one kernel against the convolution that they stand in for, one site at a time.

    python benchmarks/fused.py
    python benchmarks/fused.py --dtype bfloat16 --layout NHWC

Sites of ResNet-50 and of the basic-block network of `recovery.py`, in four forms, at batch 8 and
128, in both layouts: the dense 3x3 (oneDNN, in NHWC with its weights packed once where that is
faster), the bottleneck in one kernel with packed weights, as `optimize` leaves it, and the same as
stock operators. All of a site run in turns in one process. `share` is the bottleneck's
multiply-adds a second over the dense convolution's, counting the products' own alone; `speed` is
the dense convolution's time over the bottleneck's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from machine import describe
from matplotlib.figure import Figure
from timing import times
from torch import Tensor, nn

from pfsurgery.kernels import disabled
from pfsurgery.ops.bottleneck import Bottleneck
from pfsurgery.packed import packed
from pfsurgery.recover.device import typical_structure
from pfsurgery.recover.fit import Form
from pfsurgery.recover.options import Option
from pfsurgery.sites import Geometry
from pfsurgery.structure import Structure

RESULTS = Path(__file__).parent / "results"
SITES = ((64, 56), (128, 28), (256, 14), (512, 7), (64, 16), (96, 8), (128, 4), (256, 2))
LAYOUTS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}
DENSE = "dense 3x3"


def forms(channels: int) -> dict[str, Structure]:
    """The forms of a site; a third of the columns of an unreduced input are averages."""
    geometry = Geometry(channels, channels, (3, 3), padding=(1, 1))
    quarter = channels // 4
    sizes: dict[str, tuple[Form, tuple[int, ...]]] = {
        "columns B=C": ("columns", (channels,)),
        "waist B=2C r=C/4": ("waist", (quarter, 2 * channels)),
        "bottleneck r=C/2": ("bottleneck", (channels // 2,)),
        "thin C/4>C/4": ("thin", (quarter, quarter)),
    }
    return {
        name: typical_structure(Option(form, widths, 0.0, 0.0), geometry)
        for name, (form, widths) in sizes.items()
    }


def site(
    channels: int, size: int, batch: int, layout: str, dtype: torch.dtype, seconds: float
) -> dict[str, object]:
    """Times of one site."""
    geometry = Geometry(channels, channels, (3, 3), padding=(1, 1))
    memory_format = LAYOUTS[layout]
    x = torch.randn(batch, channels, size, size).to(dtype, memory_format=memory_format)
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    conv = conv.to(dtype, memory_format=memory_format)
    once = packed(conv, tuple(x.shape))
    calls: dict[str, Callable[[], object]] = {"stock": lambda: conv(x), "packed": lambda: once(x)}
    macs = {DENSE: 9 * channels * channels}
    for name, structure in forms(channels).items():
        module = Bottleneck(geometry, structure).eval().to(dtype)
        module.freeze()
        calls[name] = lambda module=module: module(x)
        calls[f"{name}, stock"] = lambda module=module: stock(module, x)
        macs[name] = structure.macs_per_position(geometry)
    with torch.inference_mode():
        taken = times(calls, seconds)
    dense = {name: taken.pop(name) for name in ("stock", "packed")}
    taken[DENSE] = min(dense.values(), key=lambda one: one["median_us"])
    rate = {n: m * batch * size * size / taken[n]["median_us"] / 1e3 for n, m in macs.items()}
    return {
        "channels": channels,
        "size": size,
        "batch": batch,
        "layout": layout,
        "times": taken,
        "gmacs_per_second": rate,
        "share": {name: rate[name] / rate[DENSE] for name in macs},
        "speed": {n: taken[DENSE]["median_us"] / t["median_us"] for n, t in taken.items()},
    }


def stock(module: Bottleneck, x: Tensor) -> Tensor:
    with disabled():
        return module(x)


def draw(rows: list[dict[str, object]], path: Path) -> None:
    """Speed of each form against the dense convolution, in one kernel and as stock operators."""
    shown = [row for row in rows if row["layout"] == "NHWC"]
    batches = sorted({row["batch"] for row in shown})
    figure = Figure(figsize=(12, 3.6 * len(batches)), layout="constrained")
    grid = figure.subplots(len(batches), 1, sharex=True, squeeze=False)[:, 0]
    names = list(forms(64))
    for axes, batch in zip(grid, batches, strict=True):
        mine = [row for row in shown if row["batch"] == batch]
        for place, name in enumerate(names):
            at = [i + place / 5 for i in range(len(mine))]
            axes.bar(at, [row["speed"][name] for row in mine], 1 / 5, label=name)
            stocks = [row["speed"][f"{name}, stock"] for row in mine]
            label = "stock operators" if place == 0 else None
            axes.plot(at, stocks, "_", color="black", markersize=12, label=label)
        axes.axhline(1, color="black", linewidth=1)
        axes.set_ylabel("times as fast as the dense 3x3")
        axes.set_title(f"batch {batch}, channels_last")
        axes.grid(axis="y", alpha=0.3)
    ticks = [f"{row['channels']}x{row['size']}x{row['size']}" for row in mine]
    grid[-1].set_xticks([i + 0.3 for i in range(len(mine))], ticks)
    grid[0].legend(fontsize=8, ncols=3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", nargs="+", type=int, default=[8, 128])
    parser.add_argument("--layout", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each site and layout")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = []
    for batch in args.batch:
        for channels, size in SITES:
            for layout in args.layout:
                row = site(channels, size, batch, layout, getattr(torch, args.dtype), args.seconds)
                rows.append(row)
                found = ", ".join(
                    f"{n} {row['speed'][n]:.2f}x ({row['share'][n]:.0%})" for n in forms(channels)
                )
                rate = row["gmacs_per_second"][DENSE]
                print(f"{channels}x{size} b{batch} {layout}, dense {rate:.0f} GMAC/s: {found}")
    path = args.results / f"fused_cpu_{args.dtype}.json"
    result = {"machine": describe("cpu"), "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
