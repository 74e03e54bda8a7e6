"""Kernels against their rivals and a plain copy, one operation at a time.

    python benchmarks/kernels.py

The four shapes of ResNet-50's bottlenecks, kernel 3, stride 1 (and 2 for the first). Rivals: ATen,
oneDNN's depthwise convolution, the dense convolution, and `torch.compile` of the stock calls. All
of a shape run in turns in one process; the times are medians with the interquartile range. The
result file is what this script writes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from machine import describe
from matplotlib.figure import Figure
from timing import times
from torch import Tensor, nn
from torch.nn import functional as F

from pfsurgery.kernels import disabled, explain
from pfsurgery.ops.blur import Blur
from pfsurgery.ops.pool import AvgPool, MaxPool
from pfsurgery.ops.shift import Shift
from pfsurgery.ops.window import Window

RESULTS = Path(__file__).parent / "results"
SHAPES = ((64, 56), (128, 28), (256, 14), (512, 7))
LAYOUTS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}
SAME = Window((3, 3), (1, 1), (1, 1))
DOWN = Window((3, 3), (2, 2), (1, 1))


def forward(x: Tensor, compiled: bool, seconds: float) -> dict[str, dict[str, float]]:
    """Inference at stride 1."""
    channels = x.shape[1]
    thin = torch.randn(channels, 1, 3, 3, dtype=x.dtype, device=x.device)
    dense = torch.randn(channels, channels, 3, 3, dtype=x.dtype, device=x.device)
    last = x.stride(1) == 1
    dense = dense.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    calls: dict[str, Callable[[], object]] = {
        "clone": x.clone,
        "max_pool": lambda: MaxPool(SAME)(x),
        "avg_pool": lambda: AvgPool(SAME)(x),
        "blur": lambda: blur(x),
        "shift": lambda: shift(x),
        "ATen max_pool2d": lambda: F.max_pool2d(x, 3, 1, 1),
        "ATen avg_pool2d": lambda: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
        "blur, stock calls": lambda: stock(blur, x),
        "shift, stock calls": lambda: stock(shift, x),
        "depthwise 3x3": lambda: F.conv2d(x, thin, padding=1, groups=channels),
        "dense 3x3": lambda: F.conv2d(x, dense, padding=1),
        "max_pool stride 2": lambda: down(x),
        "ATen max_pool2d stride 2": lambda: F.max_pool2d(x, 3, 2, 1),
    }
    blur, shift, down = Blur(SAME).to(x.device), Shift(SAME, channels), MaxPool(DOWN)
    if compiled:
        torch.compiler.reset()
        pool = torch.compile(lambda t: F.max_pool2d(t, 3, 1, 1))
        calls["torch.compile max_pool2d"] = lambda: pool(x)
    with torch.inference_mode():
        return times(calls, seconds)


def stock(op: nn.Module, x: Tensor) -> object:
    with disabled():
        return op(x)


def training(x: Tensor, seconds: float) -> dict[str, dict[str, float]]:
    """Forward and backward of a max-pool at stride 1."""
    gradient = torch.randn_like(x)
    leaf = x.clone().requires_grad_()

    def step(stock: bool) -> None:
        pool = MaxPool(SAME)
        if stock:
            with disabled():
                made = pool(leaf)
        else:
            made = pool(leaf)
        torch.autograd.grad(made, leaf, gradient)

    return times({"max_pool": lambda: step(False), "ATen": lambda: step(True)}, seconds)


def first_call() -> dict[str, float]:
    """Seconds of the first call, compiling and from the cache, in processes of their own."""
    code = (
        "import time, torch\n"
        "from pfsurgery.ops.pool import MaxPool\nfrom pfsurgery.ops.window import Window\n"
        "pool = MaxPool(Window((3, 3), (1, 1), (1, 1)))\n"
        "x = torch.randn(8, 64, 14, 14){}\n"
        "start = time.perf_counter(); pool(x); print(time.perf_counter() - start)"
    )
    import os
    import tempfile

    found = {}
    for layout, suffix in (("NHWC", ".to(memory_format=torch.channels_last)"), ("NCHW", "")):
        with tempfile.TemporaryDirectory() as cache:
            for name in ("compiled", "cached"):
                done = subprocess.run(
                    [sys.executable, "-c", code.format(suffix)],
                    env={**os.environ, "NUMBA_CACHE_DIR": cache},
                    capture_output=True,
                    text=True,
                    check=True,
                )
                found[f"{layout} {name}"] = float(done.stdout)
    return found


def draw(rows: list[dict[str, object]], path: Path) -> None:
    """Times of the forward pass as multiples of a plain copy's."""
    names = [
        "max_pool",
        "avg_pool",
        "blur",
        "shift",
        "ATen max_pool2d",
        "depthwise 3x3",
        "dense 3x3",
    ]
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, layout in zip(figure.subplots(1, 2, sharey=True), LAYOUTS, strict=True):
        mine = [row for row in rows if row["layout"] == layout and row["pass"] == "forward"]
        for place, name in enumerate(names):
            taken = [{key: t["median_us"] for key, t in row["times"].items()} for row in mine]
            ratios = [t[name] / t["clone"] for t in taken]
            axes.bar([i + place / 8 for i in range(len(mine))], ratios, 1 / 8, label=name)
        axes.set_xticks([i + 3 / 8 for i in range(len(mine))], [row["shape"] for row in mine])
        axes.set_yscale("log")
        axes.set_title(layout)
        axes.grid(axis="y", alpha=0.3)
    figure.axes[0].set_ylabel("time / time of x.clone()")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each shape and layout")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    for channels, size in SHAPES:
        for layout, memory_format in LAYOUTS.items():
            x = torch.randn(args.batch, channels, size, size, device=args.device)
            x = x.to(getattr(torch, args.dtype)).contiguous(memory_format=memory_format)
            shape = f"{channels}x{size}x{size}"
            for name, taken in (
                ("forward", forward(x, args.compile, args.seconds)),
                ("forward and backward", training(x, args.seconds)),
            ):
                rows.append(
                    {
                        "shape": shape,
                        "layout": layout,
                        "pass": name,
                        "path": explain(x),
                        "times": taken,
                    }
                )
                line = ", ".join(f"{key} {value['median_us']:.0f}" for key, value in taken.items())
                print(f"{shape} {layout} {name}, us: {line}", flush=True)
    result = {
        "machine": describe(args.device),
        "dtype": args.dtype,
        "batch": args.batch,
        "first_call_seconds": first_call() if args.device == "cpu" else {},
        "rows": rows,
    }
    stem = RESULTS / f"kernels_{args.device}_{args.dtype}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    draw(rows, stem.with_suffix(".png"))


if __name__ == "__main__":
    main()
