"""Recovery without training, and after a short distillation, against its rivals.

    python benchmarks/recovery.py fit --data CIFAR10_DIR --net basic
    python benchmarks/recovery.py images --data CIFAR10_DIR --net basic
    python benchmarks/recovery.py bare --data CIFAR10_DIR --net bottleneck
    python benchmarks/recovery.py latency --data CIFAR10_DIR --net basic
    python benchmarks/recovery.py asked --data CIFAR10_DIR --net basic
    python benchmarks/recovery.py latency --data CIFAR10_DIR --net basic --dtype bfloat16
    python benchmarks/recovery.py distil --data CIFAR10_DIR --net basic --steps 200
    python benchmarks/recovery.py step --data CIFAR10_DIR --net basic
    python benchmarks/recovery.py draw --net basic

All methods start from the same trained network and see the same unlabelled training images; `fit`
takes no gradient step; `asked` asks for time in place of multiply-adds; `distil` trains the
methods that are compared, or those that `--method` names. Each row is written as soon as it is
there, and rows that are there are not made again, so a run can be stopped at any time, for
instance by `--seconds`, and several may share the methods. `latency`, `asked` and `step` need an
idle machine: their ratios are to the original (as `optimize` leaves both, but for `step`), timed
in turns. `results/` holds what this script writes; smaller networks are kept in `cache/`.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import json
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import base_nets
import torch
from distillation import RATES, asking, distilled, remembering, stepwise
from machine import describe
from methods import COMPARED, METHODS, WITHOUT_BUDGET, Task
from recovery_figures import draw
from torch import nn

import pfsurgery
from pfsurgery.measure import count, latency

RESULTS = Path(__file__).parent / "results"
BUDGETS = {
    "basic": (25.5, 17.5, 9.6, 5.5),
    "bottleneck": (32.0, 30.0, 28.0, 18.5, 13.5),
    "depthwise": (5.0, 4.0, 3.0, 2.0),
}
# Sites that lose their convolution without a product in its place, mildest first.
BARE = {
    "basic": (),
    "bottleneck": (("layer3.*",), ("layer1.1.*", "layer2.1.*", "layer3.1.*"), ("layer*",)),
    "depthwise": (
        ("blocks.3.1.*",),
        ("blocks.3.*",),
        ("blocks.2.*", "blocks.3.*"),
        ("blocks.1.*", "blocks.2.*", "blocks.3.*"),
    ),
}
IMAGES = (128, 500, 2000, 5000)
SWEPT = ("budget", "data-aware Tucker-2", "Torch-Pruning, our refit")
STEPS = (200, 1000)
BATCHES = (1, 8, 128)
ASKED = (8, 128)  # batches that a budget of time is asked for
SHARES = (70, 50, 35)  # percent of the original's time
Row = dict[str, object]


class Store:
    """The rows of one network, in a JSON file that is rewritten after each.

    Several processes may add rows to one file: each adds to what is there.
    """

    def __init__(self, net: str, results: Path) -> None:
        self.net = net
        self.path = results / f"recovery_{net}.json"
        results.mkdir(exist_ok=True)
        self.content: dict[str, object] = {"net": net, "rows": []}
        self._read()

    @property
    def rows(self) -> list[Row]:
        """All rows so far."""
        return self.content["rows"]

    def has(self, **key: object) -> bool:
        """Whether a row with these values is there."""
        return any(all(row.get(k) == v for k, v in key.items()) for row in self.rows)

    def add(self, row: Row) -> None:
        """Append a row, write the file, print the row."""
        facts = {key: value for key, value in self.content.items() if key != "rows"}
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._read()
            self.content.update(facts)
            self.rows.append(row)
            self._write()
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
        print({k: v for k, v in shown.items() if k != "decided"}, flush=True)

    def _read(self) -> None:
        if self.path.exists():
            self.content = json.loads(self.path.read_text())

    def _write(self) -> None:
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.content, indent=1) + "\n")
        part.replace(self.path)


class Bench:
    """The trained network, its data, and what was asked for."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.set_flush_denormal(True)
        self.args = args
        self.store = Store(args.net, args.results)
        self.model = base_nets.load_net(args.net, args.data)
        self.train = base_nets.load_images("train", args.data)[0]
        images, labels = base_nets.load_images("val", args.data)
        self.val = images[: args.val], labels[: args.val]
        self.image = base_nets.normalise(self.train[:1])
        self.until = time.monotonic() + args.seconds
        facts = {
            "base_weights": base_nets.fingerprint(self.model),
            "base_top1": self.judge(self.model),
            "base_mmacs": count(self.model, self.image).macs / 1e6,
            "base_parameters": sum(p.numel() for p in self.model.parameters()),
            "val_images": len(self.val[1]),
        }
        found = {k: self.store.content.get(k, v) for k, v in facts.items()}
        if found != facts:
            raise SystemExit(
                f"{self.store.path} was made with another network or other images "
                f"({found} is not {facts}): move it away, and {self.cache}, to start again."
            )
        self.store.content.update(facts)

    @property
    def cache(self) -> Path:
        """Where the smaller networks are kept."""
        return base_nets.CACHE / "recovery" / self.args.net

    def judge(self, model: nn.Module) -> float:
        """Accuracy in percent."""
        return base_nets.accuracy(model, *self.val)

    def cases(self, methods: tuple[str, ...]) -> Iterator[tuple[str, float | None]]:
        """Methods and budgets, the mildest first; those without a budget at the end."""
        chosen = self.args.method or methods
        for budget in self.args.budget or BUDGETS[self.args.net]:
            yield from ((m, budget) for m in chosen if m not in WITHOUT_BUDGET)
        yield from ((m, None) for m in chosen if m in WITHOUT_BUDGET)

    def in_time(self) -> bool:
        """Whether another row may be begun."""
        return time.monotonic() < self.until

    def file(self, method: str, budget: float | None, number: int) -> Path:
        """Where the smaller network of a row is kept."""
        words = "".join(c if c.isalnum() else "_" for c in method)
        return self.cache / f"{words}_{budget or 'free'}_{number}.pt"

    def made(self, method: str, budget: float | None, number: int) -> nn.Module | None:
        """The smaller network of a row, None if it was not made here."""
        file = self.file(method, budget, number)
        return torch.load(file, weights_only=False) if file.exists() else None


