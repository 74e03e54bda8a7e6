"""The images of a run, opened as its settings say."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from pfsurgery.batches import Images, open_images
from pfsurgery.data import Augmentation, open_data
from pfsurgery.recover.config import FinetuneConfig


def opened(
    train: Images | str | Path,
    val: Images | str | Path | None,
    model: nn.Module,
    config: FinetuneConfig,
    *,
    labelled: bool,
) -> tuple[Iterable[Any], Iterable[Any] | None]:
    """Batches of training images, shuffled and augmented, and of validation images, in order.

    Where both are of one path or name, no image is in both, see `pfsurgery.data.open_data`.

    Args:
        train: As `finetune` takes it.
        val: The same, or None.
        model: Gives the size of the images and the number of classes.
        config: Batch size and augmentation; with `kd_weight=1`, labels may be missing.
        labelled: Whether labels of training images are needed in any case.

    Raises:
        DataError: The images cannot be opened.
    """
    labelled = labelled or config.kd_weight < 1
    size, augmentation = config.batch_size, Augmentation(config.crop_scale, config.auto_augment)
    if isinstance(train, (str, Path)) and isinstance(val, (str, Path)) and str(train) == str(val):
        data = open_data(
            train, model, batch_size=size, labelled=labelled, augmentation=augmentation
        )
        return data.train, data.val
    training = open_images(
        train,
        model,
        training=True,
        batch_size=size,
        labelled=labelled,
        augmentation=augmentation,
    )
    if val is None:
        return training, None
    return training, open_images(val, model, training=False, batch_size=size)
