"""What a run is made with: optimiser, schedule, averages, compiled models."""

from __future__ import annotations

from typing import Any

from torch import nn

from pfsurgery.errors import DataError, TrainingError
from pfsurgery.modules import number_of_classes
from pfsurgery.recover.compilation import compiled
from pfsurgery.recover.config import FinetuneConfig
from pfsurgery.recover.epoch import Run
from pfsurgery.recover.guide import Guide
from pfsurgery.recover.match import Match, match_blocks, match_stages
from pfsurgery.recover.objective import Objective, check_pairs, on_device
from pfsurgery.recover.optimizer import make_optimizer, make_schedule
from pfsurgery.recover.order import TrainBatches
from pfsurgery.recover.progress import Write
from pfsurgery.recover.ramp import Ramp
from pfsurgery.recover.remembered import RememberedLogits
from pfsurgery.recover.sharding import shard


def build_run(
    model: nn.Module,
    teacher: nn.Module | None,
    batches: TrainBatches,
    config: FinetuneConfig,
    accelerator: Any,
    write: Write,
    sharding: Any = None,
) -> Run:
    """Everything that steps are made with; the models must be on the accelerator's device.

    With `sharding`, of `pfsurgery.recover.sharding`, the model is split over the processes.
    """
    steps_per_epoch, total = _planned_steps(batches, config)
    average = _average(model, config, sharding)
    matches = () if teacher is None else _matches(model, teacher, config)
    ramp = None
    if config.ramp and teacher is not None:
        ramp = Ramp(model, teacher, round(config.ramp * total))
    mixed = config.mixup or config.cutmix
    if mixed and batches.order is not None:
        for size in sorted(batches.order.sizes):
            check_pairs(size)
    guide = None if teacher is None else Guide(teacher, config, accelerator)
    remembered = None
    alone = accelerator.num_processes == 1 and not (matches or mixed)
    if config.teacher_cache and config.kd_weight and guide is not None and alone:
        remembered = RememberedLogits(
            lambda images: guide(on_device(images, model, config, accelerator)), batches.start(1, 0)
        )
    if sharding is None:
        student, optimizer = accelerator.prepare(model, make_optimizer(model, config))
    else:
        student, optimizer = _sharded(model, config, accelerator, sharding)
    return Run(
        model=model,
        objective=Objective(
            compiled(student, config),
            guide,
            config,
            accelerator,
            matches,
            _classes(model) if mixed else None,
            remembered,
        ),
        batches=batches,
        optimizer=optimizer,
        scheduler=make_schedule(optimizer, config, total=total, steps_per_epoch=steps_per_epoch),
        ema=average,
        ramp=ramp,
        config=config,
        accelerator=accelerator,
        sharded=sharding is not None,
        total=total,
        write=write,
    )


def _matches(
    model: nn.Module, teacher: nn.Module, config: FinetuneConfig
) -> tuple[tuple[float, Match], ...]:
    wanted = ((config.match_weight, match_blocks), (config.stage_weight, match_stages))
    return tuple((weight, match(model, teacher)) for weight, match in wanted if weight)


def _sharded(
    model: nn.Module, config: FinetuneConfig, accelerator: Any, sharding: Any
) -> tuple[nn.Module, Any]:
    """The model, sharded in place, and an optimizer over its shards."""
    from accelerate.utils import convert_outputs_to_fp32

    shard(model, sharding)
    model.forward = convert_outputs_to_fp32(accelerator.autocast()(model.forward))
    return model, accelerator.prepare_optimizer(make_optimizer(model, config, sharded=True))


def _average(model: nn.Module, config: FinetuneConfig, sharding: Any) -> Any:
    """A moving average by timm, whose decay rises in the first steps; None without."""
    if not config.ema:
        return None
    from timm.utils import ModelEmaV3

    # shards and buffers, which are whole, cannot be averaged in one call
    average = ModelEmaV3(model, decay=config.ema, use_warmup=True, foreach=sharding is None)
    if sharding is not None:
        shard(average.module, sharding)
    return average


def _classes(model: nn.Module) -> int:
    number = number_of_classes(model)
    if number is None:
        raise TrainingError(
            "mixup and cutmix need the number of classes, which the model does not tell: set "
            "model.num_classes."
        )
    return number


def _planned_steps(batches: TrainBatches, config: FinetuneConfig) -> tuple[int, int]:
    """Steps of one epoch and of all."""
    try:
        number = len(batches)
    except TypeError:
        if config.max_steps is None:
            raise DataError(
                "The training images have no length, so the learning rate cannot be planned; set "
                "max_steps."
            ) from None
        return config.max_steps, config.max_steps
    if not number:
        raise DataError("There is no batch of training images; give at least one.")
    steps = max(1, number // config.accumulate)
    return steps, min(steps * config.epochs, config.max_steps or steps * config.epochs)
