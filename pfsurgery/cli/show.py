"""What the main job prints."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from pfsurgery.job import Report
from pfsurgery.policy import Tell
from pfsurgery.run_folder import MODEL_FOLDER


def line(text: str, aside: str = "") -> None:
    """One step of the job, and what is said beside it."""
    if is_first_process():
        beside = f" [dim]{aside}[/]" if aside else ""
        Console().print(f"[dim]...[/] {escape(text)}{beside}")


def last(text: str) -> None:
    """What a command ends with: where things are. Paths may hold what Rich takes for markup."""
    Console().print(text, soft_wrap=True, highlight=False, markup=False)


def timed() -> Tell:
    """Shows each step with the seconds since the one before it."""
    before = time.perf_counter()

    def tell(text: str) -> None:
        nonlocal before
        now = time.perf_counter()
        line(text, f"({now - before:.1f} s)")
        before = now

    return tell


def is_first_process() -> bool:
    """Whether this is the one of several processes that speaks."""
    return os.environ.get("RANK", "0") == "0"


def silent(text: str) -> None:
    """Nothing, where the output is for a script."""


def report(result: Report, out: Path, as_json: bool) -> None:
    """Comparison, accuracies, and how to load the model."""
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
        return
    console = Console()
    console.print(result.comparison, "", result, sep="\n")
    if result.given_back:
        console.print(f"Given back to keep the accuracy: {', '.join(result.given_back)}")
    console.print(
        f"\nModel, report and figure are in [bold]{escape(str(out))}[/]. To use the model:\n\n"
        f"    import pfsurgery\n"
        f"    model = pfsurgery.load({escape(repr(str(out / MODEL_FOLDER)))})\n"
        f"    logits = model(images)\n",
        soft_wrap=True,
        highlight=False,
    )
