"""`pfsurgery convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pfsurgery.batches import first_images, unlabelled_images
from pfsurgery.checkpoint import save
from pfsurgery.cli import options, show
from pfsurgery.convert import convert as convert_model
from pfsurgery.errors import PolicyError
from pfsurgery.record import record
from pfsurgery.recover.state import writable_folder
from pfsurgery.tables import fit_table


def convert(
    model: options.Model,
    policy: options.Policy,
    out: Annotated[Path, typer.Option(help="Directory for the converted model.")],
    pretrained: options.Pretrained = True,
    checkpoint: options.Checkpoint = None,
    macs: options.Macs = None,
    params: options.Params = None,
    latency: options.Latency = None,
    thin: options.Thin = True,
    pointwise: options.Pointwise = False,
    data: Annotated[
        str | None, typer.Option(help="For --policy budget or bare: images, labels are not used.")
    ] = None,
    number: options.Images = 2000,
    include: options.Include = None,
    exclude: options.Exclude = None,
    mixing: options.Mixing = "auto",
    figure: Annotated[
        Path | None, typer.Option(help="For --policy budget: draw the fitted sites as PNG here.")
    ] = None,
    num_classes: options.NumClasses = None,
    model_kwarg: options.ModelKwarg = None,
    size: options.Size = None,
) -> None:
    """Convert a model and save it, without recovery unless the policy is fitted to images.

    Example: pfsurgery convert --model resnet50 --policy maxpool_deep --out fast/

    Example: pfsurgery convert --model resnet50 --policy budget --macs 60% --data imagenet/ --out f/
    """
    if data is not None and policy not in options.FITTED:
        raise PolicyError(
            f"--data goes with --policy {' or '.join(options.FITTED)}, which are fitted to images. "
            f"To win accuracy back after another one, use pfsurgery recover or finetune."
        )
    if figure is not None and policy not in options.FITTED:
        raise PolicyError(
            f"--figure draws the sites that are fitted to images: it goes with --policy "
            f"{' or '.join(options.FITTED)}."
        )
    writable_folder(out)
    net = options.opened(model, pretrained, checkpoint, num_classes, model_kwarg, size)
    chosen, sites = options.chosen(
        net,
        policy,
        macs=macs,
        params=params,
        latency=latency,
        thin=thin,
        pointwise=pointwise,
        include=include,
        exclude=exclude,
        mixing=mixing,
    )
    fast = convert_model(
        net,
        chosen,
        example=options.example_of(net),
        images=None if data is None else first_images(unlabelled_images(data, net), number),
        tell=show.timed(),
        **sites,
    )
    save(fast, out)
    done = record(fast).plans[-1]
    if any(d.structure for d in done):
        Console().print(fit_table(done))
    if figure is not None:
        options.written(done.figure, figure)
    show.last(f"{len(done.replaced)} of {len(done)} sites replaced; saved to {out}")
