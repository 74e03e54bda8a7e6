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
_blocks: list[NDArray[np.float32]] = []
_lock = Lock()


def output(size: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor (N, C, H, W), channels last.

    Its memory was another such tensor's, if one of about the size is no longer held by anybody: a
    block has as many references as tensors, views and graphs that need it.
    """
    images, channels, rows, columns = size
    numbers = images * channels * rows * columns
    bytes_ = numbers * dtype.itemsize
    if bytes_ < _LEAST or bytes_ > _MOST:
        return torch.empty(size, dtype=dtype, memory_format=torch.channels_last)
    with _lock:
        flat = torch.from_numpy(_block(-(-bytes_ // 4))).view(dtype)[:numbers]
    return flat.view(images, rows, columns, channels).permute(0, 3, 1, 2)


def _block(numbers: int) -> NDArray[np.float32]:
    for place in _unused():
        if numbers <= _blocks[place].size <= 2 * numbers:
            return _blocks[place]
    made = np.empty(numbers, np.float32)
    for place in reversed(_unused()):
        if _fits(made):
            break
        del _blocks[place]
    if _fits(made):
        _blocks.append(made)
    return made


def _fits(made: NDArray[np.float32]) -> bool:
    return sum(block.nbytes for block in _blocks) + made.nbytes <= _MOST


def _unused() -> list[int]:
    """Places of the blocks that have no more references than one that is in a list alone."""
    return [place for place, count in enumerate(_references(_blocks)) if count == _ALONE]


def _references(blocks: list[NDArray[np.float32]]) -> list[int]:
    return [sys.getrefcount(block) for block in blocks]


# How many references the counting itself makes differs from one Python to the next.
_ALONE = _references([np.empty(0, np.float32)])[0]
