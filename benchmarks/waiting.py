"""How long each step takes on models of real size, and how much memory.

    python benchmarks/waiting.py
    python benchmarks/waiting.py --model resnet50 --images 512

Weights and images are random: what is timed does not depend on them, but that a budget may choose
other forms. One process for each model, so that the memory is its own.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import timm
import torch
from machine import describe

import pfsurgery

RESULT = Path(__file__).parent / "results" / "waiting.json"
MODELS = ("resnet18", "resnet50", "mobilenetv2_100")
Result = TypeVar("Result")


def steps_of(name: str, images: int) -> dict[str, object]:
    """Seconds of each step on one model, and the peak memory in GiB."""
    torch.manual_seed(0)
    seconds: dict[str, float] = {}

    def timed(what: str, work: Callable[[], Result]) -> Result:
        start = time.perf_counter()
        result = work()
        seconds[what] = time.perf_counter() - start
        print(f"{name}: {what}: {seconds[what]:.1f} s", flush=True)
        return result

    model = timm.create_model(name).eval()
    batches = list(torch.randn(images, 3, 224, 224).split(64))
    timed("plan", lambda: pfsurgery.plan(model, "maxpool_deep"))
    fast = timed("convert by maxpool_deep", lambda: pfsurgery.convert(model, "maxpool_deep"))
    timed("reconstruct", lambda: pfsurgery.reconstruct(fast, model, batches))
    half = pfsurgery.budget(macs="60%", pointwise=name.startswith("mobilenet"))
    fitted = timed("convert by budget", lambda: pfsurgery.convert(model, half, images=batches))
    ready = timed("optimize", lambda: pfsurgery.optimize(fitted))
    timed("compare", lambda: pfsurgery.compare(model, ready))
    with tempfile.TemporaryDirectory() as folder:
        timed("save and load", lambda: (pfsurgery.save(fitted, folder), pfsurgery.load(folder)))
    one = (torch.zeros(1, 3, 224, 224),)
    timed("export to ONNX", lambda: torch.onnx.export(fast, one, io.BytesIO(), dynamo=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"model": name, "images": images, "seconds": seconds, "peak_gib": peak}


def main() -> None:
    """Time the steps of each model, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", help="timm name, repeatable")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    rows = []
    for name in args.model or MODELS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(steps_of, (name, args.images)))
    content = {"machine": describe("cpu"), "models": rows}
    args.result.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
