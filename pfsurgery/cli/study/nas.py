"""`pfsurgery study nas`."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from pfsurgery.cli import options as shared
from pfsurgery.cli.study import options
from pfsurgery.study.nas import FULL, SMALL, nas_study


def nas(
    out: options.Out,
    data: shared.Data = "digits",
    setting: options.Setting = "small",
    seeds: options.Seeds = None,
    epochs: options.Epochs = None,
    search_epochs: Annotated[
        int | None, typer.Option(help="Epochs of the search; a fifth trains weights only.", min=1)
    ] = None,
    images: options.Images = None,
    json: shared.Json = False,
) -> None:
    """Let each bottleneck choose its operation, then train the network found and its rivals.

    Example: pfsurgery study nas --data cifar10/ --out nas-study
    """
    chosen = options.changed(
        SMALL if setting == "small" else FULL, seeds=seeds, epochs=epochs, images=images
    )
    if search_epochs is not None:
        search = replace(chosen.search, epochs=search_epochs, warmup=search_epochs // 5)
        chosen = replace(chosen, search=search)
    result = nas_study(data, data, out, setting=chosen)
    shared.emit(result, json, result.to_dict())
