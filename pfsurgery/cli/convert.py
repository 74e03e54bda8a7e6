"""`pfsurgery convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pfsurgery.checkpoint import save
from pfsurgery.cli import options
from pfsurgery.convert import convert as convert_model
from pfsurgery.record import record


def convert(
    model: options.Model,
    policy: options.Policy,
    out: Annotated[Path, typer.Option(help="Directory for the converted model.")],
    pretrained: options.Pretrained = True,
    checkpoint: options.Checkpoint = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    mixing: options.Mixing = "auto",
    num_classes: options.NumClasses = None,
    model_kwarg: options.ModelKwarg = None,
    size: options.Size = None,
) -> None:
    """Convert a model and save it, without any recovery.

    Example: pfsurgery convert --model resnet50 --policy maxpool_deep --out fast/
    """
    net = options.opened(model, pretrained, checkpoint, num_classes, model_kwarg)
    chosen = options.planned(
        net, policy, size=size, include=include, exclude=exclude, mixing=mixing
    )
    fast = convert_model(net, chosen, example=options.example_of(net, size))
    save(fast, out)
    changed = len(record(fast).plans[-1].replaced)
    Console().print(f"{changed} of {len(chosen)} sites replaced; saved to {out}", soft_wrap=True)
