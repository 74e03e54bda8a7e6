"""Windows along one axis as tables: which pixels each output reads, and how it weighs them."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import comb
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Weighing = Literal["none", "mean", "binomial"]

MOST_NUMBERS = 1 << 30  # of an image whose places are counted in 32 bits
_ONCE = threading.Lock()


@dataclass(frozen=True, eq=False)
class Axis:
    """Taps of every output along one axis, those in the padding left out.

    Attributes:
        size: Pixels that are read.
        outputs: Pixels that are made.
        kernel_size: Taps of a window.
        stride: Pixels from one window to the next.
        dilation: Pixels from one tap to the next.
        padding: Pixels in front of the first one that the first window covers.
        positions: (outputs, taps): the pixels that an output reads, ascending.
        weights: (outputs, taps): what they are multiplied by.
        counts: (outputs,): how many of these are in use.
        taps: (outputs, taps): which tap of the window each is.
    """

    size: int
    outputs: int
    kernel_size: int
    stride: int
    dilation: int
    padding: int
    positions: NDArray[np.int64]
    weights: NDArray[np.float64]
    counts: NDArray[np.int64]
    taps: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), np.int64))

    @cached_property
    def interior(self) -> tuple[int, int]:
        """The longest run of outputs, around the middle, whose windows are copies of each other."""
        if self.outputs == 0:
            return 0, 0
        steps = self.positions - self.stride * np.arange(self.outputs)[:, None]
        middle = self.outputs // 2
        same = (self.counts == self.counts[middle]) & (self.counts == self.positions.shape[1])
        same &= (steps == steps[middle]).all(1) & (self.weights == self.weights[middle]).all(1)
        if not same[middle]:
            return 0, 0
        others = np.flatnonzero(~same)
        first = int(others[others < middle].max(initial=-1)) + 1
        last = int(others[others > middle].min(initial=self.outputs))
        return first, last

    @cached_property
    def is_offset(self) -> bool:
        """Whether each output reads the pixel that is `padding` before it, where there is one."""
        there = np.arange(self.outputs) - self.padding
        inside = (there >= 0) & (there < self.size)
        one_each = self.size == self.outputs and bool((self.counts == inside).all())
        return one_each and bool((self.positions[inside, 0] == there[inside]).all())

    @cached_property
    def span(self) -> int:
        """Pixels that a ring has to hold: from an output's first to the last read till then."""
        used = np.flatnonzero(self.counts)
        last = np.maximum.accumulate(self.positions[used, self.counts[used] - 1])
        return int((last - self.positions[used, 0]).max(initial=0)) + 1

    @cached_property
    def slots(self) -> NDArray[np.int64]:
        """Where the rows at `positions` are in a ring of `span` rows."""
        return self.positions % self.span

    @cached_property
    def block(self) -> NDArray[np.int64]:
        """The table as the kernels read it: numbers and addresses (see `loops`)."""
        first, last = self.interior
        arrays = (self.positions, self.slots, self.counts, self.weights, self.taps)
        return np.array(
            [
                *(self.positions.shape[1], self.stride, first, last, self.span),
                *(array.ctypes.data for array in arrays),
                *(self.kernel_size, self.dilation, self.padding),
            ],
            np.int64,
        )

    @cached_property
    def address(self) -> int:
        """Where `block` is in memory: of the one that stays, whichever thread asks first."""
        with _ONCE:
            return int(self.block.ctypes.data)

    @cached_property
    def transposed(self) -> Axis:
        """The table of the transposed map, for gradients: outputs become what is read."""
        matrix = np.zeros((self.outputs, self.size))
        rows = np.arange(self.outputs)
        for tap in range(self.positions.shape[1]):
            used = self.counts > tap
            matrix[rows[used], self.positions[used, tap]] += self.weights[used, tap]
        # loops that know a shift by its padding alone read it of windows of one tap
        padding = -self.padding if self.kernel_size == 1 else 0
        return _axis(matrix.T, self.kernel_size, 1, self.dilation, padding)

    def tap(self, number: int) -> Axis:
        """The axis that sees one tap alone."""
        padding = self.padding - number * self.dilation
        return axis(self.size, self.outputs, 1, self.stride, 1, padding, "none")


def are_near(down: Axis, across: Axis) -> bool:
    """Whether windows are 3x3 at stride 1 with one of padding, which have loops of their own."""
    return all(
        axis.size == axis.outputs
        and (axis.kernel_size, axis.stride, axis.dilation, axis.padding) == (3, 1, 1, 1)
        for axis in (down, across)
    )


@lru_cache(maxsize=1024)
def axis(
    size: int,
    outputs: int,
    kernel_size: int,
    stride: int,
    dilation: int,
    padding: int,
    weighing: Weighing,
) -> Axis:
    """The windows of a pool (`none`, or `mean` of the pixels that are there) or a blur.

    A binomial window repeats the pixels at the edges; the others leave the padding out.
    """
    taps = np.broadcast_to(np.arange(kernel_size), (outputs, kernel_size))
    starts = np.arange(outputs)[:, None] * stride - padding
    positions = starts + taps * dilation
    if weighing == "binomial":
        matrix = np.zeros((outputs, size))
        binomial = np.array([comb(kernel_size - 1, i) for i in range(kernel_size)])
        clamped = positions.clip(0, size - 1)
        for tap in range(kernel_size):
            matrix[np.arange(outputs), clamped[:, tap]] += binomial[tap] / binomial.sum()
        return _axis(matrix, kernel_size, stride, dilation, padding)
    inside = (positions >= 0) & (positions < size)
    order = np.argsort(~inside, axis=1, kind="stable")
    counts = inside.sum(1)
    positions, taps = (np.take_along_axis(a, order, 1) for a in (positions, taps))
    share = 1 / counts[:, None] if weighing == "mean" else np.ones((outputs, 1))
    used = np.arange(kernel_size) < counts[:, None]
    return Axis(
        *(size, outputs, kernel_size, stride, dilation, padding),
        positions=_table(np.where(used, positions, 0), np.int64),
        weights=_table(np.where(used, share, 0.0), np.float64),
        counts=_table(counts, np.int64),
        taps=_table(taps, np.int64),
    )


def _axis(
    matrix: NDArray[np.float64], kernel_size: int, stride: int, dilation: int, padding: int
) -> Axis:
    """The table of a matrix of weights (outputs, size)."""
    outputs, size = matrix.shape
    used = matrix != 0
    counts = used.sum(1)
    most = max(1, int(counts.max(initial=1)))
    positions = np.argsort(~used, axis=1, kind="stable")[:, :most]
    return Axis(
        *(size, outputs, kernel_size, stride, dilation, padding),
        positions=_table(positions, np.int64),
        weights=_table(np.take_along_axis(matrix, positions, 1), np.float64),
        counts=_table(counts, np.int64),
    )


def _table(values: NDArray[Any], dtype: Any) -> NDArray[Any]:
    return np.ascontiguousarray(values, dtype)
