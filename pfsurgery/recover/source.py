"""The images of a run, opened as its settings say."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from pfsurgery.batches import Images, open_images
from pfsurgery.data import Augmentation
from pfsurgery.recover.config import FinetuneConfig


def train_images(
    source: Images | str | Path, model: nn.Module, config: FinetuneConfig, *, labelled: bool
) -> Iterable[Any]:
    """Batches of training images, shuffled and augmented.

    Args:
        source: As `finetune` takes it.
        model: Gives the size of the images and the number of classes.
        config: Batch size and augmentation; with `kd_weight=1`, labels may be missing.
        labelled: Whether labels are needed in any case.

    Raises:
        DataError: The images cannot be opened.
    """
    return open_images(
        source,
        model,
        training=True,
        batch_size=config.batch_size,
        labelled=labelled or config.kd_weight < 1,
        augmentation=Augmentation(config.crop_scale, config.auto_augment),
    )


def val_images(
    source: Images | str | Path, model: nn.Module, config: FinetuneConfig
) -> Iterable[Any]:
    """Batches of validation images, in order.

    Raises:
        DataError: The images cannot be opened.
    """
    return open_images(source, model, training=False, batch_size=config.batch_size)
