"""The order of training images and their random numbers, as functions of seed, epoch and place.

Nothing about the data needs to be stored to go on in the middle of an epoch, and several processes
together see what one process with a larger batch sees.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from pfsurgery.batches import release_workers
from pfsurgery.errors import DataError

_ORDER, _IMAGE, _STEP, _STREAM = range(4)  # what a seed is for


def seed_of(*parts: int) -> int:
    """A seed below 2**32 that depends on every part, and on their order."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def seed_step(seed: int, step: int, process: int) -> None:
    """Seed all global generators for one training step."""
    _seed_all(seed_of(_STEP, seed, step, process))


def _seed_all(value: int) -> None:
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


class SeededImages(Dataset[Any]):
    """A data set whose images draw their random numbers from a seed that comes with the index.

    So augmentation does not depend on which worker process reads an image, nor on what it read
    before.

    Args:
        dataset: A map-style data set.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, entry: tuple[int, int]) -> Any:
        index, value = entry
        random.seed(value)
        np.random.seed(value)
        torch.default_generator.manual_seed(value)
        return self.dataset[index]


class EpochOrder(Sampler[list[Any]]):
    """Batches of (index, seed), or of indices, for one process; `start` says which epoch and batch.

    Batch b of an epoch is cut from places b * batch_size * processes onwards of one permutation, a
    slice for each process.

    Args:
        images: How many there are.
        batch_size: On each process.
        shuffle: Whether to permute them, differently in each epoch.
        drop_last: Whether to leave out an incomplete last batch; always with several processes.
        seeded: Whether each index comes with a seed.
        seed: Of permutations and seeds.
        process: Which one this is.
        processes: How many there are.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        *,
        shuffle: bool,
        drop_last: bool,
        seeded: bool,
        seed: int,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.images, self.batch_size = images, batch_size
        self.shuffle, self.seeded, self.seed = shuffle, seeded, seed
        self.process, self.processes = process, processes
        together = batch_size * processes
        whole = drop_last or processes > 1
        self.batches = images // together if whole else -(-images // together)
        self.epoch, self.first = 1, 0

    @property
    def sizes(self) -> set[int]:
        """How many images batches hold."""
        rest = self.images - (self.batches - 1) * self.batch_size * self.processes
        last = min(self.batch_size, rest)
        return {self.batch_size, last} if self.batches > 1 else {last}

    def start(self, epoch: int, batch: int) -> None:
        """The next iteration is of this epoch, without the batches before `batch`."""
        self.epoch, self.first = epoch, batch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[Any]]:
        indices = self._indices()
        for batch in range(self.first, self.batches):
            begin = (batch * self.processes + self.process) * self.batch_size
            places = range(begin, min(begin + self.batch_size, self.images))
            if self.seeded:
                yield [(indices[at], seed_of(_IMAGE, self.seed, self.epoch, at)) for at in places]
            else:
                yield [indices[at] for at in places]

    def _indices(self) -> list[int]:
        if not self.shuffle:
            return list(range(self.images))
        generator = torch.Generator().manual_seed(seed_of(_ORDER, self.seed, self.epoch))
        order: list[int] = torch.randperm(self.images, generator=generator).tolist()
        return order


class TrainBatches:
    """Batches of training images that can begin in the middle of any epoch.

    A `DataLoader` over a map-style data set, in order or shuffled, is given an `EpochOrder`, and
    skips batches without reading them. Of everything else (samplers of the user's, streams,
    iterables), batches are read and passed over, after the generators were seeded for the epoch.

    Args:
        source: A `DataLoader` or an iterable of batches.
        seed: Of order and augmentation.
        accelerator: Accelerate's.

    Raises:
        DataError: Batches of an iterable cannot be spread over several processes.
    """

    def __init__(self, source: Iterable[Any], *, seed: int, accelerator: Any) -> None:
        self.seed, self.source = seed, source
        self.order: EpochOrder | None = None
        if _is_plain(source):
            assert isinstance(source, DataLoader)
            self.order = _order_of(source, seed, accelerator)
            self.loader: Iterable[Any] = _reordered(source, self.order)
        elif accelerator.num_processes == 1:
            self.loader = source
        else:
            self.loader = spread(source, accelerator)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def start(self, epoch: int, batch: int) -> Iterator[Any]:
        """The batches of `epoch` (from 1), beginning with batch number `batch` (from 0)."""
        _seed_all(seed_of(_STREAM, self.seed, epoch))
        if self.order is not None:
            self.order.start(epoch, batch)
            yield from self.loader
            return
        if isinstance(self.source, DataLoader):
            release_workers(self.source)  # those of an earlier epoch went on with their numbers
            for drawing in (self.source, self.source.sampler):
                generator = getattr(drawing, "generator", None)
                if isinstance(generator, torch.Generator):
                    generator.manual_seed(seed_of(_STREAM, self.seed, epoch))
            _start_stream(self.source, epoch)
            if hasattr(self.loader, "set_epoch"):  # Accelerate's counts epochs of this process
                self.loader.set_epoch(epoch)
        yield from islice(self.loader, batch, None)


def _is_plain(source: Iterable[Any]) -> bool:
    """Whether the order of the loader is known, so that another one of its kind may replace it."""
    if type(source) is not DataLoader or isinstance(source.dataset, IterableDataset):
        return False  # what a subclass adds would be lost
    sampler = source.sampler
    known = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.num_samples == len(source.dataset)  # type: ignore[arg-type]
    )
    return known and type(source.batch_sampler) is BatchSampler


def _order_of(loader: DataLoader[Any], seed: int, accelerator: Any) -> EpochOrder:
    number, size = len(loader.dataset), loader.batch_size or 1  # type: ignore[arg-type]
    return EpochOrder(
        number,
        max(1, min(size, number // accelerator.num_processes)),
        shuffle=isinstance(loader.sampler, RandomSampler),
        drop_last=loader.drop_last,
        seeded=not (type(loader.dataset) is TensorDataset and loader.collate_fn is default_collate),
        seed=seed,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
    )


def _reordered(loader: DataLoader[Any], order: EpochOrder) -> DataLoader[Any]:
    return DataLoader(
        SeededImages(loader.dataset) if order.seeded else loader.dataset,
        batch_sampler=order,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def spread(source: Iterable[Any], accelerator: Any) -> Iterable[Any]:
    """A loader whose batches are this process's share.

    Raises:
        DataError: Batches of an iterable cannot be spread over several processes.
    """
    if _spreads_itself(source):
        return source
    if isinstance(source, DataLoader):
        prepared: Iterable[Any] = accelerator.prepare_data_loader(source)
        return prepared
    if accelerator.num_processes > 1:
        raise DataError(
            f"A {type(source).__name__} of batches cannot be spread over "
            f"{accelerator.num_processes} processes; give a DataLoader, a Dataset or a path."
        )
    return source


def _spreads_itself(source: Iterable[Any]) -> bool:
    """Whether it is a stream of timm's, which gives each process shards of its own."""
    return (
        isinstance(source, DataLoader)
        and isinstance(source.dataset, IterableDataset)
        and hasattr(source.dataset, "reader")
    )


def _start_stream(loader: DataLoader[Any], epoch: int) -> None:
    """Tell a stream of timm's which epoch begins; in this process it must begin anew."""
    set_epoch = getattr(loader.dataset, "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)
    reader = getattr(loader.dataset, "reader", None)
    if loader.num_workers == 0 and getattr(reader, "ds", None) is not None:
        reader.ds = None  # type: ignore[union-attr]
