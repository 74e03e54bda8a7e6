"""Loaders of images: of the embedded set, and of whatever timm's readers can open."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from pfsurgery.digits import ImageSet, digits
from pfsurgery.errors import DataError
from pfsurgery.example import default_input_size
from pfsurgery.images import CheckedImages, NamedImages, held_out, open_named, open_reader
from pfsurgery.modules import number_of_classes

_NAMED = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")
_TRAIN_NAMES = ("train", "training")
_VAL_NAMES = ("val", "valid", "validation", "eval", "test")
_HELD_OUT_EVERY = 10


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How training images that are read by path are augmented; half of them are also mirrored.

    Attributes:
        crop_scale: Smallest share of the area that random crops keep.
        policy: timm's augmentation, such as `rand-m9-mstd0.5` (RandAugment), `augmix` or `3a`.
    """

    crop_scale: float = 0.35
    policy: str | None = None

    def settings(self) -> dict[str, Any]:
        """As keyword arguments of timm's `create_loader`."""
        light = {"scale": (self.crop_scale, 1.0), "hflip": 0.5, "color_jitter": 0.0}
        return {**light, "auto_augment": self.policy}


LIGHT = Augmentation()


@dataclass(frozen=True, slots=True)
class OpenedData:
    """Loaders of (images, labels): (N, C, H, W) float32, normalised, and (N,) class indices.

    Attributes:
        train: Shuffled and augmented; an incomplete last batch is dropped.
        val: In order, resized and cropped as the model expects.
        classes: Name of each class; empty where the source does not tell.
        input_size: (C, H, W) of every image, in pixels.
    """

    train: DataLoader[Any]
    val: DataLoader[Any]
    classes: tuple[str, ...]
    input_size: tuple[int, int, int]


def open_data(
    source: str | Path,
    model: nn.Module | Mapping[str, Any],
    *,
    batch_size: int = 64,
    workers: int | None = None,
    root: str | Path | None = None,
    labelled: bool = True,
    in_memory: bool = False,
    augmentation: Augmentation = LIGHT,
) -> OpenedData:
    """Loaders for training and validation, made by timm, that fit a model.

    What `source` may be:

    - a folder with a training part (`train` or `training`) and a validation part (`val`, `valid`,
      `validation`, `eval` or `test`), each a folder or a tar file (`train.tar`), that holds one
      folder of images for each class; without a validation part, every tenth image of each class
      is held out;
    - a folder or a tar file that holds the class folders itself, split in the same way;
    - a name that timm knows: `torch/cifar10`, `hfds/user/name`, `tfds/name`, `wds/FOLDER`;
    - `digits`, the embedded set. A folder of that name is meant by `./digits`.

    An image that cannot be read is counted and another one takes its place (in validation with the
    label -1, which `evaluate` leaves out). When more than 1 % of a part, and more than 3 images,
    cannot be read, an error names the file.

    Args:
        source: Path or name.
        model: Gives input size, mean and standard deviation (`timm.data.resolve_model_data_config`)
            and the number of classes; or a mapping with any of `input_size`, `mean`, `std`,
            `interpolation`, `crop_pct`, `crop_mode` and `num_classes`.
        batch_size: Images in a batch; at most as many as there are for training.
        workers: Processes that read images; by default one less than the usable cores, at most 8.
            With 0 the images are read in this process.
        root: Where `torch/`, `hfds/` and `tfds/` data sets lie or are downloaded to.
        labelled: If not, the training images need no class folders. Without class folders there
            must be a validation part.
        in_memory: Whether to decode all images of a folder or tar file once and keep them, as
            many bytes as pixels times channels.
        augmentation: Of training images.

    Raises:
        DataError: `source` does not exist, cannot be read, is empty, has no class folders, or its
            classes differ between the parts or in number from the model's; or the augmentation is
            not one of timm's.
    """
    if str(source) == "digits":
        return _digits_loaders(model, batch_size)
    config = _data_config(model)
    train, val = _open_parts(source, config, root, labelled)
    classes = _class_names(val)
    if not _is_named(source) and labelled and classes != _class_names(train):
        raise DataError(_differing_classes(source, _class_names(train), classes))
    _check_class_count(source, len(classes), config["num_classes"])
    if in_memory:
        train, val = _kept(train, source), _kept(val, source)
    return OpenedData(
        train=_loader(train, config, batch_size, workers, augmentation),
        val=_loader(val, config, batch_size, workers),
        classes=classes,
        input_size=config["input_size"],
    )


