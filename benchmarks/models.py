"""Whole models, original against converted.

    python benchmarks/models.py

resnet50 against the paper's `eff_max` and `eff_hybrid`, and other timm models against the default
policy for their kind, with random weights. Each is timed in both layouts, as it is and as
`optimize` leaves it, eager and (with --compile) compiled; all versions of a model run in turns in
one process. A model that its policy makes slower is in the table like any other.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
from pathlib import Path

import timm
import torch
from machine import describe
from matplotlib.figure import Figure
from torch import nn

import pfsurgery
from pfsurgery.measure import count, latency

RESULTS = Path(__file__).parent / "results"
CASES = {
    "resnet50": ("eff_max", "eff_hybrid"),
    "mobilenetv2_100": ("maxpool_depthwise",),
    "convnext_tiny": ("maxpool_depthwise",),
    "resnet18": ("maxpool_deep",),
    "vgg16_bn": ("maxpool_deep",),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def versions(
    name: str, batch: int, device: str, dtype: torch.dtype, compiled: bool
) -> list[dict[str, object]]:
    """All versions of one model at one batch size."""
    model = timm.create_model(name).eval().to(device, dtype)
    image = torch.randn(batch, 3, 224, 224, device=device, dtype=dtype)
    models = {"original": model}
    for policy in CASES[name]:
        models[policy] = pfsurgery.convert(model, policy, example=image[:1])
    rows = []
    for layout in LAYOUTS:
        torch.compiler.reset()  # it compiles one piece of code for eight models, no more
        laid_out = image.contiguous(memory_format=LAYOUTS[layout])
        timed: dict[str, nn.Module] = {}
        for policy, made in models.items():
            optimized = pfsurgery.optimize(made, laid_out, memory_format=layout)
            plain = copy.deepcopy(made).to(memory_format=LAYOUTS[layout])
            timed[f"{policy}|plain|eager"] = plain
            timed[f"{policy}|optimized|eager"] = optimized
            if compiled:
                timed[f"{policy}|optimized|compiled"] = torch.compile(optimized)
        repeats = max(5, min(30, 240 // batch))
        for key, taken in latency(timed, laid_out, repeats=repeats, warmup=2).items():
            policy, state, mode = key.split("|")
            rows.append(
                {
                    "model": name,
                    "version": policy,
                    "state": state,
                    "mode": mode,
                    "layout": layout,
                    "batch": batch,
                    "median_ms": taken.median_ms,
                    "iqr_ms": taken.iqr_ms,
                    "rounds": repeats,
                    "macs": count(models[policy], image[:1]).macs,
                }
            )
        timed.clear()
        gc.collect()
    return rows


def speedups(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Original's time over the converted model's, each in its better layout."""
    found = []
    keys = {(r["model"], r["batch"], r["state"], r["mode"]) for r in rows}
    for model, batch, state, mode in sorted(keys):
        best: dict[object, dict[str, object]] = {}
        for row in rows:
            mine = (row["model"], row["batch"], row["state"], row["mode"])
            if mine == (model, batch, state, mode):
                old = best.get(row["version"])
                if old is None or row["median_ms"] < old["median_ms"]:
                    best[row["version"]] = row
        original = best.pop("original")
        for version, row in best.items():
            found.append(
                {
                    "model": model,
                    "version": version,
                    "batch": batch,
                    "state": state,
                    "mode": mode,
                    "original_ms": original["median_ms"],
                    "converted_ms": row["median_ms"],
                    "speedup": original["median_ms"] / row["median_ms"],
                    "mac_ratio": original["macs"] / row["macs"],
                }
            )
    return found


def draw(found: list[dict[str, object]], path: Path) -> None:
    """Speed of the converted models, beside the ratio of multiply-adds."""
    shown = [row for row in found if row["mode"] == "eager"]
    cases = sorted({(row["model"], row["version"]) for row in shown})
    kinds = sorted({(row["batch"], row["state"]) for row in shown})
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / (len(kinds) + 1)
    for place, (batch, state) in enumerate(kinds):
        mine = [r for r in shown if (r["batch"], r["state"]) == (batch, state)]
        values = {(r["model"], r["version"]): r["speedup"] for r in mine}
        places = [i + place * width for i in range(len(cases))]
        heights = [values.get(case, 0) for case in cases]
        axes.bar(places, heights, width, label=f"batch {batch}, {state}")
    ratios = {(r["model"], r["version"]): r["mac_ratio"] for r in shown}
    places = [i + len(kinds) * width for i in range(len(cases))]
    heights = [ratios[case] for case in cases]
    axes.bar(places, heights, width, label="fewer multiply-adds", color="lightgray")
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xticks([i + 0.35 for i in range(len(cases))], ["\n".join(case) for case in cases])
    axes.set_ylabel("time of the original / time of the converted model")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--models", nargs="+", default=list(CASES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    path = RESULTS / f"models_{args.device}_{args.dtype}.json"
    known = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    rows = known["rows"]
    for name in args.models:
        for batch in args.batch:
            rows = [r for r in rows if (r["model"], r["batch"]) != (name, batch)]
            rows += versions(name, batch, args.device, getattr(torch, args.dtype), args.compile)
            found = speedups(rows)
            for row in found:
                if (row["model"], row["batch"]) == (name, batch):
                    print(
                        f"{name} {row['version']} batch {batch} {row['state']} {row['mode']}: "
                        f"{row['original_ms']:.1f} -> {row['converted_ms']:.1f} ms, "
                        f"{row['speedup']:.2f}x at {row['mac_ratio']:.2f}x fewer multiply-adds",
                        flush=True,
                    )
            result = {"machine": describe(args.device), "speedups": found, "rows": rows}
            path.write_text(json.dumps(result, indent=1) + "\n")
    draw(found, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
