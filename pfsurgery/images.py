"""Reading images through timm's readers, with every failure counted or explained."""

from __future__ import annotations

import io
import struct
import tarfile
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.utils.data import Dataset, IterableDataset

from pfsurgery.errors import DataError

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_ALLOWED_SHARE = 0.01
_ALLOWED_LEAST = 3
_UNREADABLE = (OSError, ValueError, SyntaxError, struct.error)
_NOT_OPENED = (ImportError, OSError, RuntimeError, ValueError, LookupError, AssertionError)


class CheckedImages(Dataset[tuple[Any, int]]):
    """Images of a timm reader; those that cannot be read are counted, across worker processes.

    An unreadable image is replaced by the next readable one: with that one's label for training,
    with the label -1 otherwise, so that it does not count as evidence.

    Args:
        reader: One of timm's readers.
        source: What to call it in messages.
        classes: Name of each class.
        labels: Class index of each of the reader's images; empty if the reader does not tell.
        mode: Pillow's colour mode, such as `RGB`.
        training: Whether the images are for training.
        indices: Which of the reader's images to use; all by default.
    """

    def __init__(
        self,
        reader: Any,
        source: str,
        classes: tuple[str, ...],
        labels: Sequence[int],
        mode: str,
        *,
        training: bool,
        indices: Sequence[int] | None = None,
    ) -> None:
        self.reader = reader
        self.source = source
        self.classes = classes
        self.labels = labels
        self.mode = mode
        self.training = training
        self.indices = list(range(len(reader)) if indices is None else indices)
        self.kept: list[Any] | None = None
        self.transform: Callable[[Any], Any] | None = None
        self.skipped = torch.zeros(len(self.indices), dtype=torch.uint8)
        self.skipped.share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Image and label of one index.

        Raises:
            DataError: Too many images could not be read; the message names the last of them.
        """
        from PIL import Image

        readable = True
        while True:
            try:
                image, label = self._decoded(index)
                break
            except (*_UNREADABLE, Image.DecompressionBombError) as error:
                readable = False
                self.skipped[index] = 1
                self._check(index, error)
                index = (index + 1) % len(self)
        label = int(label) if label is not None and (readable or self.training) else -1
        return (image if self.transform is None else self.transform(image)), label

    def _decoded(self, index: int) -> tuple[Any, int | None]:
        from PIL import Image

        if self.kept is not None and self.kept[index] is not None:
            pixels, label = self.kept[index]
            return Image.fromarray(pixels), label
        stream, label = _open(self.reader, self.indices[index])
        with closing(stream):
            return Image.open(stream).convert(self.mode), label

    def in_memory(self) -> CheckedImages:
        """The same images, decoded here and now and kept as arrays that worker processes share.

        Raises:
            DataError: Too many images cannot be read; the message names the last of them.
        """
        import numpy as np
        from PIL import Image

        self.kept = [None] * len(self)
        for index in range(len(self)):
            try:
                image, label = self._decoded(index)
            except (*_UNREADABLE, Image.DecompressionBombError) as error:
                self.skipped[index] = 1
                self._check(index, error)
            else:
                self.kept[index] = (np.asarray(image), label)
        return self

    def subset(self, indices: Sequence[int], *, training: bool) -> CheckedImages:
        """The same images, only those at `indices`."""
        return CheckedImages(
            self.reader,
            self.source,
            self.classes,
            [self.labels[index] for index in indices] if self.labels else [],
            self.mode,
            training=training,
            indices=[self.indices[index] for index in indices],
        )

    def skipped_names(self) -> tuple[str, ...]:
        """File names of the images that could not be read so far."""
        return tuple(self._name(int(index)) for index in self.skipped.nonzero())

    def _name(self, index: int) -> str:
        return str(self.reader.filename(self.indices[index]))

    def _check(self, index: int, error: Exception) -> None:
        allowed = min(max(_ALLOWED_LEAST, int(_ALLOWED_SHARE * len(self))), len(self) - 1)
        count = int(self.skipped.sum())
        if count > allowed:
            raise DataError(
                f"{count} of {len(self)} images in {self.source} could not be read (at most "
                f"{allowed} are skipped), the last one {self._name(index)}: {error}. Remove or "
                f"replace the broken files."
            )


class NamedImages(Dataset[tuple[Any, int]]):
    """Images of a torchvision data set, which have the colours that they were stored with.

    Args:
        dataset: Gives pairs of a Pillow image and its class index.
        mode: Pillow's colour mode, such as `RGB`.
        indices: Which of its images to use; all by default.
    """

    def __init__(self, dataset: Any, mode: str, indices: Sequence[int] | None = None) -> None:
        self.dataset = dataset
        self.mode = mode
        self.indices = range(len(dataset)) if indices is None else indices
        self.classes = tuple(str(name) for name in getattr(dataset, "classes", ()))
        self.transform: Callable[[Any], Any] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.dataset[self.indices[index]]
        image = image.convert(self.mode)
        return (image if self.transform is None else self.transform(image)), label

    def subset(self, indices: Sequence[int]) -> NamedImages:
        """The same images, only those at `indices`."""
        return NamedImages(self.dataset, self.mode, [self.indices[index] for index in indices])


def open_reader(
    path: Path, input_size: Sequence[int], *, training: bool, labelled: bool = True
) -> CheckedImages:
    """A folder or tar file of images, by timm's readers.

    Args:
        path: An existing folder or `.tar` file, with one folder for each class.
        input_size: (C, H, W); the channels decide the colour mode.
        training: Whether the images are for training.
        labelled: Whether each image must lie in a class folder.

    Raises:
        DataError: It cannot be read, is empty, or images lie outside of class folders.
    """
    if path.is_file() and path.suffix.lower() != ".tar":
        raise DataError(f"{path} is neither a folder nor a .tar file; give one of these.")
    from timm.data.readers import create_reader

    try:
        if path.is_dir():
            next(path.iterdir(), None)
        reader = create_reader("", root=str(path))
    except PermissionError as error:
        raise DataError(f"{path} cannot be read: {error}. Check its permissions.") from error
    except (RuntimeError, ValueError) as error:
        raise DataError(
            f"{path} holds no images. Put a folder of .jpg or .png files in it for each class."
        ) from error
    except (OSError, tarfile.TarError) as error:
        raise DataError(
            f"{path} cannot be read: {error}. A tar file must be whole and uncompressed."
        ) from error
    if path.is_dir():
        names, labels = reader.class_to_idx, [label for _, label in reader.samples]
    else:
        names, labels = reader.class_name_to_idx, [int(label) for label in reader.targets]
    loose = [index for name in ("", ".") if name in names for index in [names[name]]]
    if labelled and loose:
        example = reader.filename(labels.index(loose[0]))
        raise DataError(
            f"{path} has {'no class folders' if len(names) == 1 else 'images outside of them'}: "
            f"{example} lies in no class folder. Put each image in a folder named after its class."
        )
    return CheckedImages(
        reader,
        str(path),
        tuple(sorted(names, key=lambda name: int(names[name]))),
        labels,
        _mode(input_size),
        training=training,
    )


def held_out(labels: Sequence[int], every: int) -> tuple[list[int], list[int]]:
    """Indices for training and held out: of each class, every `every`th is held out."""
    seen: dict[int, int] = {}
    parts: tuple[list[int], list[int]] = ([], [])
    for index, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        parts[seen[label] % every == 0].append(index)
    return parts


def open_named(
    name: str, input_size: Sequence[int], root: str | Path | None, *, training: bool
) -> Dataset[Any]:
    """One part of a data set that timm opens by name, such as `torch/cifar10`.

    Args:
        name: timm's name; after `wds/` the folder of the shards.
        input_size: (C, H, W); the channels decide the colour mode.
        root: Where the data set lies or is downloaded to; by default the cache of its library.
        training: Whether the training part is wanted, or the validation part.

    Raises:
        DataError: timm cannot open it.
    """
    from timm.data import create_dataset
    from torch.hub import get_dir

    prefix, _, rest = name.partition("/")
    prefix = prefix.lower()
    folder = str(root) if root is not None else None
    if prefix == "wds":
        name, folder = "wds/", rest
    elif prefix == "torch" and folder is None:
        folder = str(Path(get_dir()).parent / "datasets")

    splits = ("train",) if training else ("validation", "val", "test")
    download = {"download": True} if prefix in ("torch", "tfds", "hfids") else {}
    failure: Exception | None = None
    for split in splits:
        try:
            dataset: Any = create_dataset(
                name,
                root=folder,
                split=split,
                is_training=training,
                batch_size=1,
                input_img_mode=_mode(input_size),
                **download,
            )
        except _NOT_OPENED as error:
            failure = failure or error
        else:
            return _checked(dataset, name, _mode(input_size), training=training)
    hint = {
        "hfds": "pip install datasets",
        "hfids": "pip install datasets",
        "tfds": "pip install tensorflow-datasets",
        "wds": "pip install webdataset",
    }.get(prefix, "the name")
    raise DataError(
        f"The data set {prefix}/{rest} could not be opened: {failure}. Check {hint}, the "
        f"splits ({', '.join(splits)}) and the network."
    ) from failure


def _checked(dataset: Any, source: str, mode: str, *, training: bool) -> Dataset[Any]:
    """Map-style readers are watched for unreadable images; other data sets see to it themselves."""
    from timm.data import ImageDataset

    if isinstance(dataset, IterableDataset):
        return dataset
    if not isinstance(dataset, ImageDataset):
        return NamedImages(dataset, mode)
    names = getattr(dataset.reader, "class_to_idx", None) or {}
    classes = tuple(str(name) for name in sorted(names, key=lambda name: int(names[name])))
    return CheckedImages(dataset.reader, source, classes, [], mode, training=training)


def _mode(input_size: Sequence[int]) -> str:
    if input_size[0] not in _MODES:
        raise DataError(
            f"The model takes {input_size[0]} channels, but image files give 1, 3 or 4. Give "
            f"batches of tensors instead of a path."
        )
    return _MODES[input_size[0]]


def _open(reader: Any, index: int) -> tuple[BinaryIO, int | None]:
    """Stream and label of one image.

    The members of a tar are read by their offset: timm keeps the file open, and worker processes
    that are forked from here would then share one read position.
    """
    if not hasattr(reader, "tar_state"):
        stream, label = reader[index]
        return stream, label
    member, archive, parent = reader.samples[index]
    path = Path(reader.root) / archive if archive else Path(reader.root)
    offset = member.offset_data + (parent.offset_data if parent is not None else 0)
    with path.open("rb") as file:
        file.seek(offset)
        return io.BytesIO(file.read(member.size)), int(reader.targets[index])
