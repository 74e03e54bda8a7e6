"""How a converted model is fine-tuned, and what came of it: plain values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pfsurgery.errors import TrainingError
from pfsurgery.recover.evaluate import Accuracy


@dataclass(frozen=True, slots=True)
class FinetuneConfig:
    """Settings of `finetune`; wrong values raise at once.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images in a batch, on each process; not used for a `DataLoader` or batches.
        optimizer: timm's name of it, such as `adamw`, `sgd` (with Nesterov momentum) or `lamb`.
        lr: Highest learning rate. It falls to 0 along a cosine, step by step.
        weight_decay: Not applied to biases and norms.
        warmup: Share of all steps in which the learning rate rises linearly from `lr` / 100.
        temperature: Of the distillation, see `pfsurgery.recover.distill.kd_loss`.
        kd_weight: Share of the distillation in the loss, the rest is cross-entropy. With 1, no
            labels are needed. Without a teacher it is not used.
        label_smoothing: Of the cross-entropy.
        mixed_precision: `bf16` computes forward passes in bfloat16 where that is safe.
        channels_last: Whether to train in that memory format; the model keeps it.
        seed: Of augmentation, order of the images, dropout.
        max_steps: Stop after so many steps; the learning rate is planned for them.

    Raises:
        TrainingError: A value is out of its range.
    """

    epochs: int = 10
    batch_size: int = 64
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.02
    warmup: float = 0.05
    temperature: float = 2.0
    kd_weight: float = 0.7
    label_smoothing: float = 0.0
    mixed_precision: Literal["no", "bf16"] = "no"
    channels_last: bool = False
    seed: int = 0
    max_steps: int | None = None

    def __post_init__(self) -> None:
        checks = (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("lr", self.lr > 0, "above 0"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("warmup", 0 <= self.warmup < 1, "a share of all steps, from 0 to below 1"),
            ("temperature", self.temperature > 0, "above 0"),
            ("kd_weight", 0 <= self.kd_weight <= 1, "from 0 to 1"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "from 0 to below 1"),
            ("mixed_precision", self.mixed_precision in ("no", "bf16"), "no or bf16"),
            ("seed", 0 <= self.seed < 2**32, "from 0 to 2**32 - 1"),
            ("max_steps", self.max_steps is None or self.max_steps >= 1, "at least 1, or None"),
        )
        for name, holds, allowed in checks:
            if not holds:
                raise TrainingError(f"{name}={getattr(self, name)!r} must be {allowed}.")


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One pass over the training images.

    Attributes:
        epoch: Counted from 1.
        step: Optimiser steps taken since the start.
        loss: Mean of the training loss over the epoch, in nats.
        lr: Learning rate of the last step.
        images_per_s: Training throughput over all processes, evaluation not included.
        val: Accuracy on the validation images, if there are any.
    """

    epoch: int
    step: int
    loss: float
    lr: float
    images_per_s: float
    val: Accuracy | None


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """What came of `finetune`.

    Attributes:
        history: One record for each epoch.
        steps: Optimiser steps taken.
        seconds: Wall-clock time of all, data loading and evaluation included.
        last: Accuracy of the model as it was returned; None without validation images.
        best: Highest accuracy (top-1) of all epochs, which `weights` has.
        weights: File of the best weights (without validation images, of the last ones).
        skipped: Names of images that could not be read.
    """

    history: tuple[EpochRecord, ...]
    steps: int
    seconds: float
    last: Accuracy | None
    best: Accuracy | None
    weights: Path | None
    skipped: tuple[str, ...]
