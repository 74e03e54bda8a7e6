"""`pfsurgery study robustness`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from pfsurgery.cli import options, show
from pfsurgery.models import open_original
from pfsurgery.record import record
from pfsurgery.study.robustness import robustness as study


def robustness(
    model: options.Model,
    data: options.Data,
    out: Annotated[Path, typer.Option(help="Directory for the results.")],
    number: Annotated[
        int, typer.Option("--images", help="How many, spread over the validation part.", min=1)
    ] = 500,
    pretrained: options.Pretrained = True,
    checkpoint: Annotated[
        Path | None, typer.Option(help="File with the original's weights, in place of the hub.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Compare a converted model with its original under corruptions and attacks, and by Grad-CAM.

    Takes a directory that `pfsurgery convert` or `pfsurgery finetune` saved. Repeated with the same
    --out, it goes on where it was stopped.

    Example: pfsurgery study robustness --model fast/ --data imagenet/ --out robustness/
    """
    converted = options.opened(model, False, None, None, None)
    record(converted)
    original = open_original(converted, pretrained=pretrained, checkpoint=checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = study(
        original.to(device),
        converted.to(device),
        data,
        out,
        number=number,
        tell=show.silent if json else show.line,
    )
    options.emit(result, json, result.to_dict())
    if not json:
        show.last(f"results are in {out}")
