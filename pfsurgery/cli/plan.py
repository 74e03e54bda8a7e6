"""`pfsurgery plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pfsurgery.cli import options


def plan(
    model: options.Model,
    policy: options.Policy,
    out: Annotated[Path | None, typer.Option(help="Write the plan to this .json file.")] = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    mixing: options.Mixing = "auto",
    num_classes: options.NumClasses = None,
    model_kwarg: options.ModelKwarg = None,
    size: options.Size = None,
    json: options.Json = False,
) -> None:
    """Show what a policy would do to each site; nothing is changed.

    Example: pfsurgery plan --model resnet50 --policy eff_hybrid --exclude "layer1.*"
    """
    net = options.opened(model, False, None, num_classes, model_kwarg, size)
    chosen = options.planned(net, policy, include=include, exclude=exclude, mixing=mixing)
    if out is not None:
        options.written(lambda file: file.write_text(chosen.to_json(), encoding="utf-8"), out)
    options.emit(chosen, json, chosen.to_dict())
