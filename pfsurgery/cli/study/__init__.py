"""`pfsurgery study`: one file a study."""

from __future__ import annotations

import typer

from pfsurgery.cli.study.layer import layer
from pfsurgery.cli.study.nas import nas
from pfsurgery.cli.study.robustness import robustness
from pfsurgery.cli.study.sensitivity import sensitivity

app = typer.Typer(
    no_args_is_help=True,
    help="Measure what sites and operations cost and gain.",
)
for command in (sensitivity, layer, nas, robustness):
    app.command()(command)
