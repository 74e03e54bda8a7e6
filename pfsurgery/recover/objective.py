"""The loss of a batch: labels, the teacher's logits, its blocks and stages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pfsurgery.batches import split_batch
from pfsurgery.errors import DataError, TrainingError
from pfsurgery.recover.config import FinetuneConfig
from pfsurgery.recover.distill import recovery_loss
from pfsurgery.recover.evaluate import check_labels, logits_of
from pfsurgery.recover.guide import Guide
from pfsurgery.recover.match import Match
from pfsurgery.recover.remembered import RememberedLogits
from pfsurgery.recover.state import placement


@dataclass(frozen=True, slots=True)
class Objective:
    """Computes the loss of a batch.

    Attributes:
        student: The model, as prepared by the accelerator.
        teacher: Gives the teacher's logits.
        config: Settings.
        accelerator: Accelerate's.
        matches: What is to match between both, and how much it weighs.
        classes: How many there are, if images are mixed; None if they are not.
        remembered: The teacher's logits, if it need not see each batch.
    """

    student: nn.Module
    teacher: Guide | None
    config: FinetuneConfig
    accelerator: Any
    matches: tuple[tuple[float, Match], ...]
    classes: int | None
    remembered: RememberedLogits | None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While inside, the loss can be computed."""
        with ExitStack() as stack:
            for _, match in self.matches:
                stack.enter_context(match.watching())
            yield

    def loss(self, batch: Any, *, first: bool) -> Tensor:
        """The loss of a batch of images (N, C, H, W), with labels (N,) or without; a scalar.

        Args:
            batch: As a loader gives it.
            first: Whether labels on a GPU are to be checked, which waits for it.

        Raises:
            DataError: There are no labels though they are needed, or they do not fit the model.
            TrainingError: The model or teacher does not return logits of the same classes.
        """
        config, device = self.config, self.accelerator.device
        images, labels = split_batch(batch)
        uses_teacher = self.teacher is not None and config.kd_weight > 0
        uses_labels = config.kd_weight < 1 or not uses_teacher
        if labels is None and uses_labels:
            raise DataError(
                "A batch has no labels. Give (images, labels), or a teacher and kd_weight=1."
            )
        check = uses_labels and labels is not None and (first or labels.device.type == "cpu")
        loaded, images = images, on_device(images, self.student, config, self.accelerator)
        targets = None
        if labels is not None and uses_labels:
            targets = labels.to(device, non_blocking=True)
            targets = targets if targets.is_floating_point() else targets.long()
        if self.classes is not None:
            if labels is not None and check:
                check_labels(labels, images.new_empty(len(images), self.classes))
            images, mixed = self._mixed(images, targets, self.classes)
            targets = None if targets is None else mixed
        teacher_logits = None  # asked first, while no activations of the student take up memory
        if self.remembered is not None:
            teacher_logits = self.remembered(loaded)
        elif self.teacher is not None and (uses_teacher or self.matches):
            teacher_logits = self.teacher(images)
        logits = logits_of(self.student, images)
        if labels is not None and check:
            check_labels(labels, logits)
        if uses_teacher and teacher_logits is not None and teacher_logits.shape != logits.shape:
            raise TrainingError(
                f"The teacher gives {teacher_logits.shape[1]} classes and the model "
                f"{logits.shape[1]}. Give a teacher for the same classes, or none."
            )
        loss = recovery_loss(
            logits,
            targets if uses_labels else None,
            teacher_logits if uses_teacher else None,
            temperature=config.temperature,
            kd_weight=config.kd_weight,
            label_smoothing=config.label_smoothing,
        )
        return sum((weight * match.loss() for weight, match in self.matches), loss)

    def _mixed(self, images: Tensor, labels: Tensor | None, classes: int) -> tuple[Tensor, Tensor]:
        """Mixed images, and the targets (N, classes) that go with them."""
        from timm.data import Mixup

        check_pairs(len(images))
        if labels is None:
            labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
        mix = Mixup(
            mixup_alpha=self.config.mixup,
            cutmix_alpha=self.config.cutmix,
            label_smoothing=0.0,  # the cross-entropy sees to it
            num_classes=classes,
        )
        mixed: tuple[Tensor, Tensor] = mix(images.clone(), labels)
        return mixed


def check_pairs(images: int) -> None:
    """Raise a DataError where a batch of so many images cannot be mixed."""
    if images % 2:
        raise DataError(
            f"mixup and cutmix pair images, but a batch has {images}; give batches of an even "
            f"number (a DataLoader with drop_last=True leaves out a smaller last one)."
        )


def on_device(
    images: Tensor, student: nn.Module, config: FinetuneConfig, accelerator: Any
) -> Tensor:
    """Images (N, C, H, W) where and how the models read them."""
    memory_format = torch.channels_last if config.channels_last else torch.preserve_format
    dtype = placement(student)[1]
    return images.to(accelerator.device, dtype, memory_format=memory_format, non_blocking=True)
