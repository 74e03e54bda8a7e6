"""`pfsurgery demo`: the main job on an embedded data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pfsurgery import demo as demo_job
from pfsurgery.cli import options, show
from pfsurgery.recover import budget
from pfsurgery.recover.state import writable_folder


def demo(
    out: Annotated[Path, typer.Option(help="Directory for model, report and log.")] = Path(
        "pfsurgery-demo"
    ),
    policy: Annotated[
        str, typer.Option("--policy", "-p", help="Name of a policy.")
    ] = "maxpool_all",
    macs: options.Macs = None,
    params: options.Params = None,
    latency: options.Latency = None,
    thin: options.Thin = True,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    json: options.Json = False,
) -> None:
    """Train a small network on handwritten digits, convert it, and win its accuracy back.

    Needs no network and no data: scikit-learn's digits are embedded.

    Example: pfsurgery demo --policy budget --macs 30%
    """
    if policy != "budget":
        options.refuse_limits(macs=macs, params=params, latency=latency, thin=thin)
    writable_folder(out)
    report = demo_job.run(
        out,
        policy=budget(macs, params, latency, thin=thin) if policy == "budget" else policy,
        seed=seed,
        tell=show.silent if json else show.line,
    )
    show.report(report, out, json)
