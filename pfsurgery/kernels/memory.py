"""Memory for outputs, taken again as soon as nobody holds it any more.

The C library gives large blocks back to the system, and each page of a new one costs a fault:
in a network whose sites take a millisecond each that is up to a third of the time.
"""

from __future__ import annotations

import sys
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_LEAST = 1 << 18  # bytes; the C library keeps smaller blocks itself
_MOST = 1 << 28  # bytes that are kept for later outputs
_UNUSED = 3  # references to a block that no tensor holds: the list's, the loop's, the question's
_blocks: list[NDArray[np.float32]] = []
_lock = Lock()


def output(images: int, channels: int, rows: int, columns: int) -> Tensor:
    """An uninitialised float32 tensor (N, C, H, W), channels last.

    Its memory was another such tensor's, if one of about the size is no longer held by anybody: a
    block has as many references as tensors, views and graphs that need it.
    """
    numbers = images * channels * rows * columns
    if numbers * 4 < _LEAST or numbers * 4 > _MOST:
        size = (images, channels, rows, columns)
        return torch.empty(size, dtype=torch.float32, memory_format=torch.channels_last)
    with _lock:
        flat = torch.from_numpy(_block(numbers)[:numbers])
    return flat.view(images, rows, columns, channels).permute(0, 3, 1, 2)


def _block(numbers: int) -> NDArray[np.float32]:
    for block in _blocks:
        if numbers <= block.size <= 2 * numbers and sys.getrefcount(block) == _UNUSED:
            return block
    made = np.empty(numbers, np.float32)
    room = _MOST - made.nbytes
    for block in list(_blocks):
        if sum(b.nbytes for b in _blocks) <= room:
            break
        if sys.getrefcount(block) == _UNUSED + 1:  # the copy of the list
            _forget(block)
    if sum(b.nbytes for b in _blocks) <= room:
        _blocks.append(made)
    return made


def _forget(block: NDArray[np.float32]) -> None:
    place = next(i for i, other in enumerate(_blocks) if other is block)
    del _blocks[place]
