"""`pfsurgery recover`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pfsurgery.batches import first_images, unlabelled_images
from pfsurgery.checkpoint import save
from pfsurgery.cli import options, show
from pfsurgery.convert import convert
from pfsurgery.errors import PolicyError
from pfsurgery.models import open_original
from pfsurgery.record import record
from pfsurgery.recover import reconstruct
from pfsurgery.recover.state import writable_folder
from pfsurgery.tables import refit_table


def recover(
    model: options.Model,
    data: options.Data,
    out: Annotated[Path, typer.Option(help="Directory for the recovered model.")],
    policy: Annotated[
        str | None,
        typer.Option("--policy", "-p", help="Convert --model first, by this policy or plan."),
    ] = None,
    pretrained: options.Pretrained = True,
    checkpoint: Annotated[
        Path | None, typer.Option(help="File with the original's weights, in place of the hub.")
    ] = None,
    number: options.Images = 2000,
    include: options.Include = None,
    exclude: options.Exclude = None,
    mixing: options.Mixing = "auto",
    num_classes: options.NumClasses = None,
    model_kwarg: options.ModelKwarg = None,
    size: options.Size = None,
    json: options.Json = False,
) -> None:
    """Win accuracy back without training: norms and pointwise layers, fitted to unlabelled images.

    Takes a directory that `pfsurgery convert` saved, or a model and a policy.

    Example: pfsurgery recover --model fast/ --data imagenet/ --out better/

    Example: pfsurgery recover --model resnet50 --policy maxpool_deep --data imagenet/ --out fast/
    """
    if policy in options.FITTED:
        raise PolicyError(
            f"{policy} is fitted to images while it converts, which leaves nothing to recover: "
            f"use pfsurgery convert."
        )
    if policy is None and (include or exclude or mixing != "auto"):
        raise PolicyError(
            "--include, --exclude and --mixing go with --policy; without one, the model was "
            "converted before."
        )
    writable_folder(out)
    if policy is None:
        fast = options.opened(model, False, None, num_classes, model_kwarg, size)
        record(fast)
        original = open_original(fast, pretrained=pretrained, checkpoint=checkpoint)
    else:
        original = options.opened(model, pretrained, checkpoint, num_classes, model_kwarg, size)
        chosen = options.planned(original, policy, include=include, exclude=exclude, mixing=mixing)
        fast = convert(original, chosen, example=options.example_of(original))
    images = first_images(unlabelled_images(data, fast), number)
    refits = reconstruct(fast, original, images, tell=show.silent if json else show.timed())
    save(fast, out)
    options.emit(refit_table(refits), json, [asdict(refit) for refit in refits])
    if not json:
        show.last(f"saved to {out}")
