"""The GPU kernels, in Triton, as functions of tensors; the same functions as in `cpu`.

Every program makes a block of outputs that lie next to each other in memory, in either layout:
images of rows of columns of STEP numbers, where STEP is 1 for the planes of an NCHW tensor.
Overlapping windows are read through the caches. Gradients are gathered, so no program writes
where another one does.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from pfsurgery.kernels.axes import Axis
from pfsurgery.kernels.layout import Group, dense, empty, images

_BLOCK = 1024


@triton.jit
def _place(numbers, STEP, COLUMNS, ROWS):
    """Channel (or 0), column, row and image of numbers that are counted in memory order."""
    pixel = numbers // STEP
    line = pixel // COLUMNS
    return numbers % STEP, pixel % COLUMNS, line % ROWS, line // ROWS


@triton.jit
def _max_kernel(
    source, target, names, total, STEP, ROWS, COLUMNS, OUT_ROWS, OUT_COLUMNS,
    STRIDE_Y, STRIDE_X, DILATION_Y, DILATION_X, PADDING_Y, PADDING_X,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, NAMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    numbers = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = numbers < total
    c, x, y, image = _place(numbers, STEP, OUT_COLUMNS, OUT_ROWS)
    best = tl.full((BLOCK,), float("-inf"), source.dtype.element_ty)
    name = tl.full((BLOCK,), -1, tl.int32)
    for i in tl.static_range(KERNEL_Y):
        for j in tl.static_range(KERNEL_X):
            row = y * STRIDE_Y - PADDING_Y + i * DILATION_Y
            column = x * STRIDE_X - PADDING_X + j * DILATION_X
            inside = valid & (row >= 0) & (row < ROWS) & (column >= 0) & (column < COLUMNS)
            read = ((image * ROWS + row) * COLUMNS + column) * STEP + c
            value = tl.load(source + read, mask=inside, other=float("-inf"))
            better = inside & ((value > best) | (value != value) | (name < 0))
            best = tl.where(better, value, best)
            name = tl.where(better, i * KERNEL_X + j, name)
    tl.store(target + numbers, best, mask=valid)
    if NAMED:
        tl.store(names + numbers, name.to(tl.uint8), mask=valid)


@triton.jit
def _max_gradient_kernel(
    source, names, target, total, STEP, ROWS, COLUMNS, OUT_ROWS, OUT_COLUMNS,
    STRIDE_Y, STRIDE_X, DILATION_Y, DILATION_X, PADDING_Y, PADDING_X,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    numbers = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = numbers < total
    c, x, y, image = _place(numbers, STEP, COLUMNS, ROWS)
    total_gradient = tl.zeros((BLOCK,), SUM)
    for i in tl.static_range(KERNEL_Y - 1, -1, -1):
        for j in tl.static_range(KERNEL_X - 1, -1, -1):
            up, left = y + PADDING_Y - i * DILATION_Y, x + PADDING_X - j * DILATION_X
            row, column = up // STRIDE_Y, left // STRIDE_X
            inside = valid & (up >= 0) & (left >= 0) & (row < OUT_ROWS) & (column < OUT_COLUMNS)
            inside = inside & (row * STRIDE_Y == up) & (column * STRIDE_X == left)
            read = ((image * OUT_ROWS + row) * OUT_COLUMNS + column) * STEP + c
            chosen = tl.load(names + read, mask=inside, other=255) == i * KERNEL_X + j
            value = tl.load(source + read, mask=inside & chosen, other=0.0)
            total_gradient += value.to(SUM)
    tl.store(target + numbers, total_gradient.to(target.dtype.element_ty), mask=valid)


@triton.jit
def _sum_kernel(
    source, target, total, STEP, ROWS, COLUMNS, OUT_ROWS, OUT_COLUMNS,
    positions_y, weights_y, counts_y, positions_x, weights_x, counts_x,
    MOST_Y: tl.constexpr, MOST_X: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    numbers = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = numbers < total
    c, x, y, image = _place(numbers, STEP, OUT_COLUMNS, OUT_ROWS)
    count_y = tl.load(counts_y + y, mask=valid, other=0)
    count_x = tl.load(counts_x + x, mask=valid, other=0)
    made = tl.zeros((BLOCK,), SUM)
    for i in tl.static_range(MOST_Y):
        row = tl.load(positions_y + y * MOST_Y + i, mask=valid, other=0)
        weight_y = tl.load(weights_y + y * MOST_Y + i, mask=valid, other=0.0)
        for j in tl.static_range(MOST_X):
            column = tl.load(positions_x + x * MOST_X + j, mask=valid, other=0)
            weight_x = tl.load(weights_x + x * MOST_X + j, mask=valid, other=0.0)
            inside = valid & (i < count_y) & (j < count_x)
            read = ((image * ROWS + row) * COLUMNS + column) * STEP + c
            value = tl.load(source + read, mask=inside, other=0.0)
            made += value.to(SUM) * (weight_y * weight_x).to(SUM)
    tl.store(target + numbers, made.to(target.dtype.element_ty), mask=valid)


@triton.jit
def _shift_kernel(
    source, target, total, CHANNELS, STEP, ROWS, COLUMNS, OUT_ROWS, OUT_COLUMNS,
    groups, rows, columns, BLOCK: tl.constexpr,
):  # fmt: skip
    numbers = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = numbers < total
    c, x, y, image = _place(numbers, STEP, OUT_COLUMNS, OUT_ROWS)
    group = tl.load(groups + (image * STEP + c) % CHANNELS, mask=valid, other=0)
    row = tl.load(rows + group * OUT_ROWS + y, mask=valid, other=-1)
    column = tl.load(columns + group * OUT_COLUMNS + x, mask=valid, other=-1)
    read = ((image * ROWS + row) * COLUMNS + column) * STEP + c
    value = tl.load(source + read, mask=valid & (row >= 0) & (column >= 0), other=0.0)
    tl.store(target + numbers, value, mask=valid)


def max_pool(x: Tensor, down: Axis, across: Axis) -> Tensor:
    """Maxima (N, C, H', W') of (N, C, H, W)."""
    return _max(dense(x), None, down, across)


def max_pool_with_names(x: Tensor, down: Axis, across: Axis) -> tuple[Tensor, Tensor]:
    """Maxima (N, C, H', W'), and the taps that they came from, one byte each."""
    x = dense(x)
    names = empty(x, down.outputs, across.outputs, torch.uint8)
    return _max(x, names, down, across), names


def max_pool_gradient(gradient: Tensor, names: Tensor, down: Axis, across: Axis) -> Tensor:
    """Gradient (N, C, H, W) of the input of `max_pool_with_names`."""
    layout = torch.contiguous_format if names.is_contiguous() else torch.channels_last
    gradient = gradient.contiguous(memory_format=layout)
    out = empty(names, down.size, across.size, gradient.dtype)
    _launch(
        _max_gradient_kernel,
        out,
        *(gradient, names, out, out.numel(), *_sizes(names, down, across)),
        *_windows(down, across),
        *(down.kernel_size, across.kernel_size, _sum_type(out)),
    )
    return out


def weighted_sum(x: Tensor, down: Axis, across: Axis) -> Tensor:
    """Weighted sums (N, C, H', W') of (N, C, H, W); the gradient has the transposed axes."""
    x = dense(x)
    out = empty(x, down.outputs, across.outputs)
    tables = (*_tables(down, x.device), *_tables(across, x.device))
    most = down.positions.shape[1], across.positions.shape[1]
    sizes = _sizes(x, down, across)
    _launch(_sum_kernel, out, x, out, out.numel(), *sizes, *tables, *most, _sum_type(out))
    return out


def shift(x: Tensor, groups: tuple[Group, ...]) -> Tensor:
    """Groups of channels, given by the end of each, seen through windows of one tap."""
    x = dense(x)
    _, down, across = groups[0]
    out = empty(x, down.outputs, across.outputs)
    sizes = _sizes(x, down, across)
    tables = _shift_tables(groups, x.device)
    _launch(_shift_kernel, out, x, out, out.numel(), x.shape[1], *sizes, *tables)
    return out


def _max(x: Tensor, names: Tensor | None, down: Axis, across: Axis) -> Tensor:
    out = empty(x, down.outputs, across.outputs)
    _launch(
        _max_kernel,
        out,
        *(x, out, out if names is None else names, out.numel(), *_sizes(x, down, across)),
        *_windows(down, across),
        *(down.kernel_size, across.kernel_size, names is not None),
    )
    return out


def _launch(kernel: Any, out: Tensor, *arguments: Any) -> None:
    if out.numel() == 0:
        return
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        kernel[(triton.cdiv(out.numel(), _BLOCK),)](*arguments, BLOCK=_BLOCK)


def _sizes(x: Tensor, down: Axis, across: Axis) -> tuple[int, ...]:
    _, step = images(x)
    return step, down.size, across.size, down.outputs, across.outputs


def _windows(down: Axis, across: Axis) -> tuple[int, ...]:
    return (
        *(down.stride, across.stride, down.dilation, across.dilation),
        *(down.padding, across.padding),
    )


def _sum_type(x: Tensor) -> Any:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


@lru_cache(maxsize=1024)
def _tables(axis: Axis, device: torch.device) -> tuple[Tensor, ...]:
    arrays = axis.positions, axis.weights, axis.counts
    return tuple(torch.from_numpy(array.copy()).to(device) for array in arrays)


@lru_cache(maxsize=1024)
def _shift_tables(groups: tuple[Group, ...], device: torch.device) -> tuple[Tensor, ...]:
    """The group of each channel; by group, where each output row and column is read (-1: zero)."""
    sizes = np.diff([0, *(end for end, _, _ in groups)])
    places = [
        np.stack([np.where(axis.counts > 0, axis.positions[:, 0], -1) for axis in axes])
        for axes in zip(*((down, across) for _, down, across in groups), strict=True)
    ]
    tables = np.repeat(np.arange(len(groups)), sizes), *places
    return tuple(torch.from_numpy(np.ascontiguousarray(table)).to(device) for table in tables)
