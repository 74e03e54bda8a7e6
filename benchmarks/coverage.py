"""What `scan` and `convert` do on all models of timm, torchvision and Hugging Face's vision.

    python benchmarks/coverage.py --jobs 2
    python benchmarks/coverage.py --only "timm/resnet*"

Models are built without weights (on the meta device; the few whose control flow needs values are
built for real) and run on one image of their own size. For each: sites found, checked against a
count of the convolution calls that PyTorch's dispatcher sees; what `maxpool_all` converts, why the
rest is kept, whether outputs keep their shapes and exactly the replaced convolutions are gone; and
what `maxpool_deep`, which does the same to fewer of these sites, would convert. A model takes one
line of the state file, so a run that was stopped goes on where it was (without the file, from the
result file). At the end, the result file and docs/coverage.md are written, from all lines in the
state file; `--report` does that alone.

`--real` runs, for the smallest model of each family in the state file of which `maxpool_all`
converts something, a forward and a backward pass with real weights: see coverage_real.py.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any

import torch
from coverage_models import NotBuilt, build, catalogue, family, short
from coverage_real import run_for_real, smallest
from coverage_report import RESULT, write_report
from machine import describe
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pfsurgery
from pfsurgery.errors import NoEffectWarning, NoSitesError
from pfsurgery.plan import make_plan
from pfsurgery.policy import get_policy
from pfsurgery.shadow import ByShape, described
from pfsurgery.sites import Site

if __name__ == "coverage":  # as numba asks for the package of this name from a script beside it
    raise ImportError("benchmarks/coverage.py is a script, not the package coverage")

RESULTS = Path(__file__).parent / "results"
STATE = RESULTS / "coverage.partial.jsonl"
POLICIES = ("maxpool_all", "maxpool_deep")
CARRIED_OUT = "maxpool_all"
# Language models are in a list of vision models of transformers, and do not fit into the memory.
MOST_REAL_PARAMETERS = 1_000_000_000


class Convolutions(TorchDispatchMode):
    """Counts the convolutions that reach the dispatcher, whoever calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.spatial += prod(args[1].shape[2:]) > 1
        return func(*args, **(kwargs or {}))


