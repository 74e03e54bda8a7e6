"""`pfsurgery finetune`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pfsurgery.cli import options, show
from pfsurgery.data import open_data
from pfsurgery.job import run_job, writable
from pfsurgery.recover import FinetuneConfig


def finetune(
    model: options.Model,
    policy: options.Policy,
    data: options.Data,
    out: Annotated[Path, typer.Option(help="Directory for model, report and log.")],
    pretrained: options.Pretrained = True,
    checkpoint: options.Checkpoint = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Images in a batch, a process.", min=1)] = 64,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
    optimizer: Annotated[str, typer.Option(help="timm's name of the optimizer.")] = "adamw",
    weight_decay: Annotated[float, typer.Option(help="Weight decay.")] = 0.02,
    kd_weight: Annotated[
        float, typer.Option(help="Share of the teacher in the loss, from 0 to 1.")
    ] = 0.7,
    temperature: Annotated[float, typer.Option(help="Of the distillation.")] = 2.0,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
    mixed_precision: Annotated[str, typer.Option(help="no or bf16.")] = "no",
    channels_last: Annotated[bool, typer.Option(help="Train in channels_last.")] = False,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Processes that read images.", min=0)] = None,
    macs: options.Macs = None,
    params: options.Params = None,
    latency: options.Latency = None,
    thin: options.Thin = True,
    pointwise: options.Pointwise = False,
    include: options.Include = None,
    exclude: options.Exclude = None,
    mixing: options.Mixing = "auto",
    num_classes: options.NumClasses = None,
    model_kwarg: options.ModelKwarg = None,
    json: options.Json = False,
) -> None:
    """Convert a model, win its accuracy back with the original as teacher, report what was saved.

    Example: pfsurgery finetune --model resnet50 --policy maxpool_deep --data imagenet/ --out fast/
    """
    config = FinetuneConfig(
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        lr=lr,
        weight_decay=weight_decay,
        temperature=temperature,
        kd_weight=kd_weight,
        mixed_precision=mixed_precision,  # type: ignore[arg-type]
        channels_last=channels_last,
        seed=seed,
        max_steps=max_steps,
    )
    writable(out)
    original = options.opened(model, pretrained, checkpoint, num_classes, model_kwarg)
    images = open_data(data, original, batch_size=batch_size, workers=workers)
    chosen, sites = options.chosen(
        original,
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
    _, report = run_job(
        original,
        chosen,
        train=images.train,
        val=images.val,
        out=out,
        config=config,
        tell=show.silent if json else show.line,
        **sites,
    )
    show.report(report, out, json)
