"""Fine-tuning a converted model, with the untouched one as its teacher."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pfsurgery.batches import (
    Images,
    open_images,
    report_skipped,
    skipped_images,
)
from pfsurgery.errors import DataError, SurgeryError, TrainingError, UnknownNameError, closest
from pfsurgery.recover.config import EpochRecord, FinetuneConfig, FinetuneResult
from pfsurgery.recover.epoch import NotFiniteError, Run, train_epoch
from pfsurgery.recover.evaluate import Accuracy, score
from pfsurgery.recover.progress import json_lines, progress_bar
from pfsurgery.recover.state import (
    copy_weights,
    keep_random_state,
    keep_train_flags,
    non_finite,
    placement,
    restore_weights,
    writable_folder,
    write_weights,
)

_log = logging.getLogger(__name__)

_WEIGHTS_FILE = "last_good.safetensors"
_LOG_FILE = "log.jsonl"


def finetune(
    model: nn.Module,
    *,
    train: Images | str | Path,
    val: Images | str | Path | None = None,
    teacher: nn.Module | None = None,
    config: FinetuneConfig | None = None,
    out: str | Path | None = None,
    progress: bool | None = None,
) -> FinetuneResult:
    """Train `model` in place, from the labels and from what `teacher` says about the same images.

    The loss is `(1 - kd_weight) * cross-entropy + kd_weight * KL` (see
    `pfsurgery.recover.distill`). Accelerate chooses the device (CUDA when there is one) and
    spreads a `DataLoader` over the processes of `accelerate launch` or `torchrun`. Optimiser and
    cosine schedule are timm's. Convert before you call this: the optimiser is made here.

    Afterwards the model holds the weights of the last step (the best ones are in `out`), stays on
    the device where it was trained, and has its train flags back; the teacher is as it was. The
    global random states are put back. After an error the model holds the last good weights: those
    of the best epoch so far, or the ones it came with. On a CPU, the same model, data, seed and
    number of threads give the same weights, bit for bit.

    Args:
        model: A classifier with something left to train: (N, C, H, W) -> (N, classes).
        train: Training images: a path or name that `pfsurgery.data.open_data` understands, a
            `Dataset` of (image, label), a `DataLoader`, or any iterable of (images, labels) that
            can be iterated again. Images are (N, C, H, W), labels (N,) class indices; with a
            teacher and `kd_weight=1` the labels may be missing.
        val: Validation images with labels, of the same kinds; the accuracy on them is taken after
            each epoch.
        teacher: The model as it was before surgery, or any other with the same classes.
        config: Settings; the defaults of `FinetuneConfig` if None.
        out: Folder for `log.jsonl` (one JSON object a line, appended) and
            `last_good.safetensors`, the weights of the best epoch so far (by top-1 on `val`, else
            the latest), replaced in one step so that a crash never leaves half a file.
        progress: Whether to show a progress bar with images/s, loss, accuracy and time left; None
            means where a terminal is attached.

    Raises:
        TrainingError: The loss or the weights are no longer finite, `out` cannot be written to,
            nothing can be trained, or the teacher does not go with the model.
        DataError: The images cannot be opened, there are none, or labels do not fit the model.
        UnknownNameError: timm has no optimiser of that name.
    """
    started = time.perf_counter()
    config = config or FinetuneConfig()
    _check(model, teacher, config)
    folder = None if out is None else writable_folder(out)
    train_loader = open_images(train, model, training=True, batch_size=config.batch_size)
    val_loader = (
        None
        if val is None
        else open_images(val, model, training=False, batch_size=config.batch_size)
    )
    models = (model,) if teacher is None else (model, teacher)
    with keep_random_state(), keep_train_flags(*models), _accelerator(model, config) as accelerator:
        home = placement(teacher)[0] if teacher is not None else None
        try:
            history, best = _run(
                model, teacher, train_loader, val_loader, config, accelerator, folder, progress
            )
        finally:
            if teacher is not None:
                teacher.to(home)
    report_skipped(train_loader)
    return FinetuneResult(
        history=tuple(history),
        steps=history[-1].step,
        seconds=time.perf_counter() - started,
        last=history[-1].val,
        best=best,
        weights=None if folder is None else folder / _WEIGHTS_FILE,
        skipped=skipped_images(train_loader),
    )


def _check(model: nn.Module, teacher: nn.Module | None, config: FinetuneConfig) -> None:
    if teacher is model:
        raise TrainingError(
            "The teacher is the model itself. Give the model as it was before the conversion: "
            "convert returns a copy, and leaves the one that it was given untouched."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError("No parameter of the model requires a gradient, so none is trained.")
    check_optimizer(config)


def check_optimizer(config: FinetuneConfig) -> None:
    """Raise an UnknownNameError where timm has no optimizer of that name."""
    from timm.optim import list_optimizers

    names = list_optimizers()
    if config.optimizer.lower() not in names:
        raise UnknownNameError(
            f"timm has no optimizer {config.optimizer!r}. {closest(config.optimizer, names)}"
        )


@contextmanager
def _accelerator(model: nn.Module, config: FinetuneConfig) -> Iterator[Any]:
    """An Accelerator that leaves neither a wrapper on the model nor its precision to the next."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import set_seed

    shared = bool(AcceleratorState._shared_state)
    own_forward = "forward" in vars(model)
    try:
        # Accelerate joins processes without a GPU only when it is told to use the CPU
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision, cpu=not torch.accelerator.is_available()
        )
    except ValueError as error:
        raise TrainingError(
            f"This process already uses Accelerate with another precision than "
            f"mixed_precision={config.mixed_precision!r}: {error}"
        ) from error
    set_seed(config.seed)
    try:
        yield accelerator
    finally:
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        if not own_forward:
            vars(model).pop("forward", None)
        accelerator.free_memory()
        if not shared:
            AcceleratorState._reset_state()


