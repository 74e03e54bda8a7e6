"""One pass over the training images."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pfsurgery.batches import read
from pfsurgery.errors import DataError, TrainingError
from pfsurgery.recover.config import EpochRecord, FinetuneConfig
from pfsurgery.recover.objective import Objective
from pfsurgery.recover.optimizer import set_rate
from pfsurgery.recover.order import TrainBatches, seed_step
from pfsurgery.recover.progress import Show, Write
from pfsurgery.recover.ramp import Ramp
from pfsurgery.recover.snapshot import Position
from pfsurgery.recover.state import keep_random_state


@dataclass(frozen=True, slots=True)
class Run:
    """What the steps of a run are made with.

    Attributes:
        model: The model itself, without any wrapper; with FSDP the copy that is sharded.
        objective: Gives the loss of a batch; its `student` is the prepared model.
        batches: Training images.
        optimizer: As prepared by the accelerator.
        scheduler: timm's, counting steps.
        ema: timm's moving average of the model, if there is one.
        ramp: Of a gradual conversion, if there is one.
        config: Settings.
        accelerator: Accelerate's.
        sharded: Whether the model is split over processes.
        total: Step at which the run ends.
        write: Writes a record into the log.
    """

    model: nn.Module
    objective: Objective
    batches: TrainBatches
    optimizer: Any
    scheduler: Any
    ema: Any
    ramp: Ramp | None
    config: FinetuneConfig
    accelerator: Any
    sharded: bool
    total: int
    write: Write

    @property
    def result(self) -> nn.Module:
        """What is evaluated and kept: the moving average, or the model where there is none."""
        averaged: nn.Module = self.model if self.ema is None else self.ema.module
        return averaged


class DivergedError(TrainingError):
    """A loss or weight is not finite, or the loss explodes.

    Args:
        reason: What happened.
        step: The step where it was found.
        epoch: The epoch, from 1.
        lr: Learning rate of that step.
    """

    def __init__(self, reason: str, step: int, epoch: int, lr: float) -> None:
        super().__init__(reason)
        self.reason, self.step, self.epoch, self.lr = reason, step, epoch, lr


class LossWindow:
    """The losses since the last line of the log; fetching them is what waits for the device."""

    def __init__(self, run: Run, at: Position, show: Show) -> None:
        self.run, self.at, self.show = run, at, show
        self.losses: list[tuple[int, float, Tensor]] = []
        self.images = 0
        self.began = time.perf_counter()

    @property
    def speed(self) -> float:
        """Images per second over all processes, since the window was made."""
        seconds = time.perf_counter() - self.began
        return float(self.images * self.run.accelerator.num_processes / seconds)

    def close(self) -> None:
        """Check the losses, add them to the epoch's, write a line of the log.

        Raises:
            DivergedError: One is not finite, or their mean explodes.
        """
        if not self.losses:
            return
        at, run = self.at, self.run
        values = run.accelerator.reduce(torch.stack([loss for *_, loss in self.losses]), "mean")
        losses: list[float] = values.tolist()
        for (step, rate, _), loss in zip(self.losses, losses, strict=True):
            if not math.isfinite(loss):
                raise DivergedError(f"The loss is {loss}", step, at.epoch, rate)
        mean, (step, lr, _) = math.fsum(losses) / len(losses), self.losses[-1]
        if at.lowest is not None and mean > run.config.explosion * max(1.0, at.lowest):
            raise DivergedError(
                f"The loss rose to {mean:.3g} from {at.lowest:.3g}", step, at.epoch, lr
            )
        at.lowest = mean if at.lowest is None else min(at.lowest, mean)
        at.loss_sum, at.losses = at.loss_sum + math.fsum(losses), at.losses + len(losses)
        self.losses.clear()
        self.show(step, f"{self.speed:.0f} images/s  loss {mean:.3f}")
        run.write({"kind": "step", "step": step, "epoch": at.epoch, "lr": lr, "loss": mean,
                   "images_per_s": round(self.speed, 1)})  # fmt: skip


def train_epoch(
    run: Run, at: Position, *, show: Show, after_step: Callable[[LossWindow], None]
) -> EpochRecord:
    """The rest of the current epoch, or less if the run's last step is reached.

    Args:
        run: What the steps are made with.
        at: Where the run is; kept up to date.
        show: Told the step and a line of text now and then.
        after_step: Called after each step; it may save, or raise to stop.

    Raises:
        DivergedError: A loss is not finite, or explodes.
        DataError: There is no batch, or labels do not fit.
        TrainingError: The model or teacher does not return logits of the same classes.
    """
    run.objective.student.train()
    window = LossWindow(run, at, show)
    frozen = round(run.config.freeze * run.total)
    batches = read(run.batches.start(at.epoch, at.batch)) if at.step < run.total else ()
    for group in _grouped(batches, run.config.accumulate, rest=at.batch == 0):
        if run.ramp is not None:
            run.ramp.at(at.step)
        at.lr = set_rate(run.optimizer, run.scheduler, at.step, at.lr_factor, frozen)
        loss = train_step(run, group, at.step)
        at.step, at.batch = at.step + 1, at.batch + len(group)
        window.images += sum(_length(batch) for batch in group)
        window.losses.append((at.step, at.lr, loss))
        if at.step % run.config.log_every == 0:
            window.close()
        after_step(window)
        if at.step >= run.total:
            break
    window.close()
    if not at.losses:
        raise DataError("There is no batch of training images in this epoch; give at least one.")
    return EpochRecord(at.epoch, at.step, at.loss_sum / at.losses, at.lr, window.speed, None)


def train_step(run: Run, batches: list[Any], step: int) -> Tensor:
    """One step of the optimiser, from the gradients of all batches; their mean loss, on the device.

    It draws from generators that are seeded for this step. Where the loader draws from them too
    (see `TrainBatches`), they are put back: what it draws does not depend on the step.
    """
    accelerator, objective = run.accelerator, run.objective
    total = torch.zeros((), device=accelerator.device)
    with nullcontext() if run.batches.order is not None else keep_random_state():
        seed_step(run.config.seed, step, accelerator.process_index)
        for place, batch in enumerate(batches):
            last = place == len(batches) - 1
            now = last or run.sharded  # whole gradients of a sharded model would not fit
            with nullcontext() if now else accelerator.no_sync(objective.student):
                loss = objective.loss(batch, first=step == 0) / len(batches)
                accelerator.backward(loss)
            total += loss.detach()
    run.optimizer.step()
    run.optimizer.zero_grad()
    if run.ema is not None:
        run.ema.update(run.model, step=step + 1)
    return total


def _grouped(batches: Iterable[Any], number: int, *, rest: bool) -> Iterator[list[Any]]:
    """Lists of so many batches; a shorter rest only if it is all that there is, and `rest`."""
    group: list[Any] = []
    for batch in batches:
        group.append(batch)
        if len(group) == number:
            yield group
            group, rest = [], False
    if group and rest:
        yield group


def _length(batch: Any) -> int:
    return len(batch[0] if isinstance(batch, (list, tuple)) else batch)
