"""A budget spent by measured damage, against equal relative errors and other choices of forms.

    python benchmarks/search.py --data CIFAR10_DIR --net basic --budget 9.6
    python benchmarks/search.py --net basic --draw

All choices start from the same trained network and are fitted to the same unlabelled training
images, without a gradient step: `search` itself (with every network that it makes on the way),
forms drawn at random until the budget is spent, the named policies, refitted, and two rivals of the
recovery benchmark. Accuracy is counted on the validation images, which no choice sees, but for
pruning, whose setting is chosen on them. Each row is written as soon as it is there, and rows that
are there are not made again. Accuracies do not depend on the load of the machine; ms do.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import base_nets
import torch
from machine import describe
from matplotlib.figure import Figure
from methods import METHODS, Task
from torch import nn

import pfsurgery
from pfsurgery.convert import marker
from pfsurgery.measure import count
from pfsurgery.policy import get_policy
from pfsurgery.recover import Budget
from pfsurgery.recover.calibration import frozen_copy
from pfsurgery.recover.choices import carry_out, read_choices
from pfsurgery.recover.distance import distance, outputs

RESULTS = Path(__file__).parent / "results"
RIVALS = {
    "basic": ("data-aware low rank", "Torch-Pruning, our refit"),
    "bottleneck": ("Torch-Pruning, our refit",),
    "depthwise": ("Torch-Pruning, our refit",),
}
BUDGETS = {"basic": 9.6, "bottleneck": 18.5, "depthwise": 3.0}  # millions of multiply-adds
POLICIES = ("maxpool_deep", "maxpool_all", "avgpool_all")
DRAWS = 20
ON_THE_WAY = "on the way, fitted to half of the images"
Row = dict[str, object]
Point = tuple[float, float]


class Bench:
    """The trained network, its images, and the rows so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.path = args.results / f"search_{args.net}.json"
        self.model = base_nets.load_net(args.net, args.data)
        train = base_nets.load_images("train", args.data)[0]
        self.images = list(base_nets.normalise(train[: args.images]).split(250))
        self.val = base_nets.load_images("val", args.data)
        self.wanted = outputs(frozen_copy(self.model), self.images)
        self.pointwise = args.net != "basic"  # elsewhere most of the work is in 1x1 convolutions
        facts: Row = {
            "net": args.net,
            "base_weights": base_nets.fingerprint(self.model),
            "base_mmacs": self.cost(self.model),
            "images": args.images,
        }
        self.content: dict[str, object] = {**facts, "machine": describe("cpu"), "rows": []}
        if self.path.exists():
            self.content = json.loads(self.path.read_text())
            found = {key: self.content[key] for key in facts}
            if found != facts:
                raise SystemExit(f"{self.path} is of another network or other images: {found}")
        else:
            self.content["base_top1"] = self.top1(self.model)

    @property
    def rows(self) -> list[Row]:
        """All rows so far."""
        return self.content["rows"]

    def policy(self, budget: float) -> Budget:
        """What is spent, in millions of multiply-adds."""
        return Budget(macs=budget * 1e6, pointwise=self.pointwise)

    def cost(self, model: nn.Module) -> float:
        """Millions of multiply-adds of one image."""
        return count(model, self.images[0][:1]).macs / 1e6

    def top1(self, model: nn.Module) -> float:
        """Accuracy in percent."""
        return base_nets.accuracy(model, *self.val)

    def add(self, budget: float, name: str, make: Callable[[], nn.Module], **more: object) -> None:
        """Make a network, measure it, and write its row, unless that was done before."""
        if any(row["budget_mmacs"] == budget and row["name"] == name for row in self.rows):
            return
        start = time.perf_counter()
        model = make().eval()
        seconds = time.perf_counter() - start
        self.keep(
            budget_mmacs=budget,
            name=name,
            mmacs=self.cost(model),
            damage=distance(self.wanted, outputs(model, self.images)),
            top1=self.top1(model),
            seconds=seconds,
            **more,
        )

    def keep(self, **row: object) -> None:
        """Append a row, write the file, print the row."""
        self.rows.append(row)
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        print(shown, flush=True)


def searched(bench: Bench, budget: float, folder: Path) -> None:
    """Rows of all networks that `search` makes."""
    if any(r["budget_mmacs"] == budget and r.get("origin") for r in bench.rows):
        return
    start = time.perf_counter()
    found = pfsurgery.search(
        bench.model,
        bench.policy(budget),
        bench.images,
        out=folder / f"search_{bench.content['net']}",
        validate=bench.top1,
        tell=lambda line: print(f"  {line}", flush=True),
    )
    seconds = time.perf_counter() - start
    for point in found.points:
        values = asdict(point) | {"mmacs": point.macs / 1e6}
        del values["macs"]
        bench.keep(budget_mmacs=budget, seconds=seconds, **values)
    bench.keep(
        budget_mmacs=budget,
        name="latency",
        original_ms=found.original.ms,
        predicted_ms=found.predicted_ms,
        measured_ms=found.chosen.ms,
    )


