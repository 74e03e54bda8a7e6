"""`pfsurgery study sensitivity`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pfsurgery.batches import first_images, unlabelled_images
from pfsurgery.cli import options, show
from pfsurgery.recover.state import writable_folder
from pfsurgery.study.figures import draw_sensitivity
from pfsurgery.study.sensitivity import OPS
from pfsurgery.study.sensitivity import sensitivity as measure_sensitivity
from pfsurgery.study.tables import sensitivity_table

FIGURE = "sensitivity.png"


def sensitivity(
    model: options.Model,
    data: options.Data,
    out: Annotated[Path, typer.Option(help="Run folder; a run that was stopped goes on in it.")],
    op: Annotated[
        list[str] | None,
        typer.Option("--op", help="Ops; max_pool, avg_pool, shift, identity. Repeatable."),
    ] = None,
    fitted: Annotated[int, typer.Option(help="Fitted bottlenecks a site.", min=0)] = 4,
    batch: Annotated[int, typer.Option(help="Images of a timed batch.", min=1)] = 8,
    pretrained: options.Pretrained = True,
    checkpoint: options.Checkpoint = None,
    number: options.Images = 500,
    top1: options.Top1 = False,
    include: options.Include = None,
    exclude: options.Exclude = None,
    num_classes: options.NumClasses = None,
    model_kwarg: options.ModelKwarg = None,
    size: options.Size = None,
    json: options.Json = False,
) -> None:
    """Change each site alone, in each way, repair it, and rank the changes by damage for gain.

    Example: pfsurgery study sensitivity --model resnet50 --data imagenet/ --out sensitivity/
    """
    writable_folder(out)
    net = options.opened(model, pretrained, checkpoint, num_classes, model_kwarg, size)
    rows = measure_sensitivity(
        net,
        first_images(unlabelled_images(data, net), number),
        ops=op or OPS,
        fitted=fitted,
        batch=batch,
        validate=options.validation(data, top1),
        include=include or None,
        exclude=exclude or None,
        out=out,
        tell=show.silent if json else show.timed(),
    )
    if not show.is_first_process():
        return
    options.written(lambda path: draw_sensitivity(rows, path), out / FIGURE)
    options.emit(sensitivity_table(rows), json, [asdict(row) for row in rows])
    if not json:
        show.last(f"Figure and rows are in {out}; pfsurgery report {out} shows them.")
