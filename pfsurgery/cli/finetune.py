"""`pfsurgery finetune`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pfsurgery.cli import options, show
from pfsurgery.cli.settings import with_settings
from pfsurgery.data import Augmentation, open_data
from pfsurgery.job import run_job
from pfsurgery.recover.compilation import check_backend
from pfsurgery.recover.config_file import read_config
from pfsurgery.recover.optimizer import check_optimizer
from pfsurgery.recover.processes import first_process_first
from pfsurgery.recover.state import writable_folder


@with_settings
def finetune(
    model: options.Model,
    policy: options.Policy,
    data: options.Data,
    out: Annotated[Path, typer.Option(help="Directory for model, report, log and checkpoints.")],
    settings: dict[str, Any],
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file of settings; the options below go before it."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue in --out, or begin if nothing is there.")
    ] = False,
    number: Annotated[
        int,
        typer.Option("--images", help="Training images to refit with, up to 400 MB.", min=1),
    ] = 1000,
    pretrained: options.Pretrained = True,
    checkpoint: options.Checkpoint = None,
    workers: Annotated[int | None, typer.Option(help="Processes that read images.", min=0)] = None,
    in_memory: Annotated[
        bool, typer.Option("--in-memory", help="Decode all images once and keep them.")
    ] = False,
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
    size: options.Size = None,
    json: options.Json = False,
) -> None:
    """Convert a model, win its accuracy back with the original as teacher, report what was saved.

    Example: pfsurgery finetune --model resnet50 --policy maxpool_deep --data imagenet/ --out fast/

    On several GPUs: torchrun --nproc-per-node 8 -m pfsurgery.cli finetune ...
    """
    chosen_settings = read_config(config, settings)
    check_optimizer(chosen_settings)
    check_backend(chosen_settings)
    writable_folder(out)
    with first_process_first():  # what is downloaded is there for the others
        original = options.opened(model, pretrained, checkpoint, num_classes, model_kwarg, size)
        images = open_data(
            data,
            original,
            batch_size=chosen_settings.batch_size,
            workers=workers,
            labelled=chosen_settings.kd_weight < 1,
            in_memory=in_memory,
            augmentation=Augmentation(chosen_settings.crop_scale, chosen_settings.auto_augment),
        )
    if not json:
        height, width = images.input_size[-2:]
        show.line(f"reading {data} at {height}x{width} pixels")
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
        config=chosen_settings,
        images=number,
        resume=resume,
        tell=show.silent if json else show.line,
        **sites,
    )
    if show.is_first_process():
        show.report(report, out, json)
