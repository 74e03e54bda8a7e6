"""How tensors lie in memory, as the kernels see it."""

from __future__ import annotations

import torch
from torch import Tensor

from pfsurgery.kernels.axes import Axis

Group = tuple[int, Axis, Axis]  # of channels: the channel behind the last one, and its axes


def dense(x: Tensor) -> Tensor:
    """`x` (N, C, H, W) itself, or a copy where its numbers do not fill its memory in order."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    last = x.stride(1) == 1
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def images(x: Tensor) -> tuple[int, int]:
    """Images of a dense tensor, and the numbers that lie side by side at one of their pixels.

    The planes of an NCHW tensor count as images of one number a pixel.
    """
    batch, channels = x.shape[:2]
    return (batch * channels, 1) if x.is_contiguous() else (batch, channels)


def empty(x: Tensor, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor (N, C, rows, columns) in the layout of `x`, of its dtype unless another is given."""
    if (rows, columns) == x.shape[2:]:
        return torch.empty_like(x, dtype=dtype)
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    size = (*x.shape[:2], rows, columns)
    return torch.empty(size, dtype=dtype or x.dtype, device=x.device, memory_format=layout)
