"""The command line: one file a command, no logic of its own."""

from __future__ import annotations

import signal
import sys
import warnings
from typing import Any

import typer
from rich.console import Console

from pfsurgery.cli.compare import compare
from pfsurgery.cli.convert import convert
from pfsurgery.cli.demo import demo
from pfsurgery.cli.evaluate import evaluate
from pfsurgery.cli.finetune import finetune
from pfsurgery.cli.listing import ops, policies
from pfsurgery.cli.plan import plan
from pfsurgery.cli.push import push
from pfsurgery.cli.recover import recover
from pfsurgery.cli.report import report
from pfsurgery.cli.scan import scan
from pfsurgery.cli.search import search
from pfsurgery.cli.show import is_first_process
from pfsurgery.cli.study import app as study
from pfsurgery.errors import SurgeryError, SurgeryWarning
from pfsurgery.recover.stop import StoppedError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Make trained vision models faster with parameter-free layers.",
)
for command in (
    *(demo, finetune, scan, plan, convert, recover, search, compare, report, push),
    *(ops, policies),
):
    app.command()(command)
app.command("eval")(evaluate)
app.add_typer(study, name="study")


def main() -> None:
    """Run the command line; an error that a user can mend ends in one message and exit code 2.

    A run that SIGTERM ended after it had saved exits with 143, as programs do on that signal.
    """
    warnings.showwarning = _show_warning
    try:
        app()
    except StoppedError as stopped:
        Console(stderr=True, soft_wrap=True).print(_escaped(str(stopped)))
        sys.exit(128 + signal.SIGTERM)
    except SurgeryError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]Error:[/] {_escaped(str(error))}")
        sys.exit(2)


def _show_warning(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, SurgeryWarning) and is_first_process():
        Console(stderr=True, soft_wrap=True).print(f"[yellow]Note:[/] {_escaped(str(message))}")


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