def _run(
    model: nn.Module,
    teacher: nn.Module | None,
    train: Iterable[Any],
    val: Iterable[Any] | None,
    config: FinetuneConfig,
    accelerator: Any,
    folder: Path | None,
    progress: bool | None,
) -> tuple[list[EpochRecord], Accuracy | None]:
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    model.to(accelerator.device)
    model.train()
    if teacher is not None:
        teacher.to(accelerator.device).eval()
    optimizer = create_optimizer_v2(
        model, opt=config.optimizer, lr=config.lr, weight_decay=config.weight_decay
    )
    student, optimizer = accelerator.prepare(model, optimizer)
    train, val = _spread(train, accelerator), _spread(val, accelerator)
    total = _total_steps(train, config)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=total,
        warmup_epochs=round(config.warmup * total),
        warmup_lr=config.lr / 100,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    main = accelerator.is_main_process
    write = json_lines(folder / _LOG_FILE if folder is not None and main else None)
    write({"kind": "start", "steps": total, "config": asdict(config)})

    run = Run(student, teacher, train, optimizer, scheduler, config, accelerator, total, write)
    good = copy_weights(model)
    history: list[EpochRecord] = []
    best: Accuracy | None = None
    try:
        with progress_bar(total, progress if main else False) as show:
            step = 0
            while step < total:
                record = train_epoch(run, epoch=len(history) + 1, step=step, show=show)
                step = record.step
                if val is not None:
                    record = _with_accuracy(record, run, val)
                weights = copy_weights(model)
                _check_finite(record, weights)
                if record.val is None or best is None or record.val.top1 >= best.top1:
                    good, best = weights, record.val
                    if folder is not None and main:
                        write_weights(good, folder / _WEIGHTS_FILE)
                history.append(record)
                write({"kind": "epoch", **asdict(record)})
                _log.info("epoch %d: %s", record.epoch, record)
    except NotFiniteError as stop:
        restore_weights(model, good)
        where = "its starting weights" if not history else "the best weights so far"
        if history and folder is not None:
            where += f", which are also in {folder / _WEIGHTS_FILE}"
        write({"kind": "stopped", "step": stop.step, "lr": stop.lr, "reason": stop.reason})
        raise TrainingError(
            f"{stop.reason} at step {stop.step} of {total} (epoch {stop.epoch}), with a learning "
            f"rate of {stop.lr:.3g}. The model was set back to {where}. Try a lower lr, a longer "
            f"warmup, or mixed_precision='no'."
        ) from None
    except SurgeryError:
        restore_weights(model, good)
        raise
    return history, best


def _spread(loader: Any, accelerator: Any) -> Any:
    if loader is None or isinstance(loader, DataLoader):
        return None if loader is None else accelerator.prepare_data_loader(loader)
    if accelerator.num_processes > 1:
        raise DataError(
            f"A {type(loader).__name__} of batches cannot be spread over "
            f"{accelerator.num_processes} processes; give a DataLoader, a Dataset or a path."
        )
    return loader


def _total_steps(loader: Any, config: FinetuneConfig) -> int:
    try:
        steps = len(loader) * config.epochs
    except TypeError:
        if config.max_steps is None:
            raise DataError(
                "The training images have no length, so the learning rate cannot be planned; set "
                "max_steps."
            ) from None
        return config.max_steps
    if not steps:
        raise DataError("There is no batch of training images; give at least one.")
    return min(steps, config.max_steps or steps)


def _with_accuracy(record: EpochRecord, run: Run, val: Iterable[Any]) -> EpochRecord:
    gather = run.accelerator.gather_for_metrics if run.accelerator.num_processes > 1 else None
    accuracy = score(run.student, val, channels_last=run.config.channels_last, gather=gather)
    return replace(record, val=accuracy)


def _check_finite(record: EpochRecord, weights: dict[str, Tensor]) -> None:
    reason = None
    if name := non_finite(weights):
        reason = f"The weight {name} is no longer finite"
    elif record.val is not None and not math.isfinite(record.val.loss):
        reason = f"The validation loss is {record.val.loss}"
    if reason is not None:
        raise NotFiniteError(reason, record.step, record.epoch, record.lr)