def open_part(
    source: str | Path,
    model: nn.Module | Mapping[str, Any],
    *,
    training_part: bool,
    labelled: bool = True,
    batch_size: int = 64,
    augmentation: Augmentation | None = None,
    mixed: bool = False,
) -> DataLoader[Any]:
    """A loader of one part of a source, in order, or shuffled where it is augmented.

    Args:
        source: As for `open_data`. Of a folder or tar file without such a part, all images.
        model: As for `open_data`.
        training_part: The training part if true, the validation part otherwise.
        labelled: If not, images need no class folders and the number of classes is not checked.
        batch_size: Images in a batch.
        augmentation: If given, the images are shuffled and augmented, for training.
        mixed: Whether they come in an order that is random, but always the same: folders are read
            class by class, and the first images would all show the same thing.

    Raises:
        DataError: As for `open_data`.
    """
    training = augmentation is not None
    if str(source) == "digits":
        embedded = _checked_digits(model)
        part = embedded.train if training_part else embedded.val
        return in_batches(part, batch_size, training=training)
    config = _data_config(model)
    if _is_named(source):
        size = config["input_size"]
        named = open_named(str(source), size, None, training=training_part)
        if labelled:
            _check_class_count(source, len(_class_names(named)), config["num_classes"])
        if mixed:
            named = in_any_order(named)
        return _loader(named, config, batch_size, None, augmentation)
    path = _existing(source, _TRAIN_NAMES if training_part else _VAL_NAMES)
    images = open_reader(path, config["input_size"], training=training, labelled=labelled)
    if labelled:
        _check_class_count(source, len(images.classes), config["num_classes"])
    shown = in_any_order(images) if mixed else images
    return _loader(shown, config, batch_size, None, augmentation)


def in_batches(images: Dataset[Any], batch_size: int, *, training: bool) -> DataLoader[Any]:
    """A loader of a data set: for training shuffled, without an incomplete last batch.

    Raises:
        DataError: The data set is empty.
    """
    number = len(images)  # type: ignore[arg-type]
    if not number:
        raise DataError("The data set is empty; give one that holds images.")
    size = min(batch_size, number)
    return DataLoader(images, batch_size=size, shuffle=training, drop_last=training)


def in_any_order(images: Dataset[Any]) -> Dataset[Any]:
    """A data set in an order that is random, but always the same; a stream as it comes."""
    if isinstance(images, IterableDataset):
        return images
    number = len(images)  # type: ignore[arg-type]
    order: list[int] = torch.randperm(number, generator=torch.Generator().manual_seed(0)).tolist()
    if isinstance(images, CheckedImages):
        return images.subset(order, training=images.training)
    if isinstance(images, NamedImages):
        return images.subset(order)
    return Subset(images, order)


def _is_named(source: str | Path) -> bool:
    return str(source).lower().startswith(_NAMED)


def _data_config(model: nn.Module | Mapping[str, Any]) -> dict[str, Any]:
    from timm.data import resolve_data_config, resolve_model_data_config

    if not isinstance(model, nn.Module):
        config: dict[str, Any] = resolve_data_config(dict(model) or {"in_chans": 3})
        return {**_by_channel(config), "num_classes": model.get("num_classes")}
    config = resolve_model_data_config(model)
    size = (default_input_size(model)[0], *config["input_size"][1:])
    return {**_by_channel({**config, "input_size": size}), "num_classes": number_of_classes(model)}


