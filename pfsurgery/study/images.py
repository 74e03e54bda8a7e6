"""The images of a study: read once, held in memory, augmented batch by batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from pfsurgery.batches import Images, open_images, read, report_skipped, split_batch
from pfsurgery.data import OpenedData, open_data
from pfsurgery.errors import DataError
from pfsurgery.images import CheckedImages
from pfsurgery.study.setting import StudySetting

_MARGIN = 4  # pixels that a crop may be off the centre, for each 32 of the image
_READ = 256  # images that are read together
_DIGITS = "digits"


@dataclass(frozen=True, slots=True, eq=False)
class Labelled:
    """Images in memory.

    Attributes:
        pixels: (N, C, H, W), float32 and normalised.
        labels: (N,) class indices.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def halves(self) -> tuple[Labelled, Labelled]:
        """Every other image of each class, and the others."""
        first = torch.tensor(_ranks(self.labels.tolist())) % 2 == 0
        return self.at(first), self.at(~first)

    def at(self, index: Tensor) -> Labelled:
        """Some of them."""
        return Labelled(self.pixels[index], self.labels[index])


@dataclass(frozen=True, slots=True, eq=False)
class StudyImages:
    """What a study trains on and what it is judged by.

    Attributes:
        train: Training images.
        val: Validation images.
        classes: Number of classes.
        flip: Whether half of the training images are mirrored; not those of the digits.
    """

    train: Labelled
    val: Labelled
    classes: int
    flip: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.train.pixels.shape[1:]
        return channels, height, width


class AugmentedBatches:
    """Shuffled batches of images, each moved by a few pixels and, perhaps, mirrored.

    All random numbers are drawn from torch's global generator, which `finetune` seeds.

    Args:
        images: The images.
        batch_size: Images in a batch; an incomplete last one is left out.
        flip: Whether half of the images are mirrored.
    """

    def __init__(self, images: Labelled, batch_size: int, *, flip: bool) -> None:
        self.images, self.flip = images, flip
        self.batch_size = min(batch_size, len(images))

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images))
        for place in range(len(self)):
            batch = self.images.at(order[place * self.batch_size : (place + 1) * self.batch_size])
            yield _moved(batch.pixels, flip=self.flip), batch.labels


def _moved(pixels: Tensor, *, flip: bool) -> Tensor:
    number, channels, height, width = pixels.shape
    margin = max(1, _MARGIN * min(height, width) // 32)
    padded = F.pad(pixels, [margin] * 4)
    top, left = torch.randint(0, 2 * margin + 1, (2, number, 1))
    rows = (top + torch.arange(height))[:, None, :, None]
    columns = left + torch.arange(width)
    if flip:
        mirrored = torch.rand(number, 1) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    images, planes = (
        torch.arange(number)[:, None, None, None],
        torch.arange(channels)[:, None, None],
    )
    return padded[images, planes, rows, columns[:, None, None, :]]


def study_images(
    train: Images | str | Path, val: Images | str | Path, setting: StudySetting
) -> StudyImages:
    """Read the images of a study.

    Args:
        train: Training images: a path or name as for `pfsurgery.data.open_data` (its training
            part), a `Dataset` of (image, label), or an iterable of (images, labels).
        val: Validation images, of the same kinds.
        setting: How many, and of which size where they lie at a path.

    Raises:
        DataError: They cannot be read, have no labels, or the two parts do not fit each other.
    """
    opened = _opened(train, setting.size)
    same = isinstance(train, (str, Path)) and str(train) == str(val)
    kept = (
        _part(opened, setting.images, training=True),
        _part(opened if same else _opened(val, setting.size), setting.val_images),
    )
    shapes = [tuple(part.pixels.shape[1:]) for part in kept]
    if shapes[0] != shapes[1]:
        raise DataError(
            f"Training images are {shapes[0]} (channels, height, width), validation images "
            f"{shapes[1]}; give both in one size."
        )
    seen = int(kept[0].labels.max()) + 1
    if len(set(kept[0].labels.tolist())) < 2:
        raise DataError("All training images are of one class; give at least two classes.")
    if int(kept[1].labels.max()) >= seen:
        raise DataError(
            f"The validation images have the label {int(kept[1].labels.max())}, which no training "
            f"image has; give both parts the same classes."
        )
    return StudyImages(kept[0], kept[1], seen, flip=str(train) != _DIGITS)


def _opened(source: Images | str | Path, size: int) -> OpenedData | Iterable[Any]:
    if isinstance(source, (str, Path)):
        whole = {"input_size": (3, size, size), "crop_pct": 1.0}
        return open_data(source, whole, batch_size=_READ, workers=0)
    return open_images(source, {}, training=False)


def _part(
    opened: OpenedData | Iterable[Any], limit: int | None, *, training: bool = False
) -> Labelled:
    loader = _plain(opened, limit, training) if isinstance(opened, OpenedData) else opened
    pixels, labels = [], []
    for batch in read(loader):
        images, own = split_batch(batch)
        if own is None:
            raise DataError("A study needs labels: give batches of (images, labels).")
        if own.dim() != 1 or len(own) != len(images) or own.is_floating_point():
            raise DataError(
                f"Labels of shape {tuple(own.shape)} do not go with {len(images)} images; give one "
                f"class index for each."
            )
        readable = own >= 0  # unreadable validation images have the label -1
        pixels.append(images[readable].float())
        labels.append(own[readable].long())
    report_skipped(loader)
    if not labels or not sum(map(len, labels)):
        raise DataError(f"There are no labelled {'training' if training else 'validation'} images.")
    if len({tuple(images.shape[1:]) for images in pixels}) > 1:
        raise DataError("The images differ in size; give them all in one size.")
    whole = Labelled(torch.cat(pixels), torch.cat(labels))
    if limit is None or limit >= len(whole):
        return whole
    return whole.at(torch.tensor(_by_rank(whole.labels.tolist())[:limit]))


def _plain(opened: OpenedData, limit: int | None, training: bool) -> DataLoader[Any]:
    """A loader of one part, in order and without augmentation."""
    dataset: Any = (opened.train if training else opened.val).dataset
    if isinstance(dataset, CheckedImages) and limit is not None and dataset.labels:
        dataset = dataset.subset(_by_rank(dataset.labels)[:limit], training=training)
    if hasattr(dataset, "transform"):
        dataset.transform = opened.val.dataset.transform  # type: ignore[attr-defined]
    return DataLoader(dataset, batch_size=_READ)


def _by_rank(labels: Sequence[int]) -> list[int]:
    """Indices such that the first n hold about as many images of each class, for every n."""
    ranks = _ranks(labels)
    return sorted(range(len(ranks)), key=lambda index: (ranks[index], labels[index]))


def _ranks(labels: Sequence[int]) -> list[int]:
    """How many images of its class come before each one."""
    seen = Counter[int]()
    ranks = []
    for label in labels:
        ranks.append(seen[label])
        seen[label] += 1
    return ranks
