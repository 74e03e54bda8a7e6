"""`pfsurgery study`: one file a study."""

from __future__ import annotations

import typer

from pfsurgery.cli.study.robustness import robustness
from pfsurgery.cli.study.sensitivity import sensitivity

app = typer.Typer(
    no_args_is_help=True,
    help="Measure what sites and operations cost and gain.",
)
app.command()(sensitivity)
app.command()(robustness)
