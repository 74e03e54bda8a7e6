"""`pfsurgery study`: one file a study."""

from __future__ import annotations

import typer

from pfsurgery.cli.study.layer import layer
from pfsurgery.cli.study.nas import nas

app = typer.Typer(
    no_args_is_help=True,
    help="Measure what sites and operations cost and gain.",
)
app.command()(layer)
app.command()(nas)