def _by_channel(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same with means and deviations of its channels: averages where there are others."""
    channels = config["input_size"][0]
    made = dict(config)
    for key in ("mean", "std"):
        if len(config[key]) != channels:
            made[key] = (sum(config[key]) / len(config[key]),) * channels
    return made


def _part(folder: Path, names: Sequence[str]) -> Path | None:
    candidates = (folder / f"{name}{ending}" for name in names for ending in ("", ".tar"))
    return next((path for path in candidates if path.exists()), None)


def _existing(source: str | Path, names: Sequence[str]) -> Path:
    """The part of `source` with one of the names, or `source` itself."""
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(
            f"There is no {path}. Give a folder or tar file of images, a name such as "
            f"torch/cifar10, hfds/user/name or wds/FOLDER, or digits."
        )
    return (_part(path, names) if path.is_dir() else None) or path


def _open_parts(
    source: str | Path, config: Mapping[str, Any], root: str | Path | None, labelled: bool
) -> tuple[Dataset[Any], Dataset[Any]]:
    size = config["input_size"]
    if _is_named(source):
        train, val = (open_named(str(source), size, root, training=part) for part in (True, False))
        return train, val
    train_path, val_path = _existing(source, _TRAIN_NAMES), _existing(source, _VAL_NAMES)
    path = Path(source).expanduser()
    if val_path != path and train_path == path:
        raise DataError(
            f"{path} has a validation part ({val_path.name}) but no training part; add one, named "
            f"train or train.tar."
        )
    apart = val_path != path
    train = open_reader(train_path, size, training=True, labelled=labelled or not apart)
    if apart:
        return train, open_reader(val_path, size, training=False)
    kept, withheld = held_out(train.labels, every=_HELD_OUT_EVERY)
    if not withheld:
        raise DataError(
            f"No class in {train_path} has {_HELD_OUT_EVERY} images, too few to hold some out for "
            f"validation; add a validation part next to it (a folder val or a file val.tar)."
        )
    return train.subset(kept, training=True), train.subset(withheld, training=False)


def _class_names(dataset: Dataset[Any]) -> tuple[str, ...]:
    if isinstance(dataset, CheckedImages):
        return dataset.classes
    return tuple(str(name) for name in getattr(dataset, "classes", ()))


def _differing_classes(source: str | Path, train: Sequence[str], val: Sequence[str]) -> str:
    only = [f"{name} (training)" for name in train if name not in val]
    only += [f"{name} (validation)" for name in val if name not in train]
    shown = ", ".join(only[:5]) + (", ..." if len(only) > 5 else "")
    return (
        f"The parts of {source} have different classes; only in one of them: {shown}. Give both "
        f"the same class folders."
    )


def _check_class_count(source: str | Path, found: int, expected: int | None) -> None:
    if found and expected and found != expected:
        raise DataError(
            f"{source} has {found} classes, but the model gives {expected}. Create the model with "
            f"num_classes={found} (or model.reset_classifier({found})) and train its classifier, "
            f"or give data with the model's classes."
        )


def _default_workers() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(0, min(8, cores - 1))


def _kept(images: Dataset[Any], source: str | Path) -> Dataset[Any]:
    if not isinstance(images, CheckedImages):
        raise DataError(f"{source} is not a folder or tar file, so it cannot be kept in memory.")
    return images.in_memory()


def _loader(
    dataset: Any,
    config: Mapping[str, Any],
    batch_size: int,
    workers: int | None,
    augmentation: Augmentation | None = None,
) -> DataLoader[Any]:
    from timm.data import create_loader

    training, stream = augmentation is not None, isinstance(dataset, IterableDataset)
    workers = _default_workers() if workers is None else workers
    if training and not stream:
        batch_size = min(batch_size, len(dataset))
    settings = {name: value for name, value in config.items() if name != "num_classes"}
    try:
        loader: DataLoader[Any] = create_loader(
            dataset,
            batch_size=batch_size,
            is_training=training,
            num_workers=workers,
            # workers of a stream begin each epoch from its seed
            persistent_workers=workers > 0 and not stream,
            use_prefetcher=False,
            pin_memory=torch.cuda.is_available(),
            **settings,
            **({} if augmentation is None else augmentation.settings()),
        )
    except (AssertionError, KeyError, ValueError) as error:
        if augmentation is None or augmentation.policy is None:
            raise
        raise DataError(
            f"timm has no augmentation {augmentation.policy!r} ({error!r}). Give one such as "
            f"rand-m9-mstd0.5, augmix or 3a."
        ) from None
    return loader


def _checked_digits(model: nn.Module | Mapping[str, Any]) -> ImageSet:
    data = digits()
    _check_class_count("digits", data.num_classes, _data_config(model)["num_classes"])
    return data


def _digits_loaders(model: nn.Module | Mapping[str, Any], batch_size: int) -> OpenedData:
    data = _checked_digits(model)
    return OpenedData(
        train=in_batches(data.train, batch_size, training=True),
        val=in_batches(data.val, batch_size, training=False),
        classes=data.classes,
        input_size=data.input_size,
    )
