"""Top-1 and top-5 accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfsurgery.batches import Images, open_images, read, report_skipped, split_batch
from pfsurgery.errors import DataError, TrainingError
from pfsurgery.recover.state import keep_random_state, keep_train_flags, placement


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How well a model does on a labelled set of images.

    Attributes:
        top1: Images whose label is the highest output, in percent.
        top5: Images whose label is among the five highest outputs, in percent (with fewer than
            five classes, among all of them).
        loss: Mean cross-entropy in nats.
        images: Number of images that this is about; unreadable ones are left out.
    """

    top1: float
    top5: float
    loss: float
    images: int


def evaluate(model: nn.Module, images: Images | str | Path, *, batch_size: int = 64) -> Accuracy:
    """Accuracy of `model`, in eval mode, where it is; flags and random states are left as found.

    Args:
        model: A classifier: (N, C, H, W) -> (N, classes).
        images: A `DataLoader`, a `Dataset`, an iterable of (images, labels) with images of shape
            (N, C, H, W) and labels of shape (N,), or a path or name that
            `pfsurgery.data.open_data` understands (its validation part, or all of a folder that
            has no such part). Images with the label -1 are left out.
        batch_size: Used where `images` is a data set, path or name.

    Raises:
        DataError: There is no labelled image, or `images` cannot be opened.
        TrainingError: The model does not return one tensor of logits.
    """
    loader = open_images(images, model, training=False, batch_size=batch_size)
    accuracy = score(model, loader)
    report_skipped(loader)
    return accuracy


def score(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    channels_last: bool = False,
    gather: Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]] | None = None,
    each: Callable[[], None] | None = None,
) -> Accuracy:
    """`evaluate` on an opened loader.

    Args:
        model: As for `evaluate`.
        loader: Batches of (images, labels).
        channels_last: Whether to put the images in that memory format.
        gather: Joins logits and labels of several processes.
        each: Called before each batch; it may raise to stop.

    Raises:
        DataError: There is no labelled image.
        TrainingError: The model does not return one tensor of logits.
    """
    from timm.utils import accuracy

    device, dtype = placement(model)
    memory_format = torch.channels_last if channels_last else torch.preserve_format
    totals = [0.0, 0.0, 0.0]
    count = 0
    with keep_random_state(), keep_train_flags(model), torch.no_grad():
        model.eval()
        for batch in read(loader):
            if each is not None:
                each()
            images, labels = split_batch(batch)
            if labels is None:
                raise DataError("Accuracy needs labels: give batches of (images, labels).")
            images = images.to(device=device, dtype=dtype, memory_format=memory_format)
            logits, labels = logits_of(model, images), labels.to(device)
            if gather is not None:
                logits, labels = gather((logits, labels))
            check_labels(labels, logits, lowest=-1)
            logits, labels = logits[labels >= 0].float(), labels[labels >= 0]
            number = len(labels)
            if not number:
                continue
            top1, top5 = accuracy(logits, labels, topk=(1, 5))
            losses = F.cross_entropy(logits, labels)
            values = (float(top1), float(top5), float(losses))
            totals = [total + value * number for total, value in zip(totals, values, strict=True)]
            count += number
    if not count:
        raise DataError("There is no labelled image to measure accuracy on; give at least one.")
    top1, top5, loss = (total / count for total in totals)
    return Accuracy(round(top1, 4), round(top5, 4), loss, count)


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """One forward pass: (N, C, H, W) -> (N, classes).

    Raises:
        DataError: The model does not run on the images.
        TrainingError: The output is something else.
    """
    with read_by(model, images):
        output = model(images)
    if isinstance(output, Tensor) and output.dim() == 2:
        return output
    shape = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else None
    raise TrainingError(
        f"{type(model).__name__} returns {shape or type(output).__name__} instead of one tensor of "
        f"logits (N, classes). Give a classifier, or wrap the model so that it returns the logits."
    )


@contextmanager
def read_by(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Say of which images (N, C, H, W) a forward pass inside the block failed.

    Raises:
        DataError: It failed; what lack of memory and split weights raise is passed on.
    """
    try:
        yield
    except RuntimeError as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        if isinstance(error, torch.OutOfMemoryError) or "DTensor" in reason:
            raise
        advice = "Give images with the channels and of the size that it reads."
        if "view size is not compatible" in reason:
            advice = "Its code takes views: train with channels_last=False (--no-channels-last)."
        raise DataError(
            f"{type(model).__name__} does not run on images of shape {tuple(images.shape)}: "
            f"{reason} {advice}"
        ) from error


def check_labels(labels: Tensor, logits: Tensor, *, lowest: int = 0) -> None:
    """Labels must be class indices of the model's outputs.

    Args:
        labels: (N,).
        logits: (N, classes).
        lowest: The lowest label allowed.

    Raises:
        DataError: A label is no integer or out of range, or they are not as many as the outputs.
    """
    if labels.is_floating_point() or labels.is_complex():
        kind = str(labels.dtype).removeprefix("torch.")
        raise DataError(f"The labels are {kind}; give class indices, as integers.")
    if labels.dim() != 1 or len(labels) != len(logits):
        raise DataError(
            f"Labels of shape {tuple(labels.shape)} do not go with {len(logits)} images; give one "
            f"class index for each."
        )
    low, high = (int(value) for value in labels.aminmax()) if len(labels) else (0, 0)
    classes = logits.shape[1]
    if low < lowest or high >= classes:
        wrong = low if low < lowest else high
        raise DataError(
            f"The label {wrong} does not fit the model's {classes} classes (0 to {classes - 1}). "
            f"Give the model a classifier for the data's classes, for instance with timm's "
            f"model.reset_classifier({max(high + 1, 1)})."
        )
