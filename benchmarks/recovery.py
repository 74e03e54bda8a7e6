"""Accuracy without any training, against multiply-adds: fitted budgets and their rivals.

    python benchmarks/recovery.py --data CIFAR10_DIR

Each method makes a smaller network from the same trained one, sees the same unlabelled training
images and takes no gradient step. Rivals: data-aware low rank with the same budget rule, and
Torch-Pruning (group magnitude, widths rounded to 8) with re-estimated norms. Latency is the ratio
to the original, both interleaved in one process. The result file is what this script writes.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import base_nets
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import pfsurgery
from pfsurgery.measure import count, latency
from pfsurgery.recover import Budget

RESULTS = Path(__file__).parent / "results"
BUDGETS = {"basic": (5.5, 9.6, 17.5, 25.5), "bottleneck": (28.0, 30.0, 32.0)}
Method = Callable[[nn.Module, float, list[Tensor]], nn.Module]


def fitted(model: nn.Module, mmacs: float, images: list[Tensor]) -> nn.Module:
    """`budget` as it is."""
    return pfsurgery.convert(model, pfsurgery.budget(macs=mmacs * 1e6), images=images)


def parameter_free(model: nn.Module, mmacs: float, images: list[Tensor]) -> nn.Module:
    """`budget` without thin dense convolutions."""
    policy = pfsurgery.budget(macs=mmacs * 1e6, thin=False)
    return pfsurgery.convert(model, policy, images=images)


def low_rank(model: nn.Module, mmacs: float, images: list[Tensor]) -> nn.Module:
    """Reduced-rank regression on the patches, spent by the same rule."""
    return pfsurgery.convert(model, Budget(macs=mmacs * 1e6, forms=("low_rank",)), images=images)


def pruned(model: nn.Module, mmacs: float, images: list[Tensor]) -> nn.Module:
    """Torch-Pruning at the smallest ratio that meets the budget, norms re-estimated."""
    import torch_pruning as tp

    low, high, best = 0.0, 0.95, None
    for _ in range(8):
        ratio = (low + high) / 2
        candidate = copy.deepcopy(model)
        tp.pruner.BasePruner(
            candidate,
            images[0][:1],
            importance=tp.importance.GroupMagnitudeImportance(),
            pruning_ratio=ratio,
            ignored_layers=[candidate.fc],
            round_to=8,
        ).step()
        if count(candidate, images[0][:1]).macs <= mmacs * 1e6:
            best, high = candidate, ratio
        else:
            low = ratio
    if best is None:
        raise SystemExit(f"Torch-Pruning does not reach {mmacs} MMACs")
    pfsurgery.recalibrate(best, images)
    return best


METHODS: dict[str, Method] = {
    "budget": fitted,
    "budget, thin=False": parameter_free,
    "data-aware low rank": low_rank,
    "Torch-Pruning, norms re-estimated": pruned,
}


def times(before: nn.Module, after: nn.Module, image: Tensor) -> dict[str, float]:
    """Latency of `after` as a share of that of `before`, by batch size."""
    shares = {}
    for batch in (8, 128):
        found = latency(
            {"before": before, "after": after},
            image.expand(batch, -1, -1, -1).contiguous(memory_format=torch.channels_last),
            repeats=15,
        )
        shares[str(batch)] = found["after"].median_ms / found["before"].median_ms
    return shares


def run(net: str, number: int, data: Path) -> dict[str, object]:
    """All methods at all budgets on one base network."""
    model = base_nets.load_net(net, data)
    images = list(base_nets.normalise(base_nets.load_images("train", data)[0][:number]).split(250))
    val = base_nets.load_images("val", data)
    image = images[0][:1]
    base = base_nets.accuracy(model, *val)
    macs = count(model, image).macs
    print(f"{net}: {base:.2f} %, {macs / 1e6:.2f} MMACs, {number} images")
    rows = []
    for mmacs in BUDGETS[net]:
        for name, method in METHODS.items():
            start = time.perf_counter()
            fast = method(model, mmacs, images).eval()
            row = {
                "method": name,
                "budget_mmacs": mmacs,
                "mmacs": count(fast, image).macs / 1e6,
                "parameters": sum(p.numel() for p in fast.parameters()),
                "seconds": time.perf_counter() - start,
                "top1": base_nets.accuracy(fast, *val),
                "latency_ratio": times(model, fast, image),
            }
            rows.append(row)
            print(
                f"{mmacs:6.1f} {name:36s} {row['mmacs']:6.2f} MMACs {row['top1']:6.2f} % "
                f"{row['seconds']:5.0f} s  latency "
                + ", ".join(f"{v:.2f} at {b}" for b, v in row["latency_ratio"].items()),
                flush=True,
            )
    return {
        "net": net,
        "images": number,
        "base_top1": base,
        "base_mmacs": macs / 1e6,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": str(torch.__version__),
        "rows": rows,
    }


def draw(result: dict[str, object], path: Path) -> None:
    """Accuracy against multiply-adds, one line a method."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    rows = result["rows"]
    for name, marker in zip(METHODS, "osD^", strict=True):
        mine = [row for row in rows if row["method"] == name]
        axes.plot([r["mmacs"] for r in mine], [r["top1"] for r in mine], marker=marker, label=name)
    axes.axhline(result["base_top1"], color="gray", linestyle="--", linewidth=1)
    axes.annotate(
        f"original, {result['base_mmacs']:.0f} MMACs",
        (axes.get_xlim()[0], result["base_top1"]),
        textcoords="offset points",
        xytext=(4, 3),
        color="gray",
    )
    axes.set_xlabel("multiply-adds of one image (MMACs)")
    axes.set_ylabel("CIFAR-10 top-1 (%)")
    axes.set_title(f"No training, no labels, {result['images']} images", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=160)


def main() -> None:
    """Run, print, write JSON and a figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train.tar, val.tar")
    parser.add_argument("--net", choices=list(BUDGETS), default="basic")
    parser.add_argument("--images", type=int, default=2000)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    result = run(args.net, args.images, args.data)
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"recovery_{args.net}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, stem.with_suffix(".png"))


if __name__ == "__main__":
    main()