def drawn_at_random(bench: Bench, budget: float, draws: int) -> None:
    """Rows of networks whose sites take forms at random, within the budget."""
    policy = bench.policy(budget)
    choices = read_choices(bench.model, marker(bench.model, policy), bench.images, policy.forms)

    def pick(options: Mapping[str, Sequence[Point]], allowed: float, seed: int) -> dict[str, int]:
        """Sites in random order take a random form of what is left, until no site can take more."""
        chance = random.Random(seed)
        places = {name: points.index(min(points)) for name, points in options.items()}
        left = allowed - sum(options[name][place][0] for name, place in places.items())
        could = True
        while could:
            could = False
            for name in chance.sample(sorted(options), len(options)):
                cost = options[name][places[name]][0]
                dearer = [
                    place
                    for place, (other, _) in enumerate(options[name])
                    if cost < other <= cost + left
                ]
                if dearer:
                    could = True
                    places[name] = chance.choice(dearer)
                    left -= options[name][places[name]][0] - cost
        return places

    for seed in range(draws):
        places, _ = policy.choose(
            choices, print, pick=lambda options, allowed, seed=seed: pick(options, allowed, seed)
        )
        bench.add(budget, f"random {seed + 1}", lambda p=places: carry_out(choices, p)[0])


def named(bench: Bench, budget: float) -> None:
    """Rows of `budget` with the same limit, of the named policies, refitted, and of the rivals."""

    def by_equal_errors() -> nn.Module:
        return pfsurgery.convert(bench.model, bench.policy(budget), images=bench.images)

    bench.add(budget, "budget: equal relative errors", by_equal_errors)
    for name in POLICIES:

        def make(name: str = name) -> nn.Module:
            image = bench.images[0][:1]
            fast = pfsurgery.convert(bench.model, get_policy(name), example=image)
            pfsurgery.reconstruct(fast, bench.model, bench.images)
            return fast

        bench.add(0.0, name, make)
    task = Task(bench.model, budget * 1e6, bench.images, bench.top1)
    for rival in RIVALS[bench.content["net"]]:
        bench.add(budget, rival, lambda rival=rival: METHODS[rival](task)[0])


def draw(path: Path) -> None:
    """Accuracy against multiply-adds, beside the JSON file."""
    content = json.loads(path.read_text())
    groups: dict[str, list[Point]] = {}
    for row in content["rows"]:
        if "top1" not in row:
            continue
        name = str(row["name"])
        label = "random forms" if name.startswith("random ") else name
        if row.get("chosen"):
            label = "search"
        elif row.get("origin"):
            label = ON_THE_WAY
        groups.setdefault(label, []).append((row["mmacs"], row["top1"]))
    figure = Figure(figsize=(8.4, 5.0), dpi=180, layout="constrained")
    axes = figure.subplots()
    for label, points in groups.items():
        style = "." if label in ("random forms", ON_THE_WAY) else "o-"
        axes.plot(*zip(*sorted(points), strict=True), style, label=label, alpha=0.85)
    axes.axhline(content["base_top1"], color="#222222", linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlabel("multiply-adds of one image (millions)")
    axes.set_ylabel("top-1 on validation images, no training (%)")
    axes.set_title(f"{content['net']} network, {content['base_top1']:.2f} % (dashed)", loc="left")
    axes.grid(color="#e4e4e4")
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path.with_suffix(".png"), facecolor="white")


def main() -> None:
    """Make the rows that are missing, and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--net", choices=list(base_nets.CYCLES), default="basic")
    parser.add_argument("--budget", type=float, action="append", help="millions of multiply-adds")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--only", choices=("search", "random", "named"), action="append")
    parser.add_argument("--draw", action="store_true", help="only draw the figure")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    path = args.results / f"search_{args.net}.json"
    if not args.draw:
        torch.set_flush_denormal(True)
        bench = Bench(args)
        only = args.only or ("search", "random", "named")
        for budget in args.budget or (BUDGETS[args.net],):
            if "search" in only:
                searched(bench, budget, base_nets.CACHE)
            if "named" in only:
                named(bench, budget)
            if "random" in only:
                drawn_at_random(bench, budget, args.draws)
    draw(path)


if __name__ == "__main__":
    main()
