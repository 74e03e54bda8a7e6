"""One pass over the training images."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pfsurgery.batches import read, split_batch
from pfsurgery.errors import DataError, TrainingError
from pfsurgery.recover.config import EpochRecord, FinetuneConfig
from pfsurgery.recover.distill import recovery_loss
from pfsurgery.recover.evaluate import check_labels, logits_of
from pfsurgery.recover.progress import Show, Write

_STEPS_BETWEEN_CHECKS = 10


@dataclass(frozen=True, slots=True)
class Run:
    """What the steps of a run are made with.

    Attributes:
        student: The model, as prepared by the accelerator.
        teacher: In eval mode, on the accelerator's device.
        loader: Batches of training images.
        optimizer: As prepared by the accelerator.
        scheduler: timm's, counting steps.
        config: Settings.
        accelerator: Accelerate's.
        total: Step at which the run ends.
        write: Writes a record into the log.
    """

    student: nn.Module
    teacher: nn.Module | None
    loader: Iterable[Any]
    optimizer: Any
    scheduler: Any
    config: FinetuneConfig
    accelerator: Any
    total: int
    write: Write


class NotFiniteError(TrainingError):
    """A loss or weight is NaN or infinite.

    Args:
        reason: What is not finite.
        step: The step where it was found.
        epoch: The epoch, from 1.
        lr: Learning rate of that step.
    """

    def __init__(self, reason: str, step: int, epoch: int, lr: float) -> None:
        super().__init__(reason)
        self.reason, self.step, self.epoch, self.lr = reason, step, epoch, lr


def train_epoch(run: Run, *, epoch: int, step: int, show: Show) -> EpochRecord:
    """One pass over the training images, or less if the run's last step is reached.

    Args:
        run: What the steps are made with.
        epoch: Number of this epoch, from 1.
        step: Steps taken before.
        show: Told the step and a line of text now and then.

    Raises:
        NotFiniteError: A loss is NaN or infinite.
        DataError: There is no batch, or labels do not fit.
        TrainingError: The model or teacher does not return logits of the same classes.
    """
    accelerator, optimizer = run.accelerator, run.optimizer
    run.student.train()
    first, images_seen, loss_sum, lr = step, 0, 0.0, 0.0
    unchecked: list[tuple[int, float, Tensor]] = []
    began = time.perf_counter()

    def check() -> float:
        """Fetch the losses since the last check; this is the only place that waits for them."""
        losses = accelerator.reduce(torch.stack([loss for *_, loss in unchecked]), "mean").tolist()
        for (at, rate, _), loss in zip(unchecked, losses, strict=True):
            if not math.isfinite(loss):
                raise NotFiniteError(f"The loss is {loss}", at, epoch, rate)
        unchecked.clear()
        speed = images_seen * accelerator.num_processes / (time.perf_counter() - began)
        mean = sum(losses) / len(losses)
        show(step, f"epoch {epoch}  {speed:.0f} images/s  loss {mean:.4f}")
        run.write({"kind": "step", "step": step, "epoch": epoch, "lr": lr, "loss": mean,
               "images_per_s": round(speed, 1)})  # fmt: skip
        return math.fsum(losses)

    for batch in read(run.loader):
        images, labels = split_batch(batch)
        lr = optimizer.param_groups[0]["lr"]
        loss = _loss(run, images, labels, first=step == 0)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        run.scheduler.step_update(step)
        images_seen += len(images)
        unchecked.append((step, lr, loss.detach()))
        if len(unchecked) == _STEPS_BETWEEN_CHECKS:
            loss_sum += check()
        if step == run.total:
            break
    if step == first:
        raise DataError("There is no batch of training images in this epoch; give at least one.")
    if unchecked:
        loss_sum += check()
    speed = images_seen * accelerator.num_processes / (time.perf_counter() - began)
    return EpochRecord(epoch, step, loss_sum / (step - first), lr, speed, None)


def _loss(run: Run, images: Tensor, labels: Tensor | None, *, first: bool) -> Tensor:
    config, accelerator, teacher = run.config, run.accelerator, run.teacher
    if labels is None and (teacher is None or config.kd_weight < 1):
        raise DataError(
            "A batch has no labels. Give (images, labels), or a teacher and kd_weight=1."
        )
    memory_format = torch.channels_last if config.channels_last else torch.preserve_format
    images = images.to(accelerator.device, memory_format=memory_format, non_blocking=True)
    logits = logits_of(run.student, images)
    if labels is not None and (first or labels.device.type == "cpu"):
        check_labels(labels, logits)
    teacher_logits = None
    if teacher is not None and config.kd_weight > 0:
        with torch.no_grad(), accelerator.autocast():
            teacher_logits = logits_of(teacher, images)
        if teacher_logits.shape != logits.shape:
            raise TrainingError(
                f"The teacher gives {teacher_logits.shape[1]} classes and the model "
                f"{logits.shape[1]}. Give a teacher for the same classes, or none."
            )
    return recovery_loss(
        logits,
        None if labels is None else labels.to(accelerator.device, non_blocking=True),
        teacher_logits,
        temperature=config.temperature,
        kd_weight=config.kd_weight,
        label_smoothing=config.label_smoothing,
    )
