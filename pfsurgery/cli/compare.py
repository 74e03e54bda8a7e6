"""`pfsurgery compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pfsurgery.checkpoint import HUB
from pfsurgery.cli import options
from pfsurgery.convert import convert
from pfsurgery.measure import compare as compare_models


def compare(
    model: options.Model,
    after: Annotated[
        str | None, typer.Option(help="Second model, named as the first; or give --policy.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", "-p", help="Convert the first model by this policy.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Images in the example batch.", min=1)] = 1,
    channels_last: Annotated[bool, typer.Option(help="Time both in channels_last.")] = False,
    optimized: Annotated[
        bool, typer.Option(help="Fold norms and choose the layout of both first.")
    ] = False,
    repeats: Annotated[int, typer.Option(help="Timed rounds.", min=2)] = 20,
    figure: Annotated[Path | None, typer.Option(help="Write a PNG figure here.")] = None,
    num_classes: options.NumClasses = None,
    model_kwarg: options.ModelKwarg = None,
    size: options.Size = None,
    json: options.Json = False,
) -> None:
    """Measure two models side by side: parameters, MACs, latency, memory.

    Example: pfsurgery compare --model resnet50 --policy eff_max --batch 8 --channels-last
    """
    if (after is None) == (policy is None):
        raise typer.BadParameter("Give either --after MODEL or --policy POLICY.")
    before = options.opened(model, False, None, num_classes, model_kwarg, size)
    if policy is not None:
        chosen = options.planned(before, policy)
        fast = convert(before, chosen, example=options.example_of(before))
    else:
        # A saved model has arguments of its own.
        saved = str(after).startswith(HUB) or Path(str(after)).is_dir()
        classes, kwargs = (None, None) if saved else (num_classes, model_kwarg)
        fast = options.opened(str(after), False, None, classes, kwargs)
    result = compare_models(
        before,
        fast,
        options.example_of(before, batch),
        repeats=repeats,
        memory_format="channels_last" if channels_last else None,
        optimized=optimized,
    )
    if figure is not None:
        options.written(result.figure, figure)
    options.emit(result, json, result.to_dict())