def fit(bench: Bench, methods: tuple[str, ...], budgets: tuple[float, ...], number: int) -> None:
    """Rows of methods at budgets with so many images."""
    images = list(base_nets.normalise(bench.train[:number]).split(250))
    for method, budget in bench.cases(methods):
        if budget is not None and budget not in budgets:
            continue
        key: Row = {"stage": "fit", "method": method, "budget_mmacs": budget, "images": number}
        if bench.store.has(**key) or not bench.in_time():
            continue
        task = Task(bench.model, (budget or 0.0) * 1e6, images, bench.judge)
        start = time.perf_counter()
        try:
            fast, decided = METHODS[method](task)
        except Exception as error:
            if type(error).__module__ != "pfsurgery.errors":
                raise
            print(f"{method} at {budget}: {error}", flush=True)
            continue
        seconds = time.perf_counter() - start
        file = bench.file(method, budget, number)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(fast.eval(), file)
        bench.store.add(
            {
                **key,
                "mmacs": count(fast, bench.image).macs / 1e6,
                "parameters": sum(p.numel() for p in fast.parameters()),
                "top1": bench.judge(fast),
                "seconds": seconds,
                "threads": torch.get_num_threads(),
                "decided": decided,
            }
        )


def fit_all(bench: Bench) -> None:
    """Every method at every budget."""
    fit(bench, tuple(METHODS), tuple(bench.args.budget or BUDGETS[bench.args.net]), 2000)


def sweep_images(bench: Bench) -> None:
    """A few methods at one budget, with few and many images."""
    budget = (bench.args.budget or [BUDGETS[bench.args.net][2]])[0]
    for number in IMAGES:
        fit(bench, SWEPT, (budget,), number)


def strip(bench: Bench) -> None:
    """Sites without any product of their own: after surgery, and with what follows refitted."""
    images = list(base_nets.normalise(bench.train[:2000]).split(250))
    for include in BARE[bench.args.net]:
        key: Row = {"stage": "bare", "include": list(include)}
        if bench.store.has(**key) or not bench.in_time():
            continue
        pooled = pfsurgery.convert(bench.model, "maxpool_all", example=bench.image, include=include)
        after_surgery = bench.judge(pooled)
        pfsurgery.reconstruct(pooled, bench.model, images)
        start = time.perf_counter()
        fast = pfsurgery.convert(bench.model, pfsurgery.bare(), images=images, include=include)
        row: Row = {
            "seconds": time.perf_counter() - start,
            "sites": [d.site.name for d in pfsurgery.record(fast).plans[-1].replaced],
            "mmacs": count(fast, bench.image).macs / 1e6,
            "top1_after_surgery": after_surgery,
            "top1_max_pool_refitted": bench.judge(pooled),
            "top1": bench.judge(fast),
        }
        lost = bench.store.content["base_top1"] - after_surgery
        row["regained"] = (row["top1"] - after_surgery) / lost
        bench.store.add({**key, **row})


def time_all(bench: Bench) -> None:
    """Latency of every fitted network, in one process; run it on an idle machine."""
    for method, budget in bench.cases(COMPARED):
        fast = bench.made(method, budget, 2000)
        for batch in BATCHES:
            key: Row = {"stage": "latency", "method": method, "budget_mmacs": budget}
            key |= {"batch": batch, "threads": torch.get_num_threads(), "dtype": bench.args.dtype}
            if fast is None or bench.store.has(**key) or not bench.in_time():
                continue
            bench.store.add({**key, **in_turns(bench, fast, batch)})


