"""Batches of images from whatever a caller holds: a path, a loader, a data set, tensors."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from pfsurgery.data import LIGHT, Augmentation, in_any_order, in_batches, open_part
from pfsurgery.errors import DataError
from pfsurgery.images import CheckedImages

Images = DataLoader[Any] | Dataset[Any] | Iterable[Any]

_log = logging.getLogger(__name__)

_MOST_OF_A_SOURCE = 2000  # images, where it may hold millions and a sample will do
_MOST_BYTES = 400_000_000


def open_images(
    source: Images | str | Path,
    model: nn.Module | Mapping[str, Any],
    *,
    training: bool,
    batch_size: int = 64,
    labelled: bool = True,
    augmentation: Augmentation = LIGHT,
) -> Iterable[Any]:
    """Batches that can be iterated again and again, from whatever a caller may hold.

    Args:
        source: A path or name as for `open_data`; a `Dataset` of (image, label), which is put in
            batches; a `DataLoader` or any other iterable of batches, which is returned as it is.
        model: As for `open_data`.
        training: Whether the training part is wanted (shuffled) or the validation part. A path
            without such a part gives all of its images.
        batch_size: Images in a batch, for paths, names and data sets.
        labelled: If not, training images at a path need no class folders.
        augmentation: Of training images, for paths and names.

    Raises:
        DataError: As for `open_data`; or `source` can be iterated only once, or not at all.
    """
    if isinstance(source, (str, Path)):
        return open_part(
            source,
            model,
            training_part=training,
            labelled=labelled or not training,
            batch_size=batch_size,
            augmentation=augmentation if training else None,
        )
    if isinstance(source, Dataset) and not isinstance(source, (DataLoader, IterableDataset)):
        return in_batches(source, batch_size, training=training)
    if not isinstance(source, Iterable):
        raise DataError(
            f"Images must be a path, a DataLoader, a Dataset or an iterable of batches, not "
            f"{type(source).__name__}."
        )
    if isinstance(source, Iterator):
        raise DataError(
            f"A {type(source).__name__} can be iterated only once; give a list of batches or a "
            f"DataLoader."
        )
    return source


def unlabelled_images(
    source: Images | Tensor | str | Path,
    model: nn.Module | Mapping[str, Any],
    *,
    batch_size: int = 64,
) -> Iterator[Tensor]:
    """Image tensors of shape (N, C, H, W) from whatever a caller may hold, once through.

    Args:
        source: As for `open_images`, or a tensor of images, or any iterable (one that can be
            iterated only once too) of tensors or of (images, labels). A path may hold images
            without class folders; its training part is taken if it has one, without augmentation.
            Images of paths and names come in a random order that is always the same.
        model: As for `open_data`; only used for paths and names.
        batch_size: Images in a batch, for tensors, paths, names and data sets.

    Raises:
        DataError: `source` cannot be opened, or a batch is no image tensor.
    """
    batches: Iterable[Any]
    if isinstance(source, Tensor):
        batches = torch.split(source, batch_size)
    elif isinstance(source, (str, Path)):
        batches = open_part(
            source, model, training_part=True, labelled=False, batch_size=batch_size, mixed=True
        )
    elif isinstance(source, Iterator):
        batches = source
    else:
        batches = open_images(source, model, training=False, batch_size=batch_size)
    for batch in read(batches):
        yield images_of(batch)
    report_skipped(batches)


def sample_images(source: Images | Tensor | str | Path, model: nn.Module) -> Iterable[Tensor]:
    """`unlabelled_images`, but of paths, names, data sets and loaders, which may be huge, 2,000.

    Those of a data set are spread over all of it.

    Raises:
        DataError: As for `unlabelled_images`.
    """
    if isinstance(source, Dataset):
        source = in_any_order(source)
    images = unlabelled_images(source, model)
    huge = isinstance(source, (str, Path, Dataset, DataLoader))
    return first_images(images, _MOST_OF_A_SOURCE) if huge else images


def first_images(batches: Iterable[Tensor], images: int) -> list[Tensor]:
    """The first batches that hold about so many images, of 400 MB at the most.

    Raises:
        DataError: There is none.
    """
    kept: list[Tensor] = []
    size = 0
    for batch in batches:
        kept.append(batch)
        size += batch.nbytes
        if sum(len(b) for b in kept) >= images or size >= _MOST_BYTES:
            break
    if not kept:
        raise DataError("There is no batch of images; give at least one.")
    return kept


def read(loader: Iterable[Any]) -> Iterator[Any]:
    """The batches of `loader`, with errors of its worker processes freed of their tracebacks.

    Raises:
        DataError: As raised by the data set.
    """
    try:
        yield from loader
    except DataError as error:
        raise DataError(str(error).rsplit("DataError: ", 1)[-1].strip()) from None


def split_batch(batch: object) -> tuple[Tensor, Tensor | None]:
    """Images (N, C, H, W) and labels (N,) of a batch; None for the labels where it has none.

    Raises:
        DataError: As for `images_of`, or the labels are no numbers.
    """
    images, labels = images_of(batch), _parts(batch)[1:2]
    if not labels or labels[0] is None:
        return images, None
    try:
        return images, torch.as_tensor(labels[0])
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"The labels of a batch are a {type(labels[0]).__name__} that makes no tensor "
            f"({error}); give one class index for each image."
        ) from None


def images_of(batch: object) -> Tensor:
    """Images (N, C, H, W) of a batch; whatever stands beside them is not looked at.

    Raises:
        DataError: The batch holds no tensor of four dimensions in first place, or one of integers.
    """
    parts = _parts(batch)
    if parts and isinstance(parts[0], Tensor) and parts[0].dim() == 4:
        if not parts[0].is_floating_point():
            raise DataError(
                f"The images are {str(parts[0].dtype).removeprefix('torch.')}; give floats, scaled "
                f"and normalised as the model was trained (for timm's models: divided by 255, then "
                f"with mean and std of timm.data.resolve_model_data_config(model))."
            )
        return parts[0]
    found = type(batch).__name__
    if isinstance(batch, Tensor):
        found = f"a tensor of shape {tuple(batch.shape)}"
    raise DataError(
        f"A batch must be images of shape (N, C, H, W) or a pair (images, labels), not {found}."
    )


def _parts(batch: object) -> list[Any]:
    return list(batch) if isinstance(batch, Sequence) else [batch]


def release_workers(loader: object) -> None:
    """End the worker processes that a loader keeps for its next pass; that starts new ones."""
    if isinstance(loader, DataLoader):
        loader._iterator = None


def give_freed_memory_back() -> None:
    """To the system: what is kept piles up from step to step, and worker processes copy it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:  # the C library is glibc
        trim(0)


def skipped_images(loader: Iterable[Any]) -> tuple[str, ...]:
    """Names of the images that the loader could not read so far (made by `open_data`)."""
    dataset = getattr(loader, "dataset", None)
    return dataset.skipped_names() if isinstance(dataset, CheckedImages) else ()


def report_skipped(loader: Iterable[Any]) -> None:
    """Log a warning with the number of images that the loader could not read, if any."""
    names = skipped_images(loader)
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        _log.warning("%d images could not be read and were skipped: %s", len(names), shown)
