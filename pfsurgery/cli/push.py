"""`pfsurgery push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pfsurgery.cli import show
from pfsurgery.hub import push as push_model


def push(
    directory: Annotated[Path, typer.Argument(help="Folder that pfsurgery saved.")],
    name: Annotated[str, typer.Argument(help="USER/NAME on the hub; made if it is missing.")],
    private: Annotated[bool, typer.Option("--private", help="Only its owner sees it.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload converted model",
    cache: Annotated[
        Path | None,
        typer.Option(help="Write to this local cache of the hub in place of the hub."),
    ] = None,
) -> None:
    """Upload a converted model with its card to the Hugging Face hub.

    Example: pfsurgery push fast/model user/fast-resnet50
    """
    where = push_model(directory, name, private=private, message=message, cache=cache)
    show.last(f'{directory} is now {where}; load it with pfsurgery.load("hf-hub:{name}")')