def in_turns(bench: Bench, fast: nn.Module, batch: int) -> Row:
    """Times of the original and a smaller network, each as `optimize` leaves it, in turns."""
    dtype = getattr(torch, bench.args.dtype)
    x = bench.image.expand(batch, -1, -1, -1).to(dtype, memory_format=torch.channels_last)
    models = {
        name: pfsurgery.optimize(
            copy.deepcopy(model).eval().to(dtype), x, memory_format="channels_last"
        )
        for name, model in (("before", bench.model), ("after", fast))
    }
    found = latency(models, x, repeats=25)
    pairs = zip(found["after"].times_ms, found["before"].times_ms, strict=True)
    return {
        "before_ms": found["before"].median_ms,
        "after_ms": found["after"].median_ms,
        "ratio": statistics.median(after / before for after, before in pairs),
        "machine": describe("cpu"),
    }


def ask_for_time(bench: Bench) -> None:
    """Budgets of time: what was asked for, what was measured end to end, and the accuracy."""
    images = list(base_nets.normalise(bench.train[:2000]).split(250))
    scores = remembering(bench.model)
    for batch, share in product(bench.args.batch or ASKED, bench.args.share or SHARES):
        key: Row = {"stage": "asked", "share": share, "batch": batch}
        if bench.store.has(**key) or not bench.in_time():
            continue
        policy = pfsurgery.budget(
            latency=f"{share}%", batch=batch, pointwise=bench.args.net != "basic"
        )
        start = time.perf_counter()
        fast = pfsurgery.convert(bench.model, policy, images=images)
        seconds = time.perf_counter() - start
        row = {"mmacs": count(fast, bench.image).macs / 1e6, "seconds": seconds}
        row |= {"top1": bench.judge(fast), **in_turns(bench, fast, batch)}
        steps, rate = STEPS[0], RATES[1]
        trained = distilled(fast, scores, bench.train, steps, rate)
        row |= {"steps": steps, "rate": rate, "top1_after_steps": bench.judge(trained)}
        bench.store.add({**key, **row})


def distil_all(bench: Bench) -> None:
    """Accuracy of every fitted network after some steps of distillation, at each rate."""
    scores = remembering(bench.model)
    for steps, (method, budget), rate in product(
        bench.args.steps or STEPS, list(bench.cases(COMPARED)), bench.args.rate or RATES
    ):
        key: Row = {"stage": "distil", "method": method, "budget_mmacs": budget}
        key |= {"steps": steps, "rate": rate}
        fast = bench.made(method, budget, 2000)
        if fast is None or bench.store.has(**key) or not bench.in_time():
            continue
        student = distilled(fast, scores, bench.train, steps, rate)
        macs = count(student, bench.image).macs / 1e6
        bench.store.add({**key, "mmacs": macs, "top1": bench.judge(student)})


def time_steps(bench: Bench) -> None:
    """What a step of distillation costs, of each fitted network and of the original, in turns."""
    steps, warm = 25, 5
    for method, budget in bench.cases(COMPARED):
        key: Row = {"stage": "step", "method": method, "budget_mmacs": budget}
        fast = bench.made(method, budget, 2000)
        if fast is None or bench.store.has(**key) or not bench.in_time():
            continue
        students = (copy.deepcopy(bench.model).train(), fast.train())
        runs = [stepwise(s, asking(bench.model), bench.train, steps, 1e-3) for s in students]
        times: list[tuple[float, float]] = []
        for _ in range(steps):
            times.append((_milliseconds(runs[0]), _milliseconds(runs[1])))
        before, after = zip(*times[warm:], strict=True)
        row = {
            "before_ms": statistics.median(before),
            "after_ms": statistics.median(after),
            "ratio": statistics.median(a / b for a, b in zip(after, before, strict=True)),
            "machine": describe("cpu"),
        }
        bench.store.add({**key, **row})


def _milliseconds(run: Iterator[None]) -> float:
    start = time.perf_counter()
    next(run)
    return 1e3 * (time.perf_counter() - start)


STAGES: dict[str, Callable[[Bench], None]] = {
    "fit": fit_all,
    "images": sweep_images,
    "bare": strip,
    "latency": time_all,
    "asked": ask_for_time,
    "distil": distil_all,
    "step": time_steps,
}


def main() -> None:
    """Run one stage as far as the time allows, or draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=[*STAGES, "draw"])
    parser.add_argument("--net", choices=list(BUDGETS), default="basic")
    parser.add_argument("--data", type=Path, help="folder with train.tar, val.tar")
    parser.add_argument("--method", action="append", choices=list(METHODS), help="only these")
    parser.add_argument("--budget", action="append", type=float, help="only these, in MMACs")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="timed")
    parser.add_argument("--share", action="append", type=int, help="percent of the time asked for")
    parser.add_argument("--batch", action="append", type=int, help="batches it is asked for")
    parser.add_argument("--steps", action="append", type=int, help="of distillation")
    parser.add_argument("--rate", action="append", type=float, help="only these peak rates")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no row after these")
    parser.add_argument("--val", type=int, default=10000, help="validation images")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    args = parser.parse_args()
    if args.stage == "draw":
        draw(Store(args.net, args.results).content, args.results / f"recovery_{args.net}")
        return
    STAGES[args.stage](Bench(args))


if __name__ == "__main__":
    main()
