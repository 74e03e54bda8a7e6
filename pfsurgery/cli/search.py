"""`pfsurgery search`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pfsurgery.batches import first_images, unlabelled_images
from pfsurgery.checkpoint import save
from pfsurgery.cli import options, show
from pfsurgery.errors import PolicyError
from pfsurgery.recover import Budget, budget
from pfsurgery.recover.state import writable_folder
from pfsurgery.study.bench import Found
from pfsurgery.study.search import OPS, search_front
from pfsurgery.study.search import search as search_model
from pfsurgery.study.tables import found_table

MODEL = "model"
_METHODS = ("programme", "optuna")
_TRIALS = 50


def search(
    model: options.Model,
    budget: Annotated[
        str,
        typer.Option(
            help="What the result may cost: macs=25%, params=40%, latency=60% or numbers."
        ),
    ],
    data: options.Data,
    out: Annotated[Path, typer.Option(help="Directory for the model and all that was measured.")],
    method: Annotated[
        str, typer.Option(help="programme (minutes) or optuna (as many networks as --trials).")
    ] = "programme",
    trials: Annotated[
        int | None, typer.Option(help="For optuna: networks in all (50).", min=1)
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="For optuna: a .db or .log file or a database URL that machines share; --out has "
            "its own otherwise."
        ),
    ] = None,
    op: Annotated[
        list[str] | None,
        typer.Option("--op", help="Ops that compete too; max_pool and avg_pool. Repeatable."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Images of a timed batch.", min=1)] = 8,
    thin: options.Thin = True,
    pretrained: options.Pretrained = True,
    checkpoint: options.Checkpoint = None,
    number: options.Images = 2000,
    top1: options.Top1 = False,
    include: options.Include = None,
    exclude: options.Exclude = None,
    num_classes: options.NumClasses = None,
    model_kwarg: options.ModelKwarg = None,
    size: options.Size = None,
) -> None:
    """Convert within a budget that is spent by the measured damage of each site's forms.

    Run it again with the same --out to go on where it was stopped.

    Example: pfsurgery search --model resnet50 --budget latency=60% --data imagenet/ --out run/

    Example: pfsurgery search -m resnet50 --budget macs=40% --data DIR --out run/ --method optuna
    """
    if method not in _METHODS:
        raise PolicyError(f"--method is {' or '.join(_METHODS)}, not {method!r}.")
    if method != "optuna" and (trials is not None or storage is not None):
        raise PolicyError("--trials and --storage go with --method optuna.")
    policy = _policy(budget, batch, thin)
    writable_folder(out)
    net = options.opened(model, pretrained, checkpoint, num_classes, model_kwarg, size)
    images = first_images(unlabelled_images(data, net), number)
    work: Callable[..., Found] = search_model
    if method == "optuna":
        work = partial(search_front, trials=trials or _TRIALS, storage=storage)
    found = work(
        net,
        policy,
        images,
        ops=op or OPS,
        validate=options.validation(data, top1),
        include=include or None,
        exclude=exclude or None,
        out=out,
        tell=show.timed(),
    )
    save(found.model, out / MODEL)
    Console().print(found_table(found))
    show.last(f"The model is in {out / MODEL}; pfsurgery report {out} shows the search.")


def _policy(text: str, batch: int, thin: bool) -> Budget:
    key, equals, amount = text.partition("=")
    if not equals or key not in ("macs", "params", "latency"):
        raise PolicyError(
            f"--budget is macs=AMOUNT, params=AMOUNT or latency=AMOUNT, such as macs=25%, "
            f"not {text!r}."
        )
    limit = {key: amount}
    return budget(**limit, batch=batch, thin=thin)  # type: ignore[arg-type]
