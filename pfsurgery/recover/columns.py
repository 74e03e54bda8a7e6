"""Candidate columns: every channel of an input under every parameter-free operation of a window.

An operation reads a rectangle of the window's taps. A rectangle of one tap is a shift of the
channel (the centre tap is the channel itself at the strided positions); a larger one is averaged
or maximised. Taps are counted as in `conv.weight[:, :, row, column]`, and shifts pad with zeros,
so a convolution is a sum of columns exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pfsurgery.errors import DataError


@dataclass(frozen=True, slots=True)
class Window:
    """Where a convolution reads: kernel, stride, dilation (height, width) and zero padding.

    Attributes:
        kernel_size: Rows and columns of the kernel.
        stride: Rows and columns between outputs.
        padding: Zeros added at the (top, bottom, left, right), in pixels.
        dilation: Rows and columns between taps.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, ...] = (1, 1)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the output for an input of `height` x `width` pixels.

        Raises:
            DataError: The input is smaller than the window.
        """
        top, bottom, left, right = self.padding
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        rows = (height + top + bottom - reach[0]) // self.stride[0] + 1
        columns = (width + left + right - reach[1]) // self.stride[1] + 1
        if rows < 1 or columns < 1:
            raise DataError(
                f"An input of {height} x {width} pixels is smaller than the window {self}: "
                "use larger images."
            )
        return rows, columns


@dataclass(frozen=True, slots=True)
class Operation:
    """A parameter-free operation on one channel: a tap, or the average or maximum of taps.

    Attributes:
        kind: What is done with the taps read.
        top: First kernel row read.
        left: First kernel column read.
        height: Kernel rows read.
        width: Kernel columns read.
    """

    kind: Literal["tap", "average", "maximum"]
    top: int
    left: int
    height: int = 1
    width: int = 1

    @property
    def linear(self) -> bool:
        """Whether the operation commutes with a pointwise convolution without bias."""
        return self.kind != "maximum"

    @property
    def taps(self) -> list[tuple[int, int]]:
        """The kernel (row, column) of every tap read."""
        rows = range(self.top, self.top + self.height)
        return [(i, j) for i in rows for j in range(self.left, self.left + self.width)]


def _span(size: int, reach: int) -> tuple[int, int]:
    """First tap and number of taps within `reach` of the centre of `size` taps."""
    first = max(0, (size - 1) // 2 - reach)
    return first, min(size - 1, size // 2 + reach) - first + 1


def operations(window: Window, *, reach: int = 1, pools: bool = True) -> tuple[Operation, ...]:
    """The operations that may take the place of a window's kernel.

    Taps within `reach` of the centre, row by row, then the average of every centred square of
    them and the maximum of the innermost.

    Args:
        window: The convolution's geometry.
        reach: Taps to each side of the centre; 1 gives the nine taps of a 3x3.
        pools: Add averages and the maximum.
    """
    (top, height), (left, width) = (_span(size, reach) for size in window.kernel_size)
    taps = [
        Operation("tap", i, j) for i in range(top, top + height) for j in range(left, left + width)
    ]
    squares: list[tuple[int, int, int, int]] = []
    for near in range(1, reach + 1) if pools else ():
        (t, h), (w, n) = (_span(size, near) for size in window.kernel_size)
        if h * n > 1 and (t, w, h, n) not in squares:
            squares.append((t, w, h, n))
    averages = [Operation("average", *square) for square in squares]
    maxima = [Operation("maximum", *square) for square in squares[:1]]
    return tuple(taps + averages + maxima)


def centre_of(ops: Sequence[Operation]) -> int:
    """Which of a window's operations is the channel itself: the tap in the middle of all taps."""
    taps = [op for op in ops if op.kind == "tap"]
    rows, columns = sorted({op.top for op in taps}), sorted({op.left for op in taps})
    middle = rows[(len(rows) - 1) // 2], columns[(len(columns) - 1) // 2]
    return ops.index(Operation("tap", *middle))


class Reader:
    """Reads taps of an input at chosen output positions, one row of channels a position.

    Taps that are columns themselves are read once, for the averages over them too.
    """

    def __init__(self, x: Tensor, window: Window, positions: Tensor | None) -> None:
        top, bottom, left, right = window.padding
        self.batch, self.channels, height, width = x.shape
        self.window = window
        self.rows, self.columns = window.output_size(height, width)
        self.size = (height, width)
        rows = x.permute(0, 2, 3, 1)
        self.padded = F.pad(rows, (0, 0, left, right, top, bottom)).contiguous()
        if positions is None:
            positions = torch.arange(self.batch * self.rows * self.columns, device=x.device)
        self.image = positions // (self.rows * self.columns)
        self.y = positions // self.columns % self.rows * window.stride[0]
        self.x = positions % self.columns * window.stride[1]
        self.read: dict[tuple[int, int], Tensor] = {}

    def tap(self, i: int, j: int) -> Tensor:
        """The (P, C) values under kernel tap (i, j)."""
        if (i, j) in self.read:
            return self.read[i, j]
        height, width = self.padded.shape[1:3]
        row = self.y + i * self.window.dilation[0]
        column = self.x + j * self.window.dilation[1]
        index = (self.image * height + row) * width + column
        return self.padded.view(-1, self.channels).index_select(0, index)

    def inside(self, i: int, j: int) -> Tensor:
        """Whether tap (i, j) reads the image and not the padding, (P, 1) bool."""
        row = self.y + i * self.window.dilation[0] - self.window.padding[0]
        column = self.x + j * self.window.dilation[1] - self.window.padding[2]
        rows = (row >= 0) & (row < self.size[0])
        return (rows & (column >= 0) & (column < self.size[1])).unsqueeze(1)

    def apply(self, operation: Operation) -> Tensor:
        """The (P, C) values of one operation on every channel."""
        if operation.kind == "tap":
            at = (operation.top, operation.left)
            self.read[at] = self.tap(*at)
            return self.read[at]
        inside = [self.inside(i, j) for i, j in operation.taps]
        if operation.kind == "average":
            total = self.tap(*operation.taps[0]).clone()
            for at in operation.taps[1:]:
                total += self.tap(*at)
            return total / torch.stack(inside).sum(0).clamp(min=1)
        values = [
            self.tap(i, j).masked_fill(~within, -torch.inf)
            for (i, j), within in zip(operation.taps, inside, strict=True)
        ]
        best = torch.stack(values).amax(0)
        return best.masked_fill(~torch.stack(inside).any(0), 0.0)


def column_rows(
    x: Tensor, window: Window, ops: Sequence[Operation], positions: Tensor | None = None
) -> Tensor:
    """All columns of an input as the rows of a matrix, one row an output position.

    Padded zeros are left out of an average, and a maximum pads with minus infinity. A window that
    lies wholly in the padding gives 0.

    Args:
        x: Input of the convolution, (N, C, H, W).
        window: The convolution's geometry.
        ops: Operations, usually `operations(window)`.
        positions: Flat indices into (N, H', W') of the outputs wanted; all of them if None.

    Returns:
        (P, len(ops) * C), operation by operation: column `o * C + c` is channel c under `ops[o]`.
    """
    reader = Reader(x, window, positions)
    return torch.cat([reader.apply(op) for op in ops], dim=1)


def kernel_columns(weight: Tensor, ops: Sequence[Operation]) -> Tensor:
    """A convolution's kernel as weights of its columns; exact if `ops` has every tap.

    Args:
        weight: (C_out, C, k_h, k_w).
        ops: Operations of the columns.

    Returns:
        (len(ops) * C, C_out), zero for averages and maxima.
    """
    zero = torch.zeros_like(weight[:, :, 0, 0])
    parts = [weight[:, :, op.top, op.left] if op.kind == "tap" else zero for op in ops]
    return torch.cat(parts, dim=1).T
