"""`pfsurgery report`."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from pfsurgery.cli import show
from pfsurgery.report import write_report


def report(
    run: Annotated[
        Path, typer.Argument(help="Folder that a study, a search or a fine-tuning wrote.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The page; by default report.html in the folder.")
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
) -> None:
    """Make one web page of a run folder: tables, figures, the plan, the command that repeats it.

    Example: pfsurgery report runs/r50 --open
    """
    page = write_report(run, out)
    show.last(f"The report is in {page}.")
    if open_it:
        webbrowser.open(page.resolve().as_uri())