def spatial_calls(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[int, Any]:
    """How many convolutions with a kernel of more than one pixel run, and what comes out.

    Of a model that runs on real values, ranks and types come out: how many boxes a detector finds
    depends on its weights.
    """
    with torch.no_grad(), ByShape(), Convolutions() as seen:
        output = described(model(*inputs))
    on_meta = all(parameter.is_meta for parameter in model.parameters())
    return seen.spatial, output if on_meta else _ranks(output)


def _ranks(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _ranks(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_ranks(item) for item in value]
    if isinstance(value, tuple) and isinstance(value[0], tuple):
        return len(value[0]), value[1]
    return value


def examine(name: str) -> dict[str, Any]:
    """One row of the results; an exception becomes its `error`."""
    row: dict[str, Any] = {"model": name, "family": family(name)}
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        row |= _examine(name)
    except NotBuilt as reason:
        row["skipped"] = str(reason)
    except Exception:
        row["error"] = traceback.format_exc(limit=-3)
    row["seconds"] = round(time.perf_counter() - wall, 2)
    row["cpu_seconds"] = round(time.process_time() - cpu, 2)
    row["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return row


def _examine(name: str) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    model, inputs, (calls, output) = _running(name)
    sites = _scanned(model, inputs)
    problems = []
    found = sum(site.calls for site in sites)
    if found != calls:
        problems.append(f"{calls} spatial convolutions run, sites account for {found}")
    plain = {
        site.name
        for site in sites
        if set(site.geometry.stride) == {1}
        and site.geometry.in_channels == site.geometry.out_channels
    }
    row: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sites": len(sites),
        "calls": calls,
        "plain": len(plain),
    }
    for policy in POLICIES:
        plan = make_plan(sites, get_policy(policy))
        kept = [decision for decision in plan if not decision.replaced]
        row[policy] = {
            "converted": len(plan.replaced),
            "plain": sum(decision.site.name in plain for decision in plan.replaced),
            "pointwise": sum(decision.pointwise for decision in plan.replaced),
            "kept": dict(sorted(Counter(decision.reason for decision in kept).items())),
        }
        if policy != CARRIED_OUT:
            continue
        row["plain_kept"] = dict(Counter(d.reason for d in kept if d.site.name in plain))
        row["kept_sites"] = {
            reason: [f"{d.site.name}: {d.site.geometry}" for d in kept if d.reason == reason]
            for reason in row[policy]["kept"]
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoEffectWarning)
            fast = pfsurgery.convert(model, plan, example=inputs)
        left, after = spatial_calls(fast, inputs) if plan.replaced else (calls, output)
        expected = calls - sum(decision.site.calls for decision in plan.replaced)
        if left != expected:
            problems.append(f"{left} spatial convolutions left, not {expected}")
        if after != output:
            problems.append(f"{output} became {after}")
    return row | ({"problems": problems} if problems else {})


def _running(name: str) -> tuple[nn.Module, tuple[Any, ...], tuple[int, Any]]:
    """The model on the first device where it runs, its inputs and what `spatial_calls` says."""
    model: nn.Module = nn.Identity()
    try:
        model, inputs = build(name, "meta")
        return model, inputs, spatial_calls(model, inputs)
    except Exception as error:
        if sum(parameter.numel() for parameter in model.parameters()) > MOST_REAL_PARAMETERS:
            raise NotBuilt(f"no vision model of a usual size: {short(error)}") from None
    model, inputs = build(name, "cpu")
    try:
        return model, inputs, spatial_calls(model, inputs)
    except Exception as error:
        if not name.startswith("transformers/"):
            raise
        raise NotBuilt(f"its default configuration does not run: {short(error)}") from None


def _scanned(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Site, ...]:
    try:
        return pfsurgery.scan(model, inputs)
    except NoSitesError:
        return ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", help="a glob of models, as in timm/resnet*")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--state", type=Path, default=STATE, help="finished models, one a line")
    parser.add_argument("--again", action="store_true", help="also what the state file holds")
    parser.add_argument("--real", action="store_true", help="gradients of one model a family")
    parser.add_argument("--report", action="store_true", help="write what there is, run nothing")
    args = parser.parse_args()
    wanted = [name for name in catalogue() if fnmatchcase(name, args.only)]
    if not wanted:
        sys.exit(f"No model matches {args.only!r}.")
    done = _read(args.state)
    if args.real:
        known = [name for name in smallest(done.values()) if name in wanted]
        todo = [name for name in known if args.again or "real" not in done[name]]
        _run(run_for_real, todo, done, args.jobs, args.state)
    elif not args.report:
        todo = [name for name in wanted if args.again or name not in done]
        _run(examine, todo, done, args.jobs, args.state)
    rows = [done[name] for name in catalogue() if name in done]
    missing = len(catalogue()) - len(rows)
    write_report(rows, missing, {**describe("cpu"), "versions": _versions()})


def _run(
    work: Callable[[str], dict[str, Any]],
    todo: list[str],
    done: dict[str, dict[str, Any]],
    jobs: int,
    state: Path,
) -> None:
    """Add what `work` says of each model in `todo` to `done` and to the state file."""
    context = multiprocessing.get_context("spawn")
    with (
        context.Pool(jobs, torch.set_num_threads, (1,), maxtasksperchild=100) as pool,
        state.open("a") as file,
    ):
        for count, row in enumerate(pool.imap(work, todo), 1):
            _add(row, done)
            print(json.dumps(row), file=file, flush=True)
            said = row.get("real", row)
            trouble = said.get("error") or said.get("problems") or said.get("skipped") or ""
            print(f"{count}/{len(todo)} {row['model']} {said['seconds']} s {trouble}", flush=True)


def _add(row: dict[str, Any], done: dict[str, dict[str, Any]]) -> None:
    """What a later line says of a model counts; one about a real run comes on top."""
    name = row["model"]
    done[name] = {**done[name], **row} if "real" in row else row


def _read(state: Path) -> dict[str, dict[str, Any]]:
    """The rows of the state file; without one, those of the results, if versions are the same."""
    done: dict[str, dict[str, Any]] = {}
    if not state.is_file() and RESULT.is_file():
        results = json.loads(RESULT.read_text(encoding="utf-8"))
        if results["machine"]["versions"] == _versions():
            state.write_text("".join(json.dumps(row) + "\n" for row in results["models"]))
    for line in state.read_text().splitlines() if state.is_file() else []:
        _add(json.loads(line), done)
    return done


def _versions() -> dict[str, str]:
    found = {"torch": str(torch.__version__)}
    for package in ("timm", "torchvision", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


if __name__ == "__main__":
    main()
